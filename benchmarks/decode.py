"""Time to decode a record's targets, all or what a student reads, against `compact` with 64 ids.

    python -m benchmarks.decode CACHE [--rows 48] [--rounds 5]

CACHE holds counts and a sketch. The ids of `compact` are the 64 most probable that its head and
sketch give, of four rows. Times are processor time of this process per position, of records in
memory, in groups of 16 rows; all are measured in turns.
"""

import argparse
import time
from collections.abc import Callable, Collection

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.codecs import ROWS_AT_A_TIME
from decant.schemas import Cache, open_cache
from decant.schemas.codecs import DRAWS, LABELS, fit
from decant.schemas.disk.layout import COUNTS, LOGITS, SKETCH
from decant.schemas.reading.record_signals import COMPANIONS, RecordSignals
from decant.schemas.records.companion import open_companion
from decant.schemas.records.logits import (
    decode_logits,
    encode_logits,
    group_for_decoding,
    open_logits,
)
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.sketch import tail_logprobs
from decant.schemas.targets.targets import BETAS, Targets, join_targets
from decant.trainer.run.freed_memory import keep_freed_memory

_K = 64
_WIDENED = 4
"""Rows of `compact`; making one takes seconds."""

Decode = Callable[[slice], tuple[int, float]]
"""Decodes these of the rows; returns their positions, and the seconds that count."""


def main():
    options = _arguments()
    keep_freed_memory()  # as `decant train` does
    cache = open_cache(options.cache)
    rows = cache.rows()[: options.rows].tolist()
    compact = f"compact, k = {_K}"
    subjects: dict[str, Decode] = {
        "everything": _decode(cache, rows, labels=True, names=(COUNTS, SKETCH)),
        "a student at T = 1: head, counts": _decode(cache, rows, names=(COUNTS,)),
        "a student at T = 4: head, sketch": _decode(cache, rows, names=(SKETCH,)),
        "the head": _decode(cache, rows),
        "counts, beside a decoded head": _decode(cache, rows, names=(COUNTS,), head=False),
        "sketch": _decode(cache, rows, names=(SKETCH,), head=False),
        compact: _decode_compact(cache, rows),
    }
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(1 + options.rounds):
        for at in range(0, len(rows), ROWS_AT_A_TIME):
            for name, decode in subjects.items():
                positions, seconds = decode(slice(at, at + ROWS_AT_A_TIME))
                times[name].append(seconds / positions * 1e6)
    first = -(-len(rows) // ROWS_AT_A_TIME)  # the first round warms up
    taken = {name: np.array(each[first:]) for name, each in times.items()}
    table = Table("what is decoded", "µs a position", f"speed ÷ speed of {compact}, in turns")
    for name, each in taken.items():
        ratio = np.median(taken[compact] / each)
        table.add_row(name, f"{np.median(each):.2f}", f"{ratio:.2f}")
    Console().print(table)


def _decode(
    cache: Cache,
    rows: list[int],
    *,
    labels: bool = False,
    names: Collection[str] = (),
    head: bool = True,
) -> Decode:
    """Decodes the rows' stored records: `labels`, and of counts and sketch the `names`.

    Counts need a decoded head; without `head` its time does not count.
    """
    manifest = cache.manifest
    (part,) = manifest.parts
    reader = RecordSignals(cache.path, manifest)
    at = np.searchsorted(cache._first_row, rows, side="right") - 1
    offsets = np.array(rows) - cache._first_row[at]
    stored = {name: cache._records(name, at, offsets) for name in (LOGITS, *names)}
    shape = {"tables": reader.tables(part, LOGITS), "vocabulary": manifest.vocabulary_size}
    left_out = () if labels else (DRAWS, LABELS)

    def decode(some: slice) -> tuple[int, float]:
        start, seconds = time.process_time(), 0.0
        opened = [
            open_logits(data, where="", length=manifest.sequence_length, spec=part.logits).without(
                left_out
            )
            for data, _ in stored[LOGITS][some]
        ]
        for group in group_for_decoding(opened):
            targets = decode_logits([opened[i] for i in group], **shape)
            seconds += head * (time.process_time() - start)
            start = time.process_time()
            for name in names:
                records = [stored[name][some][i][0] for i in group]
                scored = [opened[i].positions for i in group]
                own = [
                    open_companion(data, kind=COMPANIONS[name], where="", scored=n)
                    for data, n in zip(records, scored, strict=True)
                ]
                reader.decode(name, part, own, head=targets)
            seconds += time.process_time() - start
            start = time.process_time()
        return sum(record.positions for record in opened), seconds

    return decode


def _decode_compact(cache: Cache, rows: list[int]) -> Decode:
    """Encodes rows as `compact`, as many as `rows`, and decodes these of them."""
    size, length = cache.manifest.vocabulary_size, cache.manifest.sequence_length
    read = [_widened(cache, row) for row in rows[:: -(-len(rows) // _WIDENED)]]
    tables = fit("compact", join_targets([targets for targets, _ in read]), vocabulary=size)
    shape = {"tables": tables, "vocabulary": size}
    records = [
        encode_logits(targets, row_key=bytes(16), scored=scored, profile="compact", **shape)
        for targets, scored in read
    ]
    records = [records[i % len(records)] for i in range(len(rows))]

    def decode(some: slice) -> tuple[int, float]:
        start = time.process_time()
        spec = TargetSpec(_K)
        opened = [open_logits(r, where="", length=length, spec=spec) for r in records[some]]
        for group in group_for_decoding(opened):
            decode_logits([opened[i] for i in group], **shape)
        seconds = time.process_time() - start
        return sum(record.positions for record in opened), seconds

    return decode


def _widened(cache: Cache, row: int) -> tuple[Targets, np.ndarray]:
    """The targets of a row with 64 ids, and the mask of its scored positions."""
    batch = cache.read([row])
    scored = batch["loss_mask"][0]
    names = ("topk_ids", "topk_logprobs", "tail_logmass")
    stored = {name: batch[name][0][scored] for name in names}
    logprobs = tail_logprobs(cache.sketch_head(), batch["sketch"][0][scored], **stored)
    ids = np.argpartition(-logprobs, _K, axis=1)[:, :_K]
    order = np.argsort(-np.take_along_axis(logprobs, ids, 1), axis=1)
    ids = np.take_along_axis(ids, order, 1)
    of_head = np.take_along_axis(logprobs, ids, 1)
    np.put_along_axis(logprobs, ids, -np.inf, 1)
    masses = [np.full(len(ids), np.log(logprobs.shape[1] - _K))]
    masses += [np.log(np.exp(beta * logprobs).sum(1)) for beta in BETAS[1:]]
    return Targets(
        ids.astype(np.int32), of_head.astype(np.float32), np.stack(masses, 1).astype(np.float32)
    ), scored


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
