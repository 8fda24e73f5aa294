"""What a report says of a run: its settings, curves, judgement and costs, read from its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from decant.trainer.results.evaluate import read_evaluation
from decant.trainer.run.binding import read_run_settings
from decant.trainer.run.data_facts import read_data_facts
from decant.trainer.run.metrics_log import read_metrics

ABSENT = "–"
"""Stands for what is not there."""


@dataclass(frozen=True)
class RunSummary:
    """One run."""

    path: Path
    name: str
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    judgement: dict[str, Any] | None
    """What `evaluate` last found."""
    caches: list[dict[str, Any]]

    @cached_property
    def updates(self) -> list[dict[str, Any]]:
        """Lines of training."""
        return [line for line in self.lines if "loss" in line]

    @cached_property
    def looks(self) -> list[dict[str, Any]]:
        """Lines of judging."""
        return [line for line in self.lines if "heldout_ce" in line]

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Training time by step, judging and saving left out; empty for runs before 0.5."""
        elapsed, before, found = 0.0, 0, {0: 0.0}
        for line in self.updates:
            if "step_seconds" not in line:
                return {}
            elapsed += line["step_seconds"] * (line["step"] - before)
            before = line["step"]
            found[before] = elapsed
        return found if self.updates else {}

    @property
    def kind(self) -> str:
        """What it learned from, in a few words."""
        alpha, temperature = self.settings["loss.alpha"], self.settings["loss.temperature"]
        kind = "hard labels" if alpha == 0 else f"α = {alpha:g}, T = {temperature:g}"
        if alpha:
            kind += f", {self.settings['loss.tail']}"
        for term, name in (("hidden", "hidden states"), ("attention", "attention maps")):
            if f"loss.{term}[0].weight" in self.settings:
                kind += f", {name}"
        return kind

    @property
    def microseconds_per_token(self) -> float | None:
        """Of a usual update, by its counted tokens."""
        each = [
            x["step_seconds"] / max(x["tokens"], 1) for x in self.updates if "step_seconds" in x
        ]
        return 1e6 * float(np.median(each)) if each else None

    @property
    def bytes_per_token(self) -> float | None:
        """That an update reads of the caches, by counted tokens; their mean if there are more."""
        sums = [sum(cache["bytes_per_token"].values()) for cache in self.caches]
        return float(np.mean(sums)) if sums else None

    def measure(self, name: str) -> Any:
        """`heldout_…` of the judgement if it is of the run's end, else of the last look."""
        last = self.looks[-1] if self.looks else {}
        if self.judgement and self.judgement["step"] >= last.get("step", 0):
            last = {**last, **self.judgement}
        return last.get(name)


def read_run_summaries(paths: Sequence[Path]) -> list[RunSummary]:
    """The runs, by names that tell them apart. FileNotFoundError for a directory without one."""
    names = _names(paths)
    return [
        RunSummary(
            path,
            name,
            # read_metrics first: it says what is wrong with a directory that is no run's.
            lines=read_metrics(path),
            settings=read_run_settings(path),
            judgement=read_evaluation(path),
            caches=read_data_facts(path),
        )
        for path, name in zip(paths, names, strict=True)
    ]


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, with each one's; None where there is none."""
    keys = sorted({key for run in runs for key in run.settings})
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: found for key, found in values.items() if any(x != found[0] for x in found)}


def _names(paths: Sequence[Path]) -> list[str]:
    """As many last parts of each path as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    longest = max(map(len, parts), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(some[-count:]) for some in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]
