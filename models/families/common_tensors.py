"""The tensors that Llama and its relatives name alike."""

from __future__ import annotations

from decant.models.config import ModelConfig
from decant.models.families.tensor_name import TensorName


def common_tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters by path, which every family has (or replaces) under these names."""
    names = {"embedding": TensorName("model.embed_tokens.weight", "token_embd.weight")}
    block = {
        "attention_norm": ("input_layernorm", "attn_norm", None),
        "query": ("self_attn.q_proj", "attn_q", 1),
        "key": ("self_attn.k_proj", "attn_k", 1),
        "value": ("self_attn.v_proj", "attn_v", 1),
        "output": ("self_attn.o_proj", "attn_output", 2),
        "mlp_norm": ("post_attention_layernorm", "ffn_norm", None),
        "gate": ("mlp.gate_proj", "ffn_gate", 1),
        "up": ("mlp.up_proj", "ffn_up", 1),
        "down": ("mlp.down_proj", "ffn_down", 1),
    }
    for name, (hf, gguf, in_axes) in block.items():
        names[f"blocks.{name}"] = TensorName(
            f"model.layers.{{layer}}.{hf}.weight",
            f"blk.{{layer}}.{gguf}.weight",
            in_axes,
            rotary=name in ("query", "key"),
        )
    names["final_norm"] = TensorName("model.norm.weight", "output_norm.weight")
    if not config.tie_embeddings:
        names["head"] = TensorName("lm_head.weight", "output.weight", 1)
    return names


def qk_norm_tensors() -> dict[str, TensorName]:
    """The norms of queries and keys, by path."""
    return {
        f"blocks.{name}": TensorName(
            f"model.layers.{{layer}}.self_attn.{part}.weight", f"blk.{{layer}}.attn_{part}.weight"
        )
        for name, part in (("query_norm", "q_norm"), ("key_norm", "k_norm"))
    }
