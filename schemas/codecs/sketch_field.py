"""Codecs of the sketch: r numbers a position.

`EXACT` keeps the float32 bits. `QUANTISED` stores whole numbers of steps. With `dither` a
pseudo-random fraction of a step, which the reader knows too, is added before rounding and
subtracted after it, so that the error of a number is uniform and does not depend on it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32

from decant.schemas.codecs import numbers
from decant.schemas.codecs.block import SKETCH, Block, Tables
from decant.schemas.codecs.planes import decode_planes, encode_planes
from decant.schemas.codecs.streams import (
    by_position,
    cells,
    column_runs,
    compress,
    decompress,
    fill_columns,
    grid,
    join,
    run_heights,
    split,
)

EXACT = 1
QUANTISED = 2

_UNIT_OF_STEP = 128
"""Steps are in units of the deviation of the number of this rank, or of the last one."""
_DITHER_STREAM = b"decant sketch dither 1"
_MOST = (1 << 22) - 1
_FRAMES = 8


def step_size(deviations: Float[np.ndarray, " r"], step: float) -> float:
    """δ, the distance of stored values, for `step` in units of a deviation."""
    return step * float(deviations[min(len(deviations), _UNIT_OF_STEP) - 1])


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
    scaled = sketch.T.astype(np.float64) / step_size(deviations, step)
    if dither:
        scaled = scaled + _dither(row_key, rank=len(scaled), positions=scaled.shape[1])
    levels = np.clip(np.rint(scaled), -_MOST, _MOST).astype(np.int32)
    symbols, raw = numbers.encode(levels << 1 ^ levels >> 31)
    frames = [compress(symbols[rows]) for rows in column_runs(len(symbols), _FRAMES)]
    return Block(SKETCH, QUANTISED, join([raw, *frames]))


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
    symbols, raw = grid(rank, positions), []
    for cell, payload, n in zip(cells(positions), payloads, positions, strict=True):
        heights = run_heights(rank, _FRAMES)
        own_raw, *frames = split(payload, count=1 + len(heights))
        raw.append(own_raw)
        flat = decompress(frames, sizes=[height * n for height in heights])
        fill_columns(symbols[:, cell], flat, [n])
    folded = numbers.decode(symbols, raw)
    values = (folded >> 1 ^ -(folded & 1)).astype(np.float32)
    if dither:
        for cell, key, n in zip(cells(positions), row_keys, positions, strict=True):
            values[:, cell] -= _dither(key, rank=rank, positions=n)
    values *= np.float32(step_size(deviations, step))
    return by_position(values, positions)


def _dither(row_key: bytes, *, rank: int, positions: int) -> Float32[np.ndarray, "r n"]:
    """Pseudo-random numbers in (−1/2, 1/2), multiples of 1/512, a function of the row's key."""
    stream = hashlib.shake_256(_DITHER_STREAM + row_key).digest(rank * positions)
    fractions = np.frombuffer(stream, np.uint8).reshape(rank, positions).astype(np.float32)
    return (fractions + np.float32(0.5)) * np.float32(1 / 256) - np.float32(0.5)
