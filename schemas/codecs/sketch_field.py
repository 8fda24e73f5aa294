"""Codecs of the sketch: r numbers a position.

`EXACT` keeps the float32 bits. `QUANTISED` stores whole numbers of steps (`sketch_levels.py`). With
`dither` a pseudo-random fraction of a step, which the reader knows too, is added before rounding
and subtracted after it, so that the error of a number is uniform and does not depend on it. `CUT`
is `QUANTISED` with dither of a record that has lost positions: those left keep their dither, which
follows from the row's key and positions before.
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32

from decant.schemas.codecs import sketch_levels
from decant.schemas.codecs.block import SKETCH, Block, Tables
from decant.schemas.codecs.planes import decode_planes, encode_planes
from decant.schemas.codecs.streams import by_position, cells

EXACT = 1
QUANTISED = 2
CUT = 3

_UNIT_OF_STEP = 128
"""Steps are in units of the deviation of the number of this rank, or of the last one."""
_FINEST = 2.0**-16
"""Least step, in units of the largest deviation."""
_DITHER_STREAM = b"decant sketch dither 1"
_LONGEST = 1 << 20
_CAPTURED = struct.Struct("<16sI")
"""The row's key at capture, and its number of positions; a bitmap of those left follows."""


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


def cut(
    block: Block,
    kept: Bool[np.ndarray, " n"],
    *,
    deviations: Float[np.ndarray, " r"],
    step: float,
    dither: bool,
    row_key: bytes,
    tables: Tables,
) -> Block:
    """The block of the positions `kept` of a record alone, at least one.

    Their numbers decode to the same bits as before, under any key that the row gets. `row_key` is
    that of the record so far. ValueError as `decode`.
    """
    _require_codec(block, step=step, dither=dither)
    if not step:
        width = len(deviations)
        values = decode_planes([block.payload], positions=[len(kept)], width=width)
        return Block(SKETCH, EXACT, encode_planes(values[kept]))
    spreads = deviations / step_size(deviations, step)
    key, left, payload = _captured(block, row_key, positions=len(kept), length=_LONGEST)
    levels = sketch_levels.decode([payload], positions=[len(kept)], spreads=spreads)
    payload = sketch_levels.encode(levels[:, : len(kept)][:, kept], spreads=spreads)
    if not dither:
        return Block(SKETCH, QUANTISED, payload)
    left[left] = kept
    head = _CAPTURED.pack(key, len(left)) + np.packbits(left).tobytes()
    return Block(SKETCH, CUT, head + payload)


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
    length: int = _LONGEST,
) -> Float32[np.ndarray, "total r"]:
    """The sketches of all records, one after another; record i has `positions[i]` ≥ 1.

    A record was captured with at most `length` positions. All other arguments are as in `encode`.
    ValueError for payloads that are damaged, of another codec than `step` and `dither` say, or
    unknown to this release.
    """
    for block in blocks:
        _require_codec(block, step=step, dither=dither)
    if not step:
        payloads = [block.payload for block in blocks]
        values = decode_planes(payloads, positions=positions, width=rank)
        if not np.isfinite(values).all():
            raise ValueError("a number of a sketch is not finite")
        return values
    size = step_size(deviations, step)
    keys, captured, payloads = zip(
        *(
            _captured(block, key, positions=n, length=length)
            for block, key, n in zip(blocks, row_keys, positions, strict=True)
        ),
        strict=True,
    )
    values = sketch_levels.decode(payloads, positions=positions, spreads=deviations / size)
    if dither:
        for cell, key, left in zip(cells(positions), keys, captured, strict=True):
            of_row = _dither(key, rank=rank, positions=len(left))
            values[:, cell] -= of_row if left.all() else of_row[:, left]
    values *= np.float32(size)
    return by_position(values, positions)


def _require_codec(block: Block, *, step: float, dither: bool) -> None:
    expected = (QUANTISED, CUT) if step and dither else (QUANTISED,) if step else (EXACT,)
    if block.field != SKETCH or block.codec not in expected:
        raise ValueError(
            f"field {block.field}, codec {block.codec}; a sketch of step {step:g} is field "
            f"{SKETCH}, codec {' or '.join(map(str, expected))}"
        )


def _captured(
    block: Block, row_key: bytes, *, positions: int, length: int
) -> tuple[bytes, Bool[np.ndarray, " captured"], bytes]:
    """The key of the dither, which of the positions captured are left, and the levels' payload."""
    if block.codec != CUT:
        return row_key, np.ones(positions, bool), block.payload
    if len(block.payload) < _CAPTURED.size:
        raise ValueError(f"a sketch of {len(block.payload)} bytes")
    key, count = _CAPTURED.unpack_from(block.payload)
    end = _CAPTURED.size + -(-count // 8)
    if not positions <= count <= length or len(block.payload) < end:
        raise ValueError(f"{positions} of {count} positions, in {len(block.payload)} bytes")
    bitmap = np.frombuffer(block.payload[_CAPTURED.size : end], np.uint8)
    left = np.unpackbits(bitmap, count=count).view(bool)
    if np.count_nonzero(left) != positions:
        raise ValueError(f"{np.count_nonzero(left)} positions are left of a record of {positions}")
    return key, left, block.payload[end:]


def _dither(row_key: bytes, *, rank: int, positions: int) -> Float32[np.ndarray, "r n"]:
    """Pseudo-random numbers in (−1/2, 1/2), odd multiples of 1/512, a function of the row's key."""
    stream = hashlib.shake_256(_DITHER_STREAM + row_key).digest(rank * positions)
    fractions = np.frombuffer(stream, np.uint8).reshape(rank, positions).astype(np.float32)
    return (fractions + np.float32(0.5)) * np.float32(1 / 256) - np.float32(0.5)
