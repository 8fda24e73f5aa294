"""Tensors that hold several parameters: queries, keys and values, or gate and up."""

from __future__ import annotations

import dataclasses

from decant.models.config import ModelConfig
from decant.models.families.tensor_name import Part, TensorName


def fuse_qkv(
    names: dict[str, TensorName], config: ModelConfig, *, hf: str, gguf: str = "", by_head: bool
) -> dict[str, TensorName]:
    """Queries, keys and values (and their biases) as outputs of one map, by path.

    Args:
        names: of the parameters if they were apart.
        config: the model's; its sizes place the outputs.
        hf: pattern of the one tensor's name, with `{layer}` and `{kind}`: weight or bias.
        gguf: the same in GGUF files.
        by_head: the outputs are each head's query, key and value, head by head. Otherwise they are
            all queries, then all keys, then all values.
    """
    width = config.head_dim
    heads = (1, 1, 1) if by_head else (config.num_heads, *(config.num_kv_heads,) * 2)
    ends = [sum(heads[: i + 1]) * width for i in range(3)]
    fused: dict[str, TensorName] = {}
    for name, count, end in zip(("query", "key", "value"), heads, ends, strict=True):
        runs = config.num_heads if by_head else 1
        part = Part(end - count * width, end, ends[-1], runs)
        fused |= _fused(names, name, part=part, hf=hf, gguf=gguf)
    return fused


def fuse_gate_and_up(
    names: dict[str, TensorName], config: ModelConfig, *, hf: str, gguf: str = ""
) -> dict[str, TensorName]:
    """Gate and up as outputs of one map, by path; arguments as for `fuse_qkv`."""
    width = config.intermediate_size
    return _fused(names, "gate", part=Part(0, width, 2 * width), hf=hf, gguf=gguf) | _fused(
        names, "up", part=Part(width, 2 * width, 2 * width), hf=hf, gguf=gguf
    )


def _fused(
    names: dict[str, TensorName], name: str, *, part: Part, hf: str, gguf: str
) -> dict[str, TensorName]:
    return {
        path: dataclasses.replace(
            names[path],
            hf=hf.replace("{kind}", kind),
            gguf=gguf.replace("{kind}", kind),
            part=part,
        )
        for path, kind in ((f"blocks.{name}", "weight"), (f"blocks.{name}_bias", "bias"))
        if path in names
    }
