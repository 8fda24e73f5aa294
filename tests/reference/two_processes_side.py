"""One of several processes that train a student together: CACHE STUDENT OUTPUT OPTIONS."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from decant.torch import DistillationTrainer


def main() -> None:
    cache, student, output, options = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    arguments = TrainingArguments(
        output,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=3e-3,
        **json.loads(options),
    )
    trainer = DistillationTrainer(model, arguments, train_dataset=cache)
    trainer.train()
    evaluated = trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), Path(output) / "weights.pt")
        (Path(output) / "evaluated.json").write_text(json.dumps(evaluated))


if __name__ == "__main__":
    main()
