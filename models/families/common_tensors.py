"""The tensors that Llama and its relatives name alike."""

from __future__ import annotations

import dataclasses

from decant.models.config import ModelConfig
from decant.models.families.tensor_name import Part, TensorName

_NORMS = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
}
_MATRICES = {
    "query": ("self_attn.q_proj", "attn_q", 1),
    "key": ("self_attn.k_proj", "attn_k", 1),
    "value": ("self_attn.v_proj", "attn_v", 1),
    "output": ("self_attn.o_proj", "attn_output", 2),
    "gate": ("mlp.gate_proj", "ffn_gate", 1),
    "up": ("mlp.up_proj", "ffn_up", 1),
    "down": ("mlp.down_proj", "ffn_down", 1),
}


def common_tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters by path, which every family has (or replaces) under these names.

    Norms before attention and MLP, biases, and norms of queries and keys as the config says.
    """
    names = {"embedding": TensorName("model.embed_tokens.weight", "token_embd.weight")}
    for name, (hf, gguf) in _NORMS.items() if config.pre_norms else ():
        names[f"blocks.{name}"] = block_tensor(hf, gguf)
    for name, (hf, gguf, in_axes) in _MATRICES.items():
        rotary = name in ("query", "key")
        names[f"blocks.{name}"] = block_tensor(hf, gguf, in_axes=in_axes, rotary=rotary)
        if name in matrices_with_bias(config):
            bias = block_tensor(hf, gguf, kind="bias", in_axes=0, rotary=rotary)
            names[f"blocks.{name}_bias"] = bias
    if config.qk_norm:
        in_axes = 0 if config.qk_norm_whole else None
        for name, part in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            hf, gguf = f"self_attn.{part}", f"attn_{part}"
            names[f"blocks.{name}"] = block_tensor(hf, gguf, in_axes=in_axes)
    names["final_norm"] = TensorName("model.norm.weight", "output_norm.weight")
    if not config.tie_embeddings:
        names["head"] = TensorName("lm_head.weight", "output.weight", 1)
    return names


def block_tensor(
    hf: str,
    gguf: str = "",
    *,
    kind: str = "weight",
    in_axes: int | None = None,
    rotary: bool = False,
    part: Part | None = None,
) -> TensorName:
    """The tensor of each block that lies under these names of a module."""
    return TensorName(
        f"model.layers.{{layer}}.{hf}.{kind}",
        f"blk.{{layer}}.{gguf}.{kind}" if gguf else "",
        in_axes,
        rotary=rotary,
        part=part,
    )


def expert_tensors(module: str, matrices: dict[str, str]) -> dict[str, TensorName]:
    """A router and an MLP for each expert, by path.

    `module` holds them in a block's Hugging Face files, and `matrices` maps gate, up and down to
    their names there.
    """
    names = {"blocks.router": block_tensor(f"{module}.gate", "ffn_gate_inp", in_axes=1)}
    for name, hf in matrices.items():
        names[f"blocks.{name}"] = TensorName(
            f"model.layers.{{layer}}.{module}.experts.{{expert}}.{hf}.weight",
            f"blk.{{layer}}.ffn_{name}_exps.weight",
            in_axes=1,
            experts=True,
        )
    return names


def post_norm_tensors(attention: str, mlp: str) -> dict[str, TensorName]:
    """The norms after attention and MLP, by path; the arguments are their modules' names."""
    return {
        "blocks.attention_post_norm": block_tensor(attention, "post_attention_norm"),
        "blocks.mlp_post_norm": block_tensor(mlp, "post_ffw_norm"),
    }


def matrices_with_bias(config: ModelConfig) -> tuple[str, ...]:
    """Names of a block's matrices that have a bias."""
    mlp = ("gate", "up", "down") if config.gated_mlp else ("up", "down")
    return (
        *(("query", "key", "value") if config.qkv_bias else ()),
        *(("output",) if config.output_bias else ()),
        *(mlp if config.mlp_bias else ()),
    )


def in_stacks(
    names: dict[str, dict[str, TensorName]], config: ModelConfig
) -> dict[str, TensorName]:
    """Names of all parameters of a model whose blocks lie in several stacks.

    `names` has for each stack ("first_blocks") the names that a model of its blocks alone has,
    where they begin with "blocks.". Those of other parameters may be in any of them.
    """
    placed: dict[str, TensorName] = {}
    for stack, of_stack in names.items():
        layers = config.stacks[stack].layers
        for path, name in of_stack.items():
            if path.startswith("blocks."):
                path = f"{stack}.{path.removeprefix('blocks.')}"
                name = dataclasses.replace(name, layers=layers)
            placed[path] = name
    return placed
