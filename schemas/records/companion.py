"""Records of `counts` and `sketch`: one block a row, for the positions that `logits` scores.

    frame: kind COUNTS or SKETCH · the row's key · number of positions n · the block, if n > 0

Positions are those of the row's logits record, in order. n is 0 for a row that was skipped when the
signal was added to the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float

from decant.schemas.codecs import Tables, counts_field, sketch_field
from decant.schemas.codecs.block import COUNTS, SKETCH, Block
from decant.schemas.disk.frames import Frame, Kind, unpack
from decant.schemas.signals import SketchSignal
from decant.schemas.targets.counts import Counts
from decant.schemas.targets.targets import Targets

_FIELD_OF = {Kind.COUNTS: COUNTS, Kind.SKETCH: SKETCH}

Companion = Counts | np.ndarray
"""What a record holds: `Counts`, or sketches float32 [n, r]."""
Decoded = TypeVar("Decoded")


def encode_counts(
    counts: Counts, *, row_key: bytes, head: Targets, tables: Tables, vocabulary: int
) -> bytes:
    """The record of one row's counts. `head` is what the row's logits record decodes to.

    ValueError as `counts_field.encode`.
    """
    if not len(counts):
        return Frame(Kind.COUNTS, row_key, 0, ()).pack()
    block = counts_field.encode(counts, head=head, tables=tables, vocabulary=vocabulary)
    return Frame(Kind.COUNTS, row_key, len(counts), (block,)).pack()


def encode_sketch(
    sketch: Float[np.ndarray, "n r"],
    *,
    row_key: bytes,
    signal: SketchSignal,
    deviations: Float[np.ndarray, " r"],
    tables: Tables,
) -> bytes:
    """The record of one row's sketch. ValueError for a number that is not finite."""
    if not len(sketch):
        return Frame(Kind.SKETCH, row_key, 0, ()).pack()
    if not np.isfinite(sketch).all():
        raise ValueError("a number of a sketch is not finite; a row with NaN must not be encoded")
    block = sketch_field.encode(
        sketch,
        deviations=deviations,
        step=signal.step,
        dither=signal.dither,
        row_key=row_key,
        tables=tables,
    )
    return Frame(Kind.SKETCH, row_key, len(sketch), (block,)).pack()


def cut_sketch(
    record: "CompanionRecord",
    kept: Bool[np.ndarray, " n"],
    *,
    row_key: bytes,
    signal: SketchSignal,
    deviations: Float[np.ndarray, " r"],
    tables: Tables,
) -> bytes:
    """The record of the positions `kept` alone; their numbers decode to the same bits as before.

    `row_key` is the row's new key. ValueError as `decode_sketch`.
    """
    if not kept.any():
        return Frame(Kind.SKETCH, row_key, 0, ()).pack()
    block = sketch_field.cut(
        record.blocks[0],
        kept,
        deviations=deviations,
        step=signal.step,
        dither=signal.dither,
        row_key=record.row_key,
        tables=tables,
    )
    return Frame(Kind.SKETCH, row_key, int(kept.sum()), (block,)).pack()


@dataclass(frozen=True, eq=False)
class CompanionRecord:
    """A record with its block still encoded. `where` is its name in errors."""

    where: str
    row_key: bytes
    positions: int
    blocks: tuple[Block, ...]
    """One block, none without positions."""


def open_companion(data: bytes, *, kind: Kind, where: str, scored: int) -> CompanionRecord:
    """The record in `data`, its block not yet decoded.

    `scored` is the number of positions that the row's logits record scores. ValueError that begins
    with `where` if the record is truncated, altered, newer than this release, or of another number
    of positions.
    """
    frame = unpack(data, kind=kind, where=where)
    if frame.positions not in (0, scored):
        raise ValueError(
            f"{where}: {frame.positions} positions, but the row's logits record has {scored}"
        )
    fields = [block.field for block in frame.blocks]
    expected = [_FIELD_OF[kind]] if frame.positions else []
    if fields != expected:
        raise ValueError(f"{where}: the record holds fields {fields}; expected {expected}")
    return CompanionRecord(where, frame.row_key, frame.positions, frame.blocks)


def decode_counts(
    records: Sequence[CompanionRecord],
    *,
    draws: int,
    head: Targets,
    tables: Tables,
    vocabulary: int,
) -> Counts:
    """The counts of all positions of `records`, record after record; each has positions.

    `head` holds the decoded targets of the same positions. ValueError that begins with the name of
    a record that is damaged or newer than this release.
    """
    ends = np.cumsum([record.positions for record in records])

    def decode(some: slice) -> Counts:
        first = int(ends[some.start] - records[some.start].positions)
        return counts_field.decode(
            [record.blocks[0] for record in records[some]],
            positions=[record.positions for record in records[some]],
            draws=draws,
            head=head[first : int(ends[some.stop - 1])],
            tables=tables,
            vocabulary=vocabulary,
        )

    return _naming(records, decode)


def decode_sketch(
    records: Sequence[CompanionRecord],
    *,
    signal: SketchSignal,
    deviations: Float[np.ndarray, " r"],
    tables: Tables,
    length: int,
) -> Float[np.ndarray, "total r"]:
    """The sketches of all positions of `records`, record after record; each has positions.

    `length` is the number of positions of a row. ValueError as `decode_counts`.
    """

    def decode(some: slice) -> np.ndarray:
        return sketch_field.decode(
            [record.blocks[0] for record in records[some]],
            positions=[record.positions for record in records[some]],
            rank=signal.rank,
            deviations=deviations,
            step=signal.step,
            dither=signal.dither,
            row_keys=[record.row_key for record in records[some]],
            tables=tables,
            length=length,
        )

    return _naming(records, decode)


def _naming(records: Sequence[CompanionRecord], decode: Callable[[slice], Decoded]) -> Decoded:
    """`decode` of all records. If that fails, each alone, so that the faulty record is named."""
    try:
        return decode(slice(0, len(records)))
    except ValueError:
        for number, record in enumerate(records):
            try:
                decode(slice(number, number + 1))
            except ValueError as error:
                raise ValueError(f"{record.where}: {error}") from error
        raise
