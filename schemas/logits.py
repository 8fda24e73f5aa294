"""A logits record: which positions of a row are scored, how many ids each, and the coded fields."""

import struct

import numpy as np

from schemas import codecs
from schemas.codecs import Profile, Tables
from schemas.frames import Block, Frame, Kind, unpack
from schemas.targets import Targets

_SCORED, _COUNTS = 16, 17  # below 16: the codecs' fields
_BITMAP, _UNIFORM = 0, 1


def encode_logits(
    targets: Targets,
    *,
    row_key: bytes,
    scored: np.ndarray,
    profile: Profile,
    tables: Tables,
    vocabulary: int,
) -> bytes:
    """The record of one row. `scored` bool [S]; `targets` has one entry per True."""
    assert len(targets) == scored.sum(), "one target for each scored position"
    blocks = (
        Block(_SCORED, _BITMAP, np.packbits(scored).tobytes()),
        Block(_COUNTS, _UNIFORM, struct.pack("<I", targets.k)),
        *codecs.encode(profile, targets, tables=tables, vocabulary=vocabulary),
    )
    return Frame(Kind.LOGITS, row_key, len(scored), blocks).pack()


def field_bytes(data: bytes, *, where: str) -> dict[str, int]:
    """Bytes of a record by what they hold: "top-k", "tail", "draws" and "framing"."""
    frame = unpack(data, kind=Kind.LOGITS, where=where)
    names = {codecs.TOPK: "top-k", codecs.TAIL: "tail", codecs.DRAWS: "draws"}
    sizes = {names[b.field]: len(b.payload) for b in frame.blocks if b.field in names}
    return {**sizes, "framing": len(data) - sum(sizes.values())}


def decode_logits(
    data: bytes, *, tables: Tables, vocabulary: int, where: str
) -> tuple[np.ndarray, Targets, bytes]:
    """Scored positions (bool [S]), their targets, and the row's key.

    ValueError that begins with `where` if the record is truncated, altered or newer than this
    release.
    """
    frame = unpack(data, kind=Kind.LOGITS, where=where)
    bitmap = np.frombuffer(frame.block(_SCORED, where=where).payload, np.uint8)
    if len(bitmap) != (frame.positions + 7) // 8:
        raise ValueError(f"{where}: bitmap of {len(bitmap)} bytes for {frame.positions} positions")
    scored = np.unpackbits(bitmap, count=frame.positions).astype(bool)
    counts = frame.block(_COUNTS, where=where)
    if counts.codec != _UNIFORM or len(counts.payload) != 4:
        raise ValueError(f"{where}: counts use codec {counts.codec}, which this release lacks")
    (k,) = struct.unpack("<I", counts.payload)
    fields = [block for block in frame.blocks if block.field < _SCORED]
    try:
        targets = codecs.decode(
            fields, positions=int(scored.sum()), k=k, vocabulary=vocabulary, tables=tables
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return scored, targets, frame.row_key
