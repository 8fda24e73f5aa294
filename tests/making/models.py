"""Tiny models, and checkpoint files of them written without our code."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from decant.models import Decoder, ModelConfig
from decant.models.parameters import parameters_by_path

# Widths are multiples of 32, because GGUF quantises rows in blocks of 32.
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=500.0,
    norm_eps=1e-6,
    max_positions=128,
)
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "float32",
}


def random_decoder(config=CONFIG, *, scale=0.2, **kwargs):
    """A decoder whose parameters are all random, norms and biases included.

    numpy makes them, so nothing is compiled. `scale` is their standard deviation; `kwargs` are
    the Decoder's dtypes.
    """
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **kwargs))
    draw = np.random.default_rng(1)
    for path, parameter in parameters_by_path(model).items():
        noise = draw.standard_normal(parameter.shape, np.float32) * scale + ("norm" in path)
        parameter.set_value(jnp.asarray(noise.astype(parameter.dtype)))
    return model


@nnx.jit
def final_states(model):
    """The model's final states on one fixed row."""
    tokens = jnp.arange(10)[None] * 5 % model.config.vocab_size
    return model(tokens, jnp.ones_like(tokens), jnp.arange(10)[None])[0]


def hf_tensors(config=CONFIG, seed=0):
    """Random tensors with the names and shapes of a Hugging Face file of CONFIG's sizes."""
    draw = np.random.default_rng(seed).standard_normal
    d, f, q, kv = 32, 64, 32, 16

    def random(*shape):
        return (draw(shape) * 0.2).astype(np.float32)

    tensors = {"model.embed_tokens.weight": random(64, d), "model.norm.weight": random(d)}
    for i in range(config.num_layers):
        at = f"model.layers.{i}"
        tensors |= {
            f"{at}.input_layernorm.weight": random(d),
            f"{at}.self_attn.q_proj.weight": random(q, d),
            f"{at}.self_attn.k_proj.weight": random(kv, d),
            f"{at}.self_attn.v_proj.weight": random(kv, d),
            f"{at}.self_attn.o_proj.weight": random(d, q),
            f"{at}.post_attention_layernorm.weight": random(d),
            f"{at}.mlp.gate_proj.weight": random(f, d),
            f"{at}.mlp.up_proj.weight": random(f, d),
            f"{at}.mlp.down_proj.weight": random(d, f),
        }
        if config.qkv_bias:
            for name, size in (("q", q), ("k", kv), ("v", kv)):
                tensors[f"{at}.self_attn.{name}_proj.bias"] = random(size)
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = random(64, d)
    return tensors


def write_hf(directory, tensors, config=HF_CONFIG):
    """A Hugging Face directory without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
TOKENS = [*"abcdefgh0123456789", "Ġ", "ab", "Ġab", "12", "<|end|>", "<|user|>"]
MERGES = ["a b", "Ġ ab", "1 2"]


def write_gguf(path, tensors, *, kind=gguf.GGMLQuantizationType.F32, tokenizer=None, **fields):
    """A GGUF file of CONFIG's sizes as llama.cpp's converter writes it, Q and K interleaved.

    `kind` is the quantisation of matrices, `tokenizer` replaces `tokenizer_metadata()`, and
    `fields` are more string fields by name.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    for name, value in fields.items():
        writer.add_string(name, value)
    for name, value in (tokenizer_metadata() if tokenizer is None else tokenizer).items():
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool}
        add.get(type(value), writer.add_array)(f"tokenizer.{name}", value)
    for name, array in tensors.items():
        for heads, part in ((4, "q_proj.weight"), (2, "k_proj.weight")):
            if part in name:
                # As llama.cpp's converter does: (head, half, pair) → (head, pair, half).
                rows = array.reshape(heads, 2, len(array) // heads // 2, -1)
                array = rows.swapaxes(1, 2).reshape(array.shape)
        quantised = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(array, quantised)
        writer.add_tensor(gguf_name(name), data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name):
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def tokenizer_metadata(**changes):
    """The `tokenizer.*` metadata of a small byte-level BPE, with changes by name."""
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "smollm",
        "ggml.tokens": TOKENS,
        "ggml.token_type": [1] * (len(TOKENS) - 2) + [3, 3],
        "ggml.merges": MERGES,
        "ggml.bos_token_id": TOKENS.index("<|user|>"),
        "ggml.eos_token_id": TOKENS.index("<|end|>"),
        "ggml.add_bos_token": False,
    } | changes
