"""A logits record: bitmap of scored positions, ids per position (k), and the encoded fields."""

import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from decant.schemas import codecs
from decant.schemas.codecs import Profile, Tables
from decant.schemas.disk.frames import Block, Frame, Kind, unpack
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.targets import Targets

_SCORED, _COUNTS = 16, 17  # field ids below 16 belong to codecs
_BITMAP, _UNIFORM = 0, 1
_ENTRIES_AT_ONCE = 1 << 17


def encode_logits(
    targets: Targets,
    *,
    row_key: bytes,
    scored: np.ndarray,
    profile: Profile,
    tables: Tables,
    vocabulary: int,
) -> bytes:
    """The record of one row. `scored` is bool [S]; `targets` has one entry per True in it.

    ValueError as `codecs.encode`.
    """
    assert len(targets) == scored.sum(), "one target for each scored position"
    blocks = (
        Block(_SCORED, _BITMAP, np.packbits(scored).tobytes()),
        Block(_COUNTS, _UNIFORM, struct.pack("<I", targets.k)),
        *codecs.encode(profile, targets, tables=tables, vocabulary=vocabulary),
    )
    return Frame(Kind.LOGITS, row_key, len(scored), blocks).pack()


def field_bytes(data: bytes, *, where: str) -> dict[str, int]:
    """Bytes of a record by content: "top-k", "tail", "draws", "labels" and "framing"."""
    frame = unpack(data, kind=Kind.LOGITS, where=where)
    names = {
        codecs.TOPK: "top-k",
        codecs.TAIL: "tail",
        codecs.DRAWS: "draws",
        codecs.LABELS: "labels",
    }
    sizes = {names[b.field]: len(b.payload) for b in frame.blocks if b.field in names}
    return {**sizes, "framing": len(data) - sum(sizes.values())}


@dataclass(frozen=True, eq=False)
class LogitsRecord:
    """A record with its fields still encoded. `where` is its name in errors."""

    where: str
    row_key: bytes
    scored: np.ndarray
    """bool [S]"""
    k: int
    fields: tuple[Block, ...]

    @property
    def positions(self) -> int:
        """Number of scored positions."""
        return int(np.count_nonzero(self.scored))


def open_logits(data: bytes, *, where: str, length: int, spec: TargetSpec) -> LogitsRecord:
    """The record in `data` of a row of `length` positions, its fields not yet decoded.

    ValueError that begins with `where` if it is truncated, altered or newer than this release, of a
    row of another length, or if it holds more ids or draws a position than `spec` says, or labels
    unlike it.
    """
    frame = unpack(data, kind=Kind.LOGITS, where=where)
    if frame.positions != length:
        raise ValueError(f"{where}: expected a row of {length} positions, got {frame.positions}")
    bitmap = np.frombuffer(frame.block(_SCORED, where=where).payload, np.uint8)
    if len(bitmap) != (frame.positions + 7) // 8:
        raise ValueError(f"{where}: bitmap of {len(bitmap)} bytes for {frame.positions} positions")
    scored = np.unpackbits(bitmap, count=frame.positions).view(bool)
    counts = frame.block(_COUNTS, where=where)
    if counts.codec != _UNIFORM or len(counts.payload) != 4:
        raise ValueError(f"{where}: counts use codec {counts.codec}, which this release lacks")
    (k,) = struct.unpack("<I", counts.payload)
    fields = tuple(block for block in frame.blocks if block.field < _SCORED)
    draws = codecs.count_draws(fields)
    if not min(1, spec.k) <= k <= spec.k or draws > spec.draws:
        raise ValueError(
            f"{where}: {k} ids and {draws} draws a position; the manifest says {spec.k} and "
            f"{spec.draws} at most"
        )
    labels = any(block.field == codecs.LABELS for block in fields)
    if scored.any() and labels != spec.labels:
        raise ValueError(
            f"{where}: {'holds' if labels else 'lacks'} log-probabilities of labels, which the "
            f"manifest says it {'lacks' if labels else 'holds'}"
        )
    return LogitsRecord(where, frame.row_key, scored, k, fields)


def group_for_decoding(records: Sequence[LogitsRecord]) -> Iterator[list[int]]:
    """Groups of records to decode together, as indices. Records without targets are left out.

    A group has one `codecs.group_key`, and few enough records for their arrays to stay in the
    processor's cache.
    """
    by_key = defaultdict(list)
    for number, record in enumerate(records):
        if record.positions:
            by_key[record.k, codecs.group_key(record.fields)].append(number)
    for (k, _), numbers in by_key.items():
        at_once = max(1, _ENTRIES_AT_ONCE // (max(k, 1) * len(records[0].scored)))
        for first in range(0, len(numbers), at_once):
            yield numbers[first : first + at_once]


def decode_logits(records: Sequence[LogitsRecord], *, tables: Tables, vocabulary: int) -> Targets:
    """The targets of all scored positions of one group of records, record after record.

    ValueError that begins with the name of a record that is damaged or newer than this release, or
    whose targets are no distributions.
    """
    try:
        return codecs.decode(
            [record.fields for record in records],
            positions=[record.positions for record in records],
            k=records[0].k,
            vocabulary=vocabulary,
            tables=tables,
        )
    except ValueError as error:
        if len(records) == 1:
            raise ValueError(f"{records[0].where}: {error}") from error
        for record in records:  # decoded alone, the faulty record fails and is named
            decode_logits([record], tables=tables, vocabulary=vocabulary)
        raise
