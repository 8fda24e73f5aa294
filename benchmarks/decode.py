"""Time to decode a head with counts and a sketch, against `compact` with 64 ids, in turns.

    python -m benchmarks.decode CACHE [--rows 48] [--rounds 5]

CACHE holds all three. The ids of `compact` are the 64 most probable that its head and sketch give.
Times are processor time of this process per position, of records in memory, in groups of 16 rows.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console

from benchmarks.codecs import ROWS_AT_A_TIME
from decant.schemas import Cache, open_cache
from decant.schemas.codecs import fit
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


def main():
    options = _arguments()
    keep_freed_memory()  # as `decant train` does
    cache = open_cache(options.cache)
    rows = cache.rows()[: options.rows].tolist()
    ours, theirs = _decode_all(cache, rows), _decode_compact(cache, rows)
    times: dict[str, list[float]] = {"head, counts, sketch": [], f"compact, k = {_K}": []}
    for _ in range(1 + options.rounds):
        for at in range(0, len(rows), ROWS_AT_A_TIME):
            for taken, decode in zip(times.values(), (ours, theirs), strict=True):
                start = time.process_time()
                positions = decode(slice(at, at + ROWS_AT_A_TIME))
                taken.append((time.process_time() - start) / positions * 1e6)
    first = -(-len(rows) // ROWS_AT_A_TIME)  # the first round warms up
    (own, of_own), (other, of_other) = ((n, np.array(t[first:])) for n, t in times.items())
    Console().print(
        f"{own}: {np.median(of_own):.2f} µs, {other}: {np.median(of_other):.2f} µs a position; "
        f"speed ÷ speed in turns: {np.median(of_other / of_own):.2f}"
    )


def _decode_all(cache: Cache, rows: list[int]) -> Callable[[slice], int]:
    """Decodes these of the rows' stored records, and returns their positions."""
    manifest = cache.manifest
    (part,) = manifest.parts
    reader = RecordSignals(cache.path, manifest)
    at = np.searchsorted(cache._first_row, rows, side="right") - 1
    offsets = np.array(rows) - cache._first_row[at]
    stored = {name: cache._records(name, at, offsets) for name in (LOGITS, COUNTS, SKETCH)}
    shape = {"tables": reader.tables(part, LOGITS), "vocabulary": manifest.vocabulary_size}

    def decode(some: slice) -> int:
        opened = [
            open_logits(data, where="", length=manifest.sequence_length, spec=part.logits)
            for data, _ in stored[LOGITS][some]
        ]
        for group in group_for_decoding(opened):
            head = decode_logits([opened[i] for i in group], **shape)
            for name, kind in COMPANIONS.items():
                records = [stored[name][some][i][0] for i in group]
                scored = [opened[i].positions for i in group]
                own = [
                    open_companion(data, kind=kind, where="", scored=n)
                    for data, n in zip(records, scored, strict=True)
                ]
                reader.decode(name, part, own, head=head)
        return sum(record.positions for record in opened)

    return decode


def _decode_compact(cache: Cache, rows: list[int]) -> Callable[[slice], int]:
    """Encodes the rows as `compact`; decodes these of them, and returns their positions."""
    size, length = cache.manifest.vocabulary_size, cache.manifest.sequence_length
    read = [_widened(cache, row) for row in rows]
    tables = fit("compact", join_targets([targets for targets, _ in read[::4]]), vocabulary=size)
    shape = {"tables": tables, "vocabulary": size}
    records = [
        encode_logits(targets, row_key=bytes(16), scored=scored, profile="compact", **shape)
        for targets, scored in read
    ]

    def decode(some: slice) -> int:
        spec = TargetSpec(_K)
        opened = [open_logits(r, where="", length=length, spec=spec) for r in records[some]]
        for group in group_for_decoding(opened):
            decode_logits([opened[i] for i in group], **shape)
        return sum(record.positions for record in opened)

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
