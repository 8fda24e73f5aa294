"""Charts of a sweep: a setting against the headline KL, one chart for each setting that varies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from decant.foreign import plain
from decant.trainer.judging.headline import Estimate
from decant.trainer.results.run_summary import differences
from decant.trainer.results.seed_groups import SEED, Group

MOST = 4
"""Most settings that get a chart."""
LEAST_GROUPS = 3
"""With fewer groups a chart would show a line through two points."""
_WIDE = 8
"""A positive setting whose highest value is this many times its lowest gets a log axis."""
_APART = 0.15
"""Least distance of ticks at the values, as a share of the axis: their labels take so much."""
_DERIVED = ("steps", "code")
"""Settings that others decide, or that are no choice."""

Points = list[tuple[Any, Group, list[float]]]
"""The setting's value, the group, and the KL of each run."""


def setting_charts(
    groups: Sequence[Group], kl: Estimate, colour: Callable[[int], str]
) -> dict[str, Callable[[Any], None]]:
    """The charts by the setting's name. Settings that take one value, or lists, have none."""
    judged = [group for group in groups if group.values(lambda run: run.measure(kl.metric))]
    if len(judged) < LEAST_GROUPS:
        return {}
    varied = {
        name: values
        for name, values in differences([group.runs[0] for group in judged]).items()
        if name not in (SEED, *_DERIVED) and not _is_hash(values)
    }
    shown = [name for name, values in varied.items() if _is_drawn(values)][:MOST]
    return {name: _against(name, judged, kl, colour, varied) for name in shown}


def _is_drawn(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float | str | None) for value in values)


def _is_hash(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) and len(value) == 64 for value in values)


def _against(
    name: str,
    groups: Sequence[Group],
    kl: Estimate,
    colour: Callable[[int], str],
    varied: Mapping[str, Any],
) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        at, names = _places([group.runs[0].settings.get(name) for group in groups])
        lines: dict[str, list[tuple[float, float]]] = {}
        for x, group in zip(at, groups, strict=True):
            y = group.values(lambda run: run.measure(kl.metric))
            axis.plot([x] * len(y), y, "o", ms=4, alpha=0.5, color=colour(group.number))
            axis.plot(x, np.mean(y), "o", ms=7, color=colour(group.number))
            others = [group.runs[0].settings.get(key) for key in varied if key != name]
            lines.setdefault(json.dumps(others), []).append((x, float(np.mean(y))))
        for line in lines.values():  # Groups that agree in all other settings.
            axis.plot(*zip(*sorted(line), strict=True), color="#999999", lw=1, zorder=1)
        if names is None:
            _scale(axis, sorted(set(at)))
        else:
            texts = [text[:24].replace("$", r"\$") for text in names]
            axis.set_xticks(range(len(texts)), texts, rotation=20, ha="right", fontsize=8)
            axis.margins(x=0.15)
        axis.set_title(f"{kl.title} by {plain(name)}".replace("$", r"\$"), loc="left")
        axis.set_xlabel(plain(name).replace("$", r"\$"))

    return draw


def _places(values: Sequence[Any]) -> tuple[list[float], list[str] | None]:
    """Where each value is on the axis; the names of the places unless all values are numbers."""
    if all(isinstance(x, int | float) and not isinstance(x, bool) for x in values):
        return [float(x) for x in values], None
    texts = ["–" if value is None else plain(value) for value in values]
    names = list(dict.fromkeys(texts))
    return [float(names.index(text)) for text in texts], names


def _scale(axis: Any, places: Sequence[float]) -> None:
    """A log axis if the values span much, and ticks at the values unless they would collide."""
    at = np.array(places)
    if at[0] > 0 and at[-1] / at[0] >= _WIDE:
        axis.set_xscale("log")
        axis.minorticks_off()
        at = np.log(at)
    if len(at) > 1 and np.diff(at).min() >= _APART * np.ptp(at):
        axis.set_xticks(places, [f"{x:g}" for x in places])
