"""The calibration sample: the teacher reads it once for all that the added signals need of it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from decant.pipelines.calibration.companions import freeze_counts, freeze_sketch
from decant.pipelines.calibration.directions import KnownDirections, Moments
from decant.pipelines.calibration.known import Known, KnownBasis
from decant.pipelines.calibration.signal_specs import AddedSignal, with_signal_id
from decant.pipelines.calibration.sketch_basis import SketchSums
from decant.pipelines.teacher.loaded import Observer, loaded_teacher
from decant.pipelines.teacher.outputs import OutputSpec, RowOutput
from decant.pipelines.teacher.rows_done import rows_done
from decant.schemas.manifest.manifest import Unit
from decant.schemas.manifest.plan import PlannedRows, PlannedTeacher
from decant.schemas.manifest.statistics import save_statistics
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.rows import Row
from decant.schemas.signals import CountsSignal, HiddenSignal, SketchSignal
from decant.schemas.targets.counts import Counts
from decant.schemas.targets.targets import Targets

_MOST_TOKENS = 256 << 10
_ENOUGH_TOKENS = 16 << 10
"""A sketch's offsets need as many (docs/benchmarks.md)."""
_LEAST_TOKENS = 4096

Place = tuple[int, int]
"""(unit, offset) of a row."""


class Sample:
    """The sampled rows of a part, and the statistics of `signals` on them.

    `known` is what they reuse of older parts. `k` is that of the heads beside them.
    """

    def __init__(
        self,
        part: Path,
        rows: PlannedRows,
        signals: Mapping[str, AddedSignal],
        *,
        k: int,
        known: Known,
    ):
        self._part = part
        self._rows = rows
        self._signals = signals
        self._known = known
        self._k = k
        self._moments = Moments(_layers_to_project(signals, known))
        sketched = any(isinstance(signal, SketchSignal) for signal in signals.values())
        self._sketch = SketchSums() if sketched else None
        self._counts: dict[Place, Counts] = {}
        self.draws = sum(s.draws for s in signals.values() if isinstance(s, CountsSignal))
        """N of the counts, 0 if they are not among the signals."""

    @property
    def needs_teacher(self) -> bool:
        """Whether a signal has statistics that are to be found."""
        return bool(self._moments.layers or self._sketch or self.draws)

    def run(
        self, planned: PlannedTeacher, spec: OutputSpec, *, observers: Sequence[Observer] = ()
    ) -> dict[Place, tuple[Row, RowOutput]]:
        """Run the teacher; each row with its outputs, of `spec` and of the signals' own needs.

        Rows with NaN are left out.
        """
        places = sample_places(self._rows, length=planned.sequence_length)
        rows = read_rows(self._part, self._rows.units, places, length=planned.sequence_length)
        own = [self._moments, *([self._sketch] if self._sketch else [])]
        asked, read = dataclasses.replace(spec, counts=self.draws), {}
        with loaded_teacher(planned).run(rows, asked, observers=[*observers, *own]) as outputs:
            for place, row, output in zip(places, rows, outputs, strict=True):
                if output.finite:
                    read[place] = row, output
                    if output.counts is not None:
                        self._counts[place] = output.counts
                rows_done.add(1)
        return read

    def freeze(
        self, head_at: Callable[[Place], Targets], *, vocabulary: int
    ) -> tuple[dict[str, AddedSignal], dict[str, str]]:
        """Write the statistics of the signals.

        `head_at` gives what the logits record of a row decodes to. Returns the signals with their
        signal_id, and the sha256 of each file. ValueError if the sample has too few tokens to find
        a signal's directions.
        """
        rows_id = self._rows.rows_id
        signals: dict[str, AddedSignal] = {}
        written: dict[str, str] = {}
        for name, signal in self._signals.items():
            digests: dict[str, str] = {}
            if isinstance(signal, CountsSignal):
                heads = {place: head_at(place) for place in self._counts}
                # A row that was skipped when its logits were captured has no head.
                read = {at: head for at, head in heads.items() if len(head)}
                signals[name], digests = freeze_counts(
                    signal,
                    [self._counts[place] for place in read],
                    list(read.values()),
                    part=self._part,
                    rows_id=rows_id,
                    vocabulary=vocabulary,
                )
            elif isinstance(signal, SketchSignal):
                assert self._sketch
                known = self._known.get(name)
                assert known is None or isinstance(known, KnownBasis)
                signals[name], digests = freeze_sketch(
                    signal, self._sketch, k=self._k, known=known, part=self._part, rows_id=rows_id
                )
            elif isinstance(signal, HiddenSignal) and signal.width < signal.teacher_width:
                signals[name], digests = self._freeze_directions(name, signal)
            else:
                signals[name] = with_signal_id(signal, rows_id=rows_id)
            written |= digests
        return signals, written

    def _freeze_directions(
        self, name: str, signal: HiddenSignal
    ) -> tuple[AddedSignal, dict[str, str]]:
        known = self._known.get(name)
        if known is not None:
            assert isinstance(known, KnownDirections)
            known.share_with(self._part)
            file, sha256, share = known.file, known.sha256, known.variance_kept
        else:
            directions, share = _find_directions(signal, self._moments)
            arrays = {f"hidden-{signal.layer}-directions": directions}
            ((file, sha256),) = save_statistics(self._part, arrays).items()
        described = dataclasses.replace(signal, directions=file, variance_kept=share)
        return (
            with_signal_id(described, rows_id=self._rows.rows_id, directions=sha256),
            {file: sha256},
        )


def _find_directions(signal: HiddenSignal, moments: Moments) -> tuple[np.ndarray, float]:
    if moments.tokens <= signal.width:
        raise ValueError(
            f"signals.hidden.width is {signal.width}, but the calibration sample gave only "
            f"{moments.tokens} finite tokens to find as many directions in; choose fewer"
        )
    return moments.directions(signal.layer, width=signal.width)


def _layers_to_project(signals: Mapping[str, AddedSignal], known: Known) -> list[int]:
    """Hidden layers whose states are projected onto directions that are not known yet."""
    return [
        signal.layer
        for name, signal in signals.items()
        if isinstance(signal, HiddenSignal)
        and signal.width < signal.teacher_width
        and name not in known
    ]


def sample_places(rows: PlannedRows, *, length: int) -> tuple[Place, ...]:
    """(unit, offset) of the rows to calibrate on, as many as `sample_tokens`.

    The rows with the smallest keys: a pseudo-random choice that does not depend on the order of
    files or on parallelism. `length` is the number of tokens in a row.
    """
    wanted = sample_tokens(sum(unit.tokens for unit in rows.units))
    return ordered_places(rows)[: max(1, -(-wanted // length))]


def sample_tokens(tokens: int) -> int:
    """Tokens to calibrate on, of a corpus of so many.

    5% of it, 256k at most; of a small corpus up to a fifth, until that is enough; never under 4k.
    """
    of_small = max(_LEAST_TOKENS, min(tokens // 5, _ENOUGH_TOKENS))
    return min(max(tokens // 20, of_small), _MOST_TOKENS)


def ordered_places(rows: PlannedRows) -> tuple[Place, ...]:
    """(unit, offset) of the train rows with the smallest keys, in order of their keys.

    Of all rows if there are no train rows: a small new part may hold only held-out documents.
    """
    every = ((n, offset) for n, unit in enumerate(rows.units) for offset in range(unit.rows))
    return rows.sample or tuple(every)


def read_rows(
    part: Path, units: Sequence[Unit], places: Sequence[Place], *, length: int
) -> list[Row]:
    """The rows of `part` at `places`."""
    return [
        read_unit_rows(part, unit, units[unit], length=length, offsets=[offset])[0]
        for unit, offset in places
    ]
