"""A logits record: bitmap of scored positions, ids per position, and the encoded fields.

If positions store different numbers of ids, the fields of each size follow one another, smallest
size first; labels are one field of all positions.
"""

import dataclasses
import struct
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from decant.schemas import codecs
from decant.schemas.codecs import Profile, Tables, sizes_field
from decant.schemas.disk.frames import Block, Frame, Kind, unpack
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.sizes import shortened, sizes_for
from decant.schemas.targets.targets import Targets

_SCORED, _COUNTS = 16, 17  # field ids below 16 belong to codecs
_BITMAP = 0
_UNIFORM, _SIZES = 1, 2  # codecs of `_COUNTS`
_ENTRIES_AT_ONCE = 1 << 17


def encode_logits(
    targets: Targets,
    *,
    row_key: bytes,
    scored: np.ndarray,
    profile: Profile,
    tables: Tables,
    vocabulary: int,
    mass: float | None = None,
) -> bytes:
    """The record of one row. `scored` is bool [S]; `targets` has one entry per True in it.

    With `mass` a position stores as few of its ids as hold this share of its probability; targets
    that were read so keep the ids that they have. ValueError as `codecs.encode`.
    """
    assert len(targets) == scored.sum(), "one target for each scored position"
    if mass is not None and targets.sizes is None:
        targets = shortened(targets, sizes_for(targets.logprobs, mass=mass))
    shared = {"tables": tables, "vocabulary": vocabulary}
    blocks = [Block(_SCORED, _BITMAP, np.packbits(scored).tobytes())]
    if targets.sizes is None or not len(targets):
        blocks.append(Block(_COUNTS, _UNIFORM, struct.pack("<I", targets.k)))
        blocks += codecs.encode(profile, targets, **shared)
    else:
        blocks.append(Block(_COUNTS, _SIZES, sizes_field.encode(targets.sizes)))
        for piece in _pieces(targets):
            blocks += codecs.encode(profile, piece, **shared)
    return Frame(Kind.LOGITS, row_key, len(scored), tuple(blocks)).pack()


def _pieces(targets: Targets) -> Iterator[Targets]:
    """Targets of positions of one size each, without labels; then the labels without ids."""
    assert targets.sizes is not None
    for size in np.unique(targets.sizes).tolist():
        alike = targets[targets.sizes == size]
        yield Targets(
            np.ascontiguousarray(alike.ids[:, :size]),
            np.ascontiguousarray(alike.logprobs[:, :size]),
            alike.tail_logmass,
        )
    nothing = np.zeros((len(targets), 0), np.float32)
    labels = targets.label_logprobs
    yield Targets(nothing.astype(np.int32), nothing, nothing, label_logprobs=labels)


def field_bytes(data: bytes, *, where: str) -> dict[str, int]:
    """Bytes of a record by content: "top-k", "tail", "draws", "labels" and "framing"."""
    frame = unpack(data, kind=Kind.LOGITS, where=where)
    names = {
        codecs.TOPK: "top-k",
        codecs.TAIL: "tail",
        codecs.DRAWS: "draws",
        codecs.LABELS: "labels",
    }
    sizes: Counter[str] = Counter()
    for block in frame.blocks:
        if block.field in names:
            sizes[names[block.field]] += len(block.payload)
    return {**sizes, "framing": len(data) - sum(sizes.values())}


@dataclass(frozen=True, eq=False)
class LogitsRecord:
    """A record with its fields still encoded. `where` is its name in errors."""

    where: str
    row_key: bytes
    scored: np.ndarray
    """bool [S]"""
    k: int
    """Ids of a position, at most if `sizes` are given."""
    fields: tuple[Block, ...]
    sizes: np.ndarray | None = None
    """Ids of each scored position, if they may differ."""

    @property
    def positions(self) -> int:
        """Number of scored positions."""
        return int(np.count_nonzero(self.scored))

    def without(self, fields: Collection[int]) -> "LogitsRecord":
        """The record without the codecs' `fields`, of draws or labels, which are not decoded."""
        kept = tuple(block for block in self.fields if block.field not in fields)
        return dataclasses.replace(self, fields=kept)


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
    k, sizes = _sizes(frame.block(_COUNTS, where=where), scored, where=where)
    if scored.any() and (sizes is None) != (spec.mass is None):
        raise ValueError(
            f"{where}: its positions store {'equal' if sizes is None else 'different'} numbers of "
            f"ids, but the manifest says {'equal' if spec.mass is None else 'different'} ones"
        )
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
    # Of adaptive heads all records decode to arrays of one width.
    k = k if sizes is None else spec.k
    return LogitsRecord(where, frame.row_key, scored, k, fields, sizes)


def _sizes(block: Block, scored: np.ndarray, *, where: str) -> tuple[int, np.ndarray | None]:
    """The most ids of a position, and the number of each if they may differ."""
    if block.codec == _UNIFORM and len(block.payload) == 4:
        return struct.unpack("<I", block.payload)[0], None
    if block.codec != _SIZES:
        raise ValueError(f"{where}: counts use codec {block.codec}, which this release lacks")
    try:
        sizes = sizes_field.decode(block.payload, positions=int(np.count_nonzero(scored)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return int(sizes.max(initial=0)), sizes


def group_for_decoding(records: Sequence[LogitsRecord]) -> Iterator[list[int]]:
    """Groups of records to decode together, as indices. Records without targets are left out.

    A group has one `codecs.group_key`, and few enough records for their arrays to stay in the
    processor's cache.
    """
    by_key = defaultdict(list)
    for number, record in enumerate(records):
        if record.positions:
            if record.sizes is None:
                by_key[record.k, codecs.group_key(record.fields)].append(number)
            else:  # grouped size by size in `_decode_sizes`
                by_key[None, len(record.fields) % 2].append(number)
    for numbers in by_key.values():
        k = max(1, *(records[number].k for number in numbers))
        at_once = max(1, _ENTRIES_AT_ONCE // (k * len(records[0].scored)))
        for first in range(0, len(numbers), at_once):
            yield numbers[first : first + at_once]


def decode_logits(
    records: Sequence[LogitsRecord], *, tables: Tables, vocabulary: int, normalised: bool = True
) -> Targets:
    """The targets of all scored positions of one group of records, record after record.

    Without `normalised`, `encode_logits` stores the same levels again. ValueError that begins with
    the name of a record that is damaged or newer than this release, or whose targets are no
    distributions.
    """
    try:
        if records[0].sizes is not None:
            return _decode_sizes(
                records, tables=tables, vocabulary=vocabulary, normalised=normalised
            )
        return codecs.decode(
            [record.fields for record in records],
            positions=[record.positions for record in records],
            k=records[0].k,
            vocabulary=vocabulary,
            tables=tables,
            normalised=normalised,
        )
    except ValueError as error:
        if len(records) == 1:
            raise ValueError(f"{records[0].where}: {error}") from error
        for record in records:  # decoded alone, the faulty record fails and is named
            decode_logits([record], tables=tables, vocabulary=vocabulary)
        raise


def _decode_sizes(
    records: Sequence[LogitsRecord], *, tables: Tables, vocabulary: int, normalised: bool
) -> Targets:
    """`decode_logits` of records whose positions store different numbers of ids."""
    shared = {"tables": tables, "vocabulary": vocabulary, "normalised": normalised}
    positions = [record.positions for record in records]
    sizes = np.concatenate([record.sizes for record in records if record.sizes is not None])
    labels = None
    if len(records[0].fields) % 2:
        blocks = [[record.fields[-1]] for record in records]
        labels = codecs.decode(blocks, positions=positions, k=0, **shared).label_logprobs
    pieces = defaultdict(list)
    for record, start in zip(records, np.cumsum([0, *positions[:-1]]).tolist(), strict=True):
        for size, places, blocks in _pieces_of(record):
            pieces[size, codecs.group_key(blocks)].append((places + start, blocks))
    out: Targets | None = None
    for (size, _), some in pieces.items():
        places, blocks = zip(*some, strict=True)
        part = codecs.decode(blocks, positions=[len(at) for at in places], k=size, **shared)
        if out is None:
            nodes = part.tail_logmass.shape[1]
            out = _room(sizes, labels, k=records[0].k, nodes=nodes)
        at = np.concatenate(places)
        out.ids[at, :size], out.logprobs[at, :size] = part.ids, part.logprobs
        out.tail_logmass[at] = part.tail_logmass
    assert out is not None, "group_for_decoding leaves out records without targets"
    return out


def _pieces_of(record: LogitsRecord) -> Iterator[tuple[int, np.ndarray, tuple[Block, ...]]]:
    """(size, which scored positions, blocks) of each size. ValueError for blocks of other sizes."""
    assert record.sizes is not None
    present = np.unique(record.sizes).tolist()
    if len(record.fields) // 2 != len(present):
        raise ValueError(f"{len(record.fields)} fields of heads of {len(present)} sizes")
    for number, size in enumerate(present):
        blocks = record.fields[2 * number : 2 * number + 2]
        yield size, np.flatnonzero(record.sizes == size), blocks


def _room(sizes: np.ndarray, labels: np.ndarray | None, *, k: int, nodes: int) -> Targets:
    """Targets without ids, to be filled."""
    n = len(sizes)
    return Targets(
        ids=np.zeros((n, k), np.int32),
        logprobs=np.full((n, k), -np.inf, np.float32),
        tail_logmass=np.empty((n, nodes), np.float32),
        label_logprobs=labels,
        sizes=sizes,
    )
