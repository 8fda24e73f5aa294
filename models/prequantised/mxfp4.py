"""MXFP4: 4-bit floats, of which 32 share a power of two; the experts of gpt-oss.

A stack of matrices [experts, output, input] is two tensors of bytes. `…_blocks` [experts, output,
input / 32, 16] has two numbers a byte, the lower half first; `…_scales` [experts, output,
input / 32] has the exponents plus 127. The plain weight is [experts, input, output], as
transformers writes it.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from decant.models.prequantised.stored import AT_ONCE, Header, Index, Read

_POSITIVE = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
_BLOCK = 32
_BIAS = 127


@dataclasses.dataclass(frozen=True)
class Stack:
    """One stack of experts' matrices; see `Stored`."""

    name: str
    """Of the plain weight."""
    shape: tuple[int, int, int]
    """[experts, input, output]."""
    kind: str = "MXFP4"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return (f"{self.name}_blocks", f"{self.name}_scales")

    def read(self, read: Read, index: Index) -> np.ndarray:
        """The elements at `index`, bfloat16, which holds every one of them exactly."""
        experts, inputs, outputs = index
        blocks = slice(inputs.start // _BLOCK, -(-inputs.stop // _BLOCK))
        cut = slice(inputs.start - blocks.start * _BLOCK, inputs.stop - blocks.start * _BLOCK)
        out = np.empty([at.stop - at.start for at in index], ml_dtypes.bfloat16)
        step = max(1, AT_ONCE // max(1, out.shape[1]))
        for number, expert in enumerate(range(experts.start, experts.stop)):
            for start in range(outputs.start, outputs.stop, step):
                rows = slice(start, min(start + step, outputs.stop))
                at = (slice(expert, expert + 1), rows, blocks)
                codes = read(self.parts[0], (*at, slice(0, _BLOCK // 2)))[0]
                exponents = read(self.parts[1], at)[0].astype(np.int32) - _BIAS
                halves = np.stack([codes & 15, codes >> 4], axis=-1)
                values = _VALUES[halves].reshape(*codes.shape[:2], _BLOCK)
                np.ldexp(values, exponents[..., None], out=values)
                there = slice(rows.start - outputs.start, rows.stop - outputs.start)
                out[number, :, there] = values.reshape(len(codes), -1)[:, cut].T
        return out


def stack(header: Header, name: str) -> Stack:
    """The stack whose plain weight is called `name`. ValueError if its tensors do not fit."""
    blocks, scales = header.get(f"{name}_blocks"), header.get(f"{name}_scales")
    if (
        blocks is None
        or scales is None
        or not blocks.dtype == scales.dtype == "U8"
        or len(blocks.shape) != 4
        or blocks.shape != (*scales.shape, _BLOCK // 2)
    ):
        raise ValueError(
            f"{name}_blocks is {blocks and tuple(blocks)}, and {name}_scales is "
            f"{scales and tuple(scales)}; expected U8 [experts, output, blocks, {_BLOCK // 2}] and "
            "[experts, output, blocks]."
        )
    experts, outputs, count, _ = blocks.shape
    return Stack(name, (experts, count * _BLOCK, outputs))
