"""A user's tokenizer, trained on the texts given, and a random teacher, without our code."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

VOCABULARY, WIDTH, MLP, LAYERS, HEADS = 384, 32, 64, 4, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def main(teacher: Path, texts: list[Path]) -> None:
    teacher.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>", "<user>", "<assistant>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text) for text in texts], trainer)
    unused = VOCABULARY - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<unused-{number}>" for number in range(unused)])
    tokenizer.save(str(teacher / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": TEMPLATE}
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    (teacher / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), teacher / "model.safetensors")


def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)

    def random(*shape: int, scale: float = 0.2) -> np.ndarray:
        return (draw.standard_normal(shape) * scale).astype(np.float32)

    made = {
        "model.embed_tokens.weight": random(VOCABULARY, WIDTH, scale=0.6),
        "model.norm.weight": np.ones(WIDTH, np.float32),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{at}.{norm}.weight"] = np.ones(WIDTH, np.float32)
        for name in "qkvo":
            made[f"{at}.self_attn.{name}_proj.weight"] = random(WIDTH, WIDTH)
        for name in ("gate", "up"):
            made[f"{at}.mlp.{name}_proj.weight"] = random(MLP, WIDTH)
        made[f"{at}.mlp.down_proj.weight"] = random(WIDTH, MLP)
    return made
