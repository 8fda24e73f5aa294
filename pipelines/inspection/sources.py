"""Documents, rows and positions of each corpus file of a cache."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from decant.pipelines.inspection.sampling import Sample, sample_rows
from decant.schemas import Cache
from decant.schemas.records.rows import PADDING

_POSITIONS = 1 << 22
"""Positions of the rows that are read to count documents; only tokens are decoded."""
_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class SourceCounts:
    """What the counted rows hold of one corpus file."""

    name: str
    documents: int
    rows: int
    positions: int


def count_sources(cache: Cache) -> tuple[list[SourceCounts], Sample]:
    """The counts of every source, most positions first, and the rows that were counted.

    In a large cache these are a sample, and a source without a row in it has zeros.
    """
    sample = sample_rows(cache, positions=_POSITIONS)
    documents, rows = defaultdict[str, set[int]](set), Counter[str]()
    positions = Counter[str]()
    step = max(1, _AT_ONCE // cache.manifest.sequence_length)
    for start in range(0, len(sample.rows), step):
        numbers = sample.rows[start : start + step]
        segments = cache.read(numbers, signals=())["segment_ids"]
        for number, ids in zip(numbers.tolist(), segments, strict=True):
            lengths = np.bincount(ids[ids != PADDING])
            origins = cache.origins(number)
            for (name, document, _), length in zip(
                origins, lengths[lengths > 0].tolist(), strict=True
            ):
                documents[name].add(document)
                positions[name] += length
            rows.update({name for name, *_ in origins})
    names = {source.name for part in cache.manifest.parts for source in part.sources}
    counts = [SourceCounts(n, len(documents[n]), rows[n], positions[n]) for n in names]
    return sorted(counts, key=lambda one: (-one.positions, one.name)), sample
