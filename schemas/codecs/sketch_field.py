"""Codecs of the sketch: r numbers a position.

`EXACT` keeps the float32 bits. `QUANTISED` stores whole numbers of steps (`sketch_levels.py`). So
does `DITHERED` (`dithered_levels.py`), but a pseudo-random fraction of a step, which the reader
knows too, is added before rounding and subtracted after it: the error of a number is then uniform
and does not depend on it. A record that has lost positions is `CUT_DITHERED`: those left keep their
dither, which follows from the row's key and positions before.

Releases before 0.16 gave each column a dither of its own. Their records with dither are read, and
cut: `QUANTISED` and `CUT` before 0.15, `OLDER_DITHERED` and `OLDER_CUT_DITHERED` of 0.15
(`column_dithered_levels.py`).
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt16

from decant.schemas.codecs import column_dithered_levels, dithered_levels, sketch_levels
from decant.schemas.codecs.block import SKETCH, Block, Tables
from decant.schemas.codecs.planes import decode_planes, encode_planes
from decant.schemas.codecs.streams import by_position, cells, spans

EXACT = 1
QUANTISED = 2
CUT = 3
OLDER_DITHERED = 4
OLDER_CUT_DITHERED = 5
DITHERED = 6
CUT_DITHERED = 7

_UNIT_OF_STEP = 128
"""Steps are in units of the deviation of the number of this rank, or of the last one."""
_FINEST = 2.0**-16
"""Least step, in units of the largest deviation."""
_OLDEST_STREAM = b"decant sketch dither 1"
_OLDER_STREAM = b"decant sketch dither 2"
_DITHER_STREAM = b"decant sketch dither 3"
_GOLDEN = 40503
"""2¹⁶ over the golden ratio, odd."""
_LONGEST = 1 << 20
_KINDS = {
    QUANTISED: QUANTISED,
    CUT: QUANTISED,
    OLDER_DITHERED: OLDER_DITHERED,
    OLDER_CUT_DITHERED: OLDER_DITHERED,
    DITHERED: DITHERED,
    CUT_DITHERED: DITHERED,
}
"""The codecs of records with dither; a cut record's levels are stored as those of a whole one."""
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
    spreads = deviations / size
    if not dither:
        levels = levels_of(sketch, size=size).T
        return Block(SKETCH, QUANTISED, sketch_levels.encode(levels, spreads=spreads))
    added = dither_of(row_key, positions=len(sketch))
    levels = levels_of(sketch, size=size, dither=added)
    return Block(SKETCH, DITHERED, dithered_levels.encode(levels, dither=added, spreads=spreads))


def levels_of(
    sketch: Float32[np.ndarray, "n r"],
    *,
    size: float,
    dither: UInt16[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, "n r"]:
    """The whole numbers of steps of `size` that are stored."""
    steps = sketch.astype(np.float64) / size
    return np.rint(steps if dither is None else steps + _fractions(dither)[:, None])


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
    n, width = len(kept), len(deviations)
    if not step:
        values = decode_planes([block.payload], positions=[n], width=width)
        return Block(SKETCH, EXACT, encode_planes(values[kept]))
    spreads = deviations / step_size(deviations, step)
    key, left, payload = _captured(block, row_key, positions=n, length=_LONGEST)
    if block.codec in (DITHERED, CUT_DITHERED):
        added = dither_of(key, positions=len(left))[left]
        out = [np.empty((n, width), np.float32)]
        (levels,) = dithered_levels.decode([payload], dithers=[added], spreads=spreads, out=out)
        payload = dithered_levels.encode(levels[kept], dither=added[kept], spreads=spreads)
        codec = CUT_DITHERED
    elif block.codec in (OLDER_DITHERED, OLDER_CUT_DITHERED):
        added = _older_dither(key, rank=width, positions=len(left))[:, left]
        (levels,) = column_dithered_levels.decode([payload], dithers=[added], spreads=spreads)
        levels, added = levels[:, kept], added[:, kept]
        payload = column_dithered_levels.encode(levels, dither=added, spreads=spreads)
        codec = OLDER_CUT_DITHERED
    else:
        levels = sketch_levels.decode([payload], positions=[n], spreads=spreads)[:, :n]
        payload, codec = sketch_levels.encode(levels[:, kept], spreads=spreads), CUT
        if not dither:
            return Block(SKETCH, QUANTISED, payload)
    left[left] = kept
    head = _CAPTURED.pack(key, len(left)) + np.packbits(left).tobytes()
    return Block(SKETCH, codec, head + payload)


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
    kinds = [_KINDS[block.codec] for block in blocks]
    if len(set(kinds)) > 1:  # an older release began the capture
        shared = {"deviations": deviations, "step": step, "dither": dither, "tables": tables}
        each = zip(blocks, positions, row_keys, strict=True)
        return np.concatenate(
            [
                decode([block], positions=[n], rank=rank, row_keys=[key], length=length, **shared)
                for block, n, key in each
            ]
        )
    size = step_size(deviations, step)
    opened = [
        _captured(block, key, positions=n, length=length)
        for block, key, n in zip(blocks, row_keys, positions, strict=True)
    ]
    payloads, spreads = [payload for *_, payload in opened], deviations / size
    out = np.empty((sum(positions), rank), np.float32)
    if kinds[0] == DITHERED:
        dithers = [dither_of(key, positions=len(left))[left] for key, left, _ in opened]
        each = dithered_levels.decode(
            payloads, dithers=dithers, spreads=spreads, out=[out[span] for span in spans(positions)]
        )
        for values, added in zip(each, dithers, strict=True):
            values -= _fractions(added)[:, None]
            values *= np.float32(size)
        return out
    if kinds[0] == OLDER_DITHERED:
        added = [
            _left(_older_dither(key, rank=rank, positions=len(left)), left)
            for key, left, _ in opened
        ]
        levels = column_dithered_levels.decode(payloads, dithers=added, spreads=spreads)
        for span, values, of_row in zip(spans(positions), levels, added, strict=True):
            values -= _fractions(of_row)
            values *= np.float32(size)
            out[span] = values.T
        return out
    values = sketch_levels.decode(payloads, positions=positions, spreads=spreads)
    if dither:
        for cell, (key, left, _) in zip(cells(positions), opened, strict=True):
            of_row = _oldest_dither(key, rank=rank, positions=len(left))
            values[:, cell] -= _left(of_row, left)
    values *= np.float32(size)
    return by_position(values, positions)


def _left(of_row: np.ndarray, left: Bool[np.ndarray, " captured"]) -> np.ndarray:
    """The columns of the positions that are left."""
    return of_row if left.all() else of_row[:, left]


def _require_codec(block: Block, *, step: float, dither: bool) -> None:
    expected = (EXACT,)
    if step:
        expected = tuple(_KINDS) if dither else (QUANTISED,)
    if block.field != SKETCH or block.codec not in expected:
        raise ValueError(
            f"field {block.field}, codec {block.codec}; a sketch of step {step:g} is field "
            f"{SKETCH}, codec {' or '.join(map(str, expected))}"
        )


def _captured(
    block: Block, row_key: bytes, *, positions: int, length: int
) -> tuple[bytes, Bool[np.ndarray, " captured"], bytes]:
    """The key of the dither, which of the positions captured are left, and the levels' payload."""
    if block.codec not in (CUT, OLDER_CUT_DITHERED, CUT_DITHERED):
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


def dither_of(row_key: bytes, *, positions: int) -> UInt16[np.ndarray, " n"]:
    """What is added to all numbers of a position before rounding, in 2⁻¹⁶ steps, less ½: a function
    of the row's key.

    It begins anywhere, and each position is the golden ratio further, so that neighbours differ:
    the sum over positions has less error than with independent numbers. A dither of its own for
    each column brings nothing: gradients are as near to the dense ones.
    """
    stream = hashlib.shake_256(_DITHER_STREAM + row_key).digest(2)
    first = np.frombuffer(stream, "<u2").astype(np.uint16)
    return first + np.arange(positions).astype(np.uint16) * np.uint16(_GOLDEN)


def _fractions(dither: UInt16[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """The dither in (−½, ½)."""
    return (dither.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-16) - np.float32(0.5)


def _older_dither(row_key: bytes, *, rank: int, positions: int) -> UInt16[np.ndarray, "r n"]:
    """That of codecs 4 and 5: each column begins anywhere."""
    stream = hashlib.shake_256(_OLDER_STREAM + row_key).digest(2 * rank)
    first = np.frombuffer(stream, "<u2").astype(np.uint16)
    return first[:, None] + np.arange(positions).astype(np.uint16) * np.uint16(_GOLDEN)


def _oldest_dither(row_key: bytes, *, rank: int, positions: int) -> Float32[np.ndarray, "r n"]:
    """That of codecs 2 and 3, odd multiples of 1/512."""
    stream = hashlib.shake_256(_OLDEST_STREAM + row_key).digest(rank * positions)
    fractions = np.frombuffer(stream, np.uint8).reshape(rank, positions).astype(np.float32)
    return (fractions + np.float32(0.5)) * np.float32(1 / 256) - np.float32(0.5)
