"""Charts of a report: curves over updates and over time, and evaluations by group.

matplotlib draws each chart as SVG for the page and as PNG for other uses.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decant.foreign import plain
from decant.trainer.results.evaluate import position_range
from decant.trainer.results.run_summary import RunSummary

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555", "#8c510a")
"""Okabe and Ito's colours, distinct for colour-blind readers too; more runs get other dashes."""
DASHES = ("-", "--", ":", "-.")
LEGENDS = 6
"""Most runs that a chart has a legend for; the page's table shows the colours in any case."""
CURVES = {
    "heldout_kl_bound": "Held out: KL to the teacher, nats a token (lower bound)",
    "heldout_ce": "Held out: cross-entropy, nats a token",
    "heldout_agreement": "Held out: likeliest token is the teacher's",
}
TRAINED = {"kl_loss": "Training: KL at T, nats", "ce_loss": "Training: cross-entropy, nats"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "decant",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8.5,
    "legend.framealpha": 0.8,
}

Draw = Callable[[Any], None]
"""Draws a chart onto matplotlib axes."""


def colour(number: int) -> str:
    """Colour of the run with this number."""
    return COLOURS[number % len(COLOURS)]


def charts(runs: Sequence[RunSummary]) -> dict[str, Draw]:
    """The charts for which at least one run has data, by file name."""
    drawings: dict[str, Draw] = {}
    for name, title in CURVES.items():
        drawings[name] = _curve(runs, name, title)
    if any(run.seconds for run in runs):
        drawings["kl_over_time"] = _over_time(runs)
    for name, title in TRAINED.items():
        drawings[name] = _trained(runs, name, title)
    if any(run.evaluation for run in runs):
        drawings["by_frequency"] = _grouped(runs, "by_frequency", "next token's share of the text")
        drawings["by_position"] = _grouped(runs, "by_position", "tokens before it in the document")
        drawings["calibration"] = _calibration(runs)
    return drawings


def as_svg(draw: Draw) -> bytes:
    """One chart as SVG; the same runs give the same bytes."""
    return _render([draw], form="svg", size=(5.4, 3.5))


def write_png(draws: Sequence[Draw], path: Path) -> None:
    """Write charts side by side as one PNG."""
    path.write_bytes(_render(draws, form="png", size=(4.8 * len(draws), 4.0)))


def _render(draws: Sequence[Draw], *, form: str, size: tuple[float, float]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, len(draws), figsize=size, layout="constrained")
        for draw, axis in zip(draws, np.atleast_1d(axes), strict=True):
            draw(axis)
        out = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(out, format=form, dpi=130, metadata=metadata)
        pyplot.close(figure)
    return out.getvalue()


def _line(axis: Any, number: int, run: RunSummary, x: Any, y: Any, **style: Any) -> None:
    dashes = DASHES[number // len(COLOURS) % len(DASHES)]
    axis.plot(x, y, color=colour(number), ls=dashes, lw=1.6, label=_shown(run.name), **style)


def _shown(name: str) -> str:
    """A name in a chart: matplotlib reads what is between dollars as a formula."""
    return plain(name).replace("$", r"\$")


def _finish(axis: Any, runs: Sequence[RunSummary], *, title: str, x: str) -> None:
    axis.set_title(title, loc="left")
    axis.set_xlabel(x)
    if 1 < len(runs) <= LEGENDS:
        axis.legend()


def _curve(runs: Sequence[RunSummary], name: str, title: str) -> Draw:
    def draw(axis: Any) -> None:
        for number, run in enumerate(runs):
            steps = [line["step"] for line in run.heldout]
            _line(axis, number, run, steps, _values(run.heldout, name), marker="o", ms=3)
        _fit_without_first(axis)
        _finish(axis, runs, title=title, x="updates")

    return draw


def _over_time(runs: Sequence[RunSummary]) -> Draw:
    def draw(axis: Any) -> None:
        longest = max((max(run.seconds.values()) for run in runs if run.seconds), default=0.0)
        scale, unit = (3600, "hours") if longest > 2 * 3600 else (60, "minutes")
        for number, run in enumerate(runs):
            lines = [line for line in run.heldout if line["step"] in run.seconds]
            times = [run.seconds[line["step"]] / scale for line in lines]
            _line(axis, number, run, times, _values(lines, "heldout_kl_bound"), marker="o", ms=3)
        _fit_without_first(axis)
        title = "Held out: KL over time spent training"
        _finish(axis, runs, title=title, x=f"{unit}, without judging and saving")

    return draw


def _trained(runs: Sequence[RunSummary], name: str, title: str) -> Draw:
    def draw(axis: Any) -> None:
        for number, run in enumerate(runs):
            values = _values(run.updates, name)
            steps = np.array([line["step"] for line in run.updates])
            width = max(1, len(values) // 20)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            if width > 1:
                axis.plot(steps, values, color=colour(number), lw=0.6, alpha=0.25)
            _line(axis, number, run, steps[width - 1 :], smooth)
        _fit(axis, [line.get_ydata() for line in axis.get_lines() if line.get_alpha() is None])
        _finish(axis, runs, title=f"{title} (running mean)", x="updates")

    return draw


def _grouped(runs: Sequence[RunSummary], by: str, of: str) -> Draw:
    def draw(axis: Any) -> None:
        named: dict[str, None] = {}
        for run in runs:
            named |= dict.fromkeys(_group(means) for means in (run.evaluation or {}).get(by, ()))
        places = {name: i for i, name in enumerate(named)}
        evaluated = [(number, run) for number, run in enumerate(runs) if run.evaluation]
        width = 0.8 / max(len(evaluated), 1)
        for offset, (number, run) in enumerate(evaluated):
            groups = (run.evaluation or {})[by]
            x = np.array([places[_group(means)] for means in groups])
            x = x + (offset - (len(evaluated) - 1) / 2) * width
            heights = [means["kl_bound"] for means in groups]
            axis.bar(x, heights, width, color=colour(number), label=_shown(run.name))
        names = [_shown(name) for name in places]
        axis.set_xticks(range(len(places)), names, rotation=30, ha="right", fontsize=8)
        axis.grid(axis="x", visible=False)
        _finish(axis, [run for _, run in evaluated], title="KL ≥, nats", x=of)

    return draw


def _calibration(runs: Sequence[RunSummary]) -> Draw:
    def draw(axis: Any) -> None:
        axis.plot([0, 1], [0, 1], color="#bbbbbb", lw=1)
        for number, run in enumerate(runs):
            if run.evaluation:
                bins = run.evaluation["calibration"]
                x, y = ([one[name] for one in bins] for name in ("confidence", "accuracy"))
                _line(axis, number, run, x, y, marker="o", ms=3)
        evaluated = [run for run in runs if run.evaluation]
        title = "Calibration: accuracy at each confidence"
        _finish(axis, evaluated, title=title, x="probability of the likeliest token")

    return draw


def _group(means: dict[str, Any]) -> str:
    return means["frequency"] if "frequency" in means else position_range(means)


def _values(lines: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """The metric in each line; NaN, which leaves a gap, where it is missing or not finite."""
    values = [line.get(name) for line in lines]
    return np.array([np.nan if x is None else x for x in values], float)


def _fit_without_first(axis: Any) -> None:
    """Fit the height to all values but each curve's first, which may dwarf the others."""
    _fit(axis, [line.get_ydata()[1:] for line in axis.get_lines()])


def _fit(axis: Any, curves: Sequence[np.ndarray]) -> None:
    later = np.concatenate([np.asarray(curve, float) for curve in (*curves, [])])
    later = later[np.isfinite(later)]
    if len(later) > 1 and np.ptp(later) > 0:
        margin = 0.05 * np.ptp(later)
        axis.set_ylim(later.min() - margin, later.max() + margin)
