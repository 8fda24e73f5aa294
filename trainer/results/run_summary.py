"""A run as the report shows it: settings, curves, evaluation and costs, read from its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from decant.trainer.results.evaluate import read_evaluation
from decant.trainer.results.judged_on import describe
from decant.trainer.run.binding import read_run_settings
from decant.trainer.run.data_facts import read_data_facts
from decant.trainer.run.metrics_log import FILE as METRICS
from decant.trainer.run.metrics_log import read_metrics

ABSENT = "–"
"""Text for a value that a run does not have."""


@dataclass(frozen=True)
class RunSummary:
    """One run's files, and what follows from them."""

    path: Path
    name: str
    """The shortest end of the path that no other run of the report has."""
    settings: dict[str, Any]
    """From `run.json`."""
    lines: list[dict[str, Any]]
    """From `metrics.jsonl`."""
    evaluation: dict[str, Any] | None
    """From `evaluation.json`; None if `evaluate` was never run."""
    caches: list[dict[str, Any]]
    """From `data.json`, one for each cache."""

    @cached_property
    def updates(self) -> list[dict[str, Any]]:
        """Lines of `metrics.jsonl` about updates."""
        return [line for line in self.lines if "loss" in line]

    @cached_property
    def heldout(self) -> list[dict[str, Any]]:
        """Lines of `metrics.jsonl` about held-out rows."""
        return [line for line in self.lines if "heldout_ce" in line]

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Seconds of training up to each step, without evaluations and checkpoints.

        Empty for a run of a release before 0.5, which logged no times.
        """
        elapsed, before, seconds = 0.0, 0, {0: 0.0}
        for line in self.updates:
            if "step_seconds" not in line:
                return {}
            elapsed += line["step_seconds"] * (line["step"] - before)
            before = line["step"]
            seconds[before] = elapsed
        return seconds if self.updates else {}

    @property
    def kind(self) -> str:
        """The run's loss in a few words: α, T, tail, further terms."""
        alpha, temperature = self.settings["loss.alpha"], self.settings["loss.temperature"]
        kind = "hard labels" if alpha == 0 else f"α = {alpha:g}, T = {temperature:g}"
        if alpha:
            kind += f", {self.settings['loss.tail'] or self.settings['loss.divergence']}"
        for term, name in (("hidden", "hidden states"), ("attention", "attention maps")):
            if f"loss.{term}[0].weight" in self.settings:
                kind += f", {name}"
        return kind

    @property
    def microseconds_per_token(self) -> float | None:
        """Median over updates of the time a counted token; None if no times were logged."""
        times = [
            x["step_seconds"] / max(x["tokens"], 1) for x in self.updates if "step_seconds" in x
        ]
        return 1e6 * float(np.median(times)) if times else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes that training reads a counted token, the mean over the caches; None if unknown."""
        sums = [sum(cache["bytes_per_token"].values()) for cache in self.caches]
        return float(np.mean(sums)) if sums else None

    def measure(self, name: str) -> Any:
        """The metric `heldout_…` at the run's end; None if it was not measured."""
        return self.judgement.get(name)

    @property
    def judgement(self) -> dict[str, Any]:
        """All metrics at the run's end, from `evaluate` if it was run, else from training."""
        return self._last_evaluation or self._last_heldout

    @property
    def judged_on(self) -> str | None:
        """What `measure` was measured on, in a few words; None if nothing was measured."""
        if self._last_evaluation:
            return describe(self._last_evaluation)
        return "while training" if self.heldout else None

    @property
    def judged_against(self) -> str | None:
        """teacher_id that `measure` compares with; None if no file of the run says it."""
        main = self.caches[0]["teacher_id"] if self.caches else None
        return (self._last_evaluation or {}).get("teacher_id", main)

    @property
    def _last_heldout(self) -> dict[str, Any]:
        return self.heldout[-1] if self.heldout else {}

    @property
    def _last_evaluation(self) -> dict[str, Any] | None:
        """The evaluation, unless the training loop measured a later step."""
        if self.evaluation and self.evaluation["step"] >= self._last_heldout.get("step", 0):
            return self.evaluation
        return None


def runs_in(path: Path) -> tuple[Path, ...]:
    """The run itself, or the runs of a sweep that have begun, in the order of their names.

    Raises FileNotFoundError for a directory that holds neither.
    """
    if (path / METRICS).exists() or not path.is_dir():
        return (path,)
    inside = tuple(sorted(file.parent for file in path.glob(f"*/{METRICS}")))
    if not inside:
        raise FileNotFoundError(
            f"{path}: neither it nor a directory in it holds {METRICS}; it is not the directory of "
            "a run, nor of a sweep that has begun"
        )
    return inside


def read_run_summaries(paths: Sequence[Path]) -> list[RunSummary]:
    """Summaries of runs, and of the runs of sweeps. Raises FileNotFoundError for a directory that
    holds neither."""
    paths = list(dict.fromkeys(run for path in paths for run in runs_in(path)))
    names = _names(paths)
    return [
        RunSummary(
            path,
            name,
            # First, because its error is the clearest for a directory that holds no run.
            lines=read_metrics(path),
            settings=read_run_settings(path),
            evaluation=read_evaluation(path),
            caches=read_data_facts(path),
        )
        for path, name in zip(paths, names, strict=True)
    ]


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Settings that differ between runs: name and each run's value, None for a missing one."""
    keys = sorted({key for run in runs for key in run.settings})
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: each for key, each in values.items() if any(x != each[0] for x in each)}


def _names(paths: Sequence[Path]) -> list[str]:
    """For each path the last parts that make all names differ."""
    parts = [path.resolve().parts for path in paths]
    longest = max(map(len, parts), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(path_parts[-count:]) for path_parts in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]
