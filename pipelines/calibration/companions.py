"""Counts and sketches, before capture: their codec tables and basis are found and written."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decant.pipelines.calibration.known import KnownBasis
from decant.pipelines.calibration.signal_specs import AddedSignal, settings
from decant.pipelines.calibration.sketch_basis import (
    SketchSums,
    StateMoments,
    find_basis,
    least_lost_variance,
    lost_variance,
)
from decant.schemas.codecs import counts_field
from decant.schemas.codecs.sketch_field import step_size
from decant.schemas.disk.identity import signal_id
from decant.schemas.disk.layout import COUNTS, SKETCH
from decant.schemas.manifest.statistics import save_statistics, share_statistics, table_arrays
from decant.schemas.signals import CountsSignal, SketchSignal
from decant.schemas.targets.counts import Counts, count_draws
from decant.schemas.targets.sketch import (
    BIAS,
    DEVIATIONS,
    HEAD,
    MEAN,
    OFFSETS,
    PROJECTION,
    SketchBasis,
)
from decant.schemas.targets.targets import Targets, join_targets

POSITIONS_A_NUMBER = 8
"""Calibration positions that each number of a sketch needs. On SmolLM2 128 numbers found on 1,024
positions lower the tail's KL on other texts by a quarter, compared with 64; with fewer positions a
number it has not been measured. The basis improves up to 100 positions a number."""
_DRIFT = 1.5
"""A new part keeps the basis of the cache unless that loses this many times the variance that a
basis of its own would lose on its sample. The tail's KL grows in proportion."""


def freeze_counts(
    signal: CountsSignal,
    counts: Sequence[Counts],
    heads: Sequence[Targets],
    *,
    part: Path,
    rows_id: str,
    vocabulary: int,
) -> tuple[CountsSignal, dict[str, str]]:
    """Write the codec's tables; the signal with its signal_id, and the sha256 of each file.

    `counts` are those of the sample's rows, `heads` what their logits records decode to.
    """
    drawn = [np.repeat(of_row.ids.ravel(), of_row.counts.ravel()) for of_row in counts]
    joined = count_draws(np.concatenate(drawn).reshape(-1, signal.draws))
    tables = counts_field.fit(joined, head=join_targets(heads), vocabulary=vocabulary)
    digests = save_statistics(part, table_arrays(tables, signal=COUNTS))
    return _with_id(signal, rows_id=rows_id, digests=digests), digests


def freeze_sketch(
    signal: SketchSignal,
    sums: SketchSums,
    *,
    k: int,
    known: KnownBasis | None,
    part: Path,
    rows_id: str,
) -> tuple[SketchSignal, dict[str, str]]:
    """Write the basis and its offsets; the signal with its signal_id, and the sha256 of each file.

    The basis is the `known` one, whose files the part shares, unless the sample has drifted from
    it. `k` is that of the stored heads.
    """
    moments = sums.moments()
    full = signal.rank == signal.teacher_width
    # No basis is better than a full one: it is exact wherever the states are.
    if known and (full or not _drifted(known, moments)):
        signal = dataclasses.replace(signal, **_of_basis(known.signal))
        share_statistics(part, known.part, known.sha256)
        digests = dict(known.sha256)
    else:
        asked = signal.rank if known is None else known.signal.asked_rank or known.signal.rank
        signal, basis = _find_basis(signal, sums, moments, k=k, asked=None if full else asked)
        digests = save_statistics(part, _arrays(basis, full=full))
    return _with_id(signal, rows_id=rows_id, digests=digests), digests


def _find_basis(
    signal: SketchSignal,
    sums: SketchSums,
    moments: StateMoments,
    *,
    k: int,
    asked: int | None,
) -> tuple[SketchSignal, SketchBasis]:
    """A basis of the sample's own, of the rank `asked` if its positions allow it; None: a full one.

    The signal describes it.
    """
    rank = None if asked is None else min(asked, most_numbers(moments.positions))
    basis, share = find_basis(sums, moments, rank=rank)
    found = len(basis.deviations)
    described = dataclasses.replace(
        signal,
        rank=found,
        softcap=sums.softcap,
        variance_kept=share,
        asked_rank=None if asked in (None, found) else asked,
    )
    if rank is not None:  # A full one is exact: there is nothing to make up for.
        step = step_size(basis.deviations, signal.step) if signal.step else 0.0
        basis = sums.with_offsets(basis, k=k, step=step, dither=signal.dither)
    return described, basis


def _arrays(basis: SketchBasis, *, full: bool) -> dict[str, np.ndarray]:
    head = basis.head
    arrays = {
        MEAN: basis.mean,
        PROJECTION: basis.projection,
        HEAD: head.head.astype(np.float32 if full else np.float16),
        BIAS: head.bias,
        DEVIATIONS: basis.deviations,
    }
    return arrays if head.offsets is None else {**arrays, OFFSETS: head.offsets}


def most_numbers(positions: int) -> int:
    """The highest rank that a calibration sample of so many positions allows."""
    return max(1, positions // POSITIONS_A_NUMBER)


def fewer_numbers(signals: Mapping[str, AddedSignal], positions: int) -> str:
    """A line on a sketch that gets fewer numbers than it is to have, if the calibration sample has
    `positions`; else empty."""
    sketch = signals.get(SKETCH)
    if not isinstance(sketch, SketchSignal) or sketch.rank == sketch.teacher_width:
        return ""
    most = most_numbers(positions)
    if most >= sketch.rank:
        return ""
    return (
        f"{SKETCH}: about {most} numbers a position in place of {sketch.rank}, which need "
        f"{sketch.rank * POSITIONS_A_NUMBER:,} calibration positions; the sample will have about "
        f"{positions:,}. A larger corpus gives more"
    )


def _of_basis(signal: SketchSignal) -> dict[str, Any]:
    names = ("rank", "softcap", "variance_kept", "asked_rank")
    return {name: getattr(signal, name) for name in names}


def _drifted(known: KnownBasis, moments: StateMoments) -> bool:
    """Whether the sample, if it is large enough to tell, needs another basis than the known one."""
    rank = known.signal.rank
    if moments.positions < rank * POSITIONS_A_NUMBER:
        return False
    basis = known.load()
    lost = lost_variance(moments, basis.mean, basis.projection)
    return lost > _DRIFT * least_lost_variance(moments, rank=rank)


def _with_id(signal: Any, *, rows_id: str, digests: Mapping[str, str]) -> Any:
    identity = signal_id(
        rows=rows_id,
        teacher=signal.teacher_id,
        settings=settings(signal),
        statistics=dict(digests),
    )
    return dataclasses.replace(signal, signal_id=identity)
