"""A Hugging Face model learns from a cache with a Hugging Face Trainer.

    python examples/hf_trainer.py [CACHE] [--student DIRECTORY] [--output runs/hf] [--steps 100]

Needs torch, transformers and accelerate (docs/pytorch.md). Without `--student` it is a small Llama
with random weights. The trained student is saved with the teacher's tokenizer, so that
`AutoModelForCausalLM` and `AutoTokenizer` load it.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

import decant
from decant.torch import DistillationTrainer


def small_llama(cache: decant.Cache) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cache.manifest.vocabulary_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", nargs="?", default="runs/cache")
    parser.add_argument("--student")
    parser.add_argument("--output", type=Path, default=Path("runs/hf"))
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    cache = decant.open_cache(options.cache)
    load = AutoModelForCausalLM.from_pretrained
    student = load(options.student) if options.student else small_llama(cache)
    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=max(1, options.steps // 5),
        eval_strategy="steps",
        eval_steps=max(1, options.steps // 2),
        save_strategy="steps",
        save_steps=max(1, options.steps // 2),
        disable_tqdm=True,
        report_to=[],
    )
    trainer = DistillationTrainer(student, arguments, train_dataset=cache)
    trainer.train()  # resume_from_checkpoint=True goes on with an interrupted run
    trainer.save_model(str(options.output / "student"))
    for name, contents in cache.tokenizer_files().items():
        if name.startswith(("tokenizer", "special", "chat_template")):
            (options.output / "student" / name).write_bytes(contents)


if __name__ == "__main__":
    main()
