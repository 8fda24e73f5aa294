"""Codec of the sketch. Step 0 keeps the float32 bits, split into byte planes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from decant.schemas.codecs.block import SKETCH, Block, Tables
from decant.schemas.codecs.streams import compress, decompress, join, split

EXACT = 1


def encode(
    sketch: Float[np.ndarray, "n r"],
    *,
    deviations: Float[np.ndarray, " r"],
    step: float,
    dither: bool,
    row_key: bytes,
    tables: Tables,
) -> Block:
    """The block of one record."""
    del deviations, dither, row_key, tables
    if step:
        raise ValueError(f"no codec for a step of {step} yet")
    planes = np.ascontiguousarray(sketch.T, "<f4").view(np.uint8).reshape(*sketch.T.shape, 4)
    return Block(
        SKETCH, EXACT, join([compress(np.ascontiguousarray(planes[..., b])) for b in range(4)])
    )


def decode(
    blocks: Sequence[Block],
    *,
    positions: Sequence[int],
    rank: int,
    deviations: Float[np.ndarray, " r"],
    step: float,
    dither: bool,
    row_keys: Sequence[bytes],
    tables: Tables,
) -> Float[np.ndarray, "total r"]:
    """The sketches that `encode` was given, records one after another."""
    del deviations, step, dither, row_keys, tables
    out = []
    for block, n in zip(blocks, positions, strict=True):
        if block.codec != EXACT:
            raise ValueError(f"codec {block.codec} of a sketch is unknown to this release")
        flat = decompress(split(block.payload, count=4), sizes=4 * [rank * n])
        planes = flat.reshape(4, rank, n).transpose(2, 1, 0)
        out.append(np.ascontiguousarray(planes).view("<f4")[..., 0])
    sketch = np.concatenate(out).astype(np.float32, copy=False)
    if not np.isfinite(sketch).all():
        raise ValueError("a number of a sketch is not finite")
    return sketch
