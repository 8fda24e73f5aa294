"""Codecs of the sketch: r numbers a position.

`EXACT` keeps the float32 bits. `QUANTISED` stores whole numbers of steps (`sketch_levels.py`). With
`dither` a pseudo-random fraction of a step, which the reader knows too, is added before rounding
and subtracted after it, so that the error of a number is uniform and does not depend on it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32

from decant.schemas.codecs import sketch_levels
from decant.schemas.codecs.block import SKETCH, Block, Tables
from decant.schemas.codecs.planes import decode_planes, encode_planes
from decant.schemas.codecs.streams import by_position, cells

EXACT = 1
QUANTISED = 2

_UNIT_OF_STEP = 128
"""Steps are in units of the deviation of the number of this rank, or of the last one."""
_FINEST = 2.0**-16
"""Least step, in units of the largest deviation."""
_DITHER_STREAM = b"decant sketch dither 1"


def step_size(deviations: Float[np.ndarray, " r"], step: float) -> float:
    """δ, the distance of stored values, for `step` in units of a deviation."""
    size = step * float(deviations[min(len(deviations), _UNIT_OF_STEP) - 1])
    # A basis may have directions in which the sample does not vary at all.
    return max(size, _FINEST * float(deviations.max())) or 1.0


def encode(
    sketch: Float32[np.ndarray, "n r"],
    *,
    deviations: Float[np.ndarray, " r"],
    step: float,
    dither: bool,
    row_key: bytes,
    tables: Tables,
) -> Block:
    """The block of one record. `step` 0 keeps every bit. ValueError for numbers not finite."""
    if not np.isfinite(sketch).all():
        raise ValueError("a number of a sketch is not finite; such a row must not be encoded")
    if not step:
        return Block(SKETCH, EXACT, encode_planes(sketch))
    size = step_size(deviations, step)
    levels = levels_of(sketch, size=size, dither_key=row_key if dither else None)
    return Block(SKETCH, QUANTISED, sketch_levels.encode(levels, spreads=deviations / size))


def levels_of(
    sketch: Float32[np.ndarray, "n r"], *, size: float, dither_key: bytes | None
) -> Float[np.ndarray, "r n"]:
    """The whole numbers of steps of `size` that are stored; with the dither of a row's key."""
    scaled = sketch.T.astype(np.float64) / size
    if dither_key is not None:
        scaled += _dither(dither_key, rank=len(scaled), positions=len(sketch))
    return np.rint(scaled)


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
) -> Float32[np.ndarray, "total r"]:
    """The sketches of all records, one after another; record i has `positions[i]` ≥ 1.

    All other arguments are as in `encode`. ValueError for payloads that are damaged, of another
    codec than `step` says, or unknown to this release.
    """
    expected = QUANTISED if step else EXACT
    for block in blocks:
        if (block.field, block.codec) != (SKETCH, expected):
            raise ValueError(
                f"field {block.field}, codec {block.codec}; a sketch of step {step:g} is field "
                f"{SKETCH}, codec {expected}"
            )
    payloads = [block.payload for block in blocks]
    if not step:
        values = decode_planes(payloads, positions=positions, width=rank)
        if not np.isfinite(values).all():
            raise ValueError("a number of a sketch is not finite")
        return values
    size = step_size(deviations, step)
    values = sketch_levels.decode(payloads, positions=positions, spreads=deviations / size)
    if dither:
        for cell, key, n in zip(cells(positions), row_keys, positions, strict=True):
            values[:, cell] -= _dither(key, rank=rank, positions=n)
    values *= np.float32(size)
    return by_position(values, positions)


def _dither(row_key: bytes, *, rank: int, positions: int) -> Float32[np.ndarray, "r n"]:
    """Pseudo-random numbers in (−1/2, 1/2), odd multiples of 1/512, a function of the row's key."""
    stream = hashlib.shake_256(_DITHER_STREAM + row_key).digest(rank * positions)
    fractions = np.frombuffer(stream, np.uint8).reshape(rank, positions).astype(np.float32)
    return (fractions + np.float32(0.5)) * np.float32(1 / 256) - np.float32(0.5)
