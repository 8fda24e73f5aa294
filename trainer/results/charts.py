"""Charts of a report: curves over updates and over time, evaluations by group, settings.

matplotlib draws each chart as SVG for the page, which has one legend for all of them, and as PNG
with a legend of its own below. The teacher is a grey dashed line where it has a value.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decant.foreign import plain
from decant.trainer.judging.headline import Estimate, common_estimate
from decant.trainer.results.evaluation_tables import position_range
from decant.trainer.results.seed_groups import Group, mean_and_band
from decant.trainer.results.sweep_charts import setting_charts

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555", "#8c510a")
"""Okabe and Ito's colours, distinct for colour-blind readers too; more groups get other dashes."""
DASHES = ("-", "--", ":", "-.")
TEACHER = {"color": "#888888", "ls": (0, (4, 3)), "lw": 1.3, "zorder": 1}
"""The teacher's line."""
HELDOUT = ("heldout_kl", "heldout_ce", "heldout_agreement")
"""The charts of held-out curves, which are also put side by side into one picture."""
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
    "legend.frameon": False,
}
_LONGEST_LABEL = 40
"""Most characters of a name in a PNG's legend, so that it cannot be wider than the picture."""

Draw = Callable[[Any], None]
"""Draws a chart onto matplotlib axes."""


def colour(number: int) -> str:
    """Colour of the group with this number."""
    return COLOURS[number % len(COLOURS)]


def dashes(number: int) -> str:
    """Dashes of the group with this number, as matplotlib writes them."""
    return DASHES[number // len(COLOURS) % len(DASHES)]


def charts(groups: Sequence[Group]) -> dict[str, Draw]:
    """The charts for which at least one run has data, by file name."""
    runs = [run for group in groups for run in group.runs]
    kl = common_estimate([line for run in runs for line in run.heldout])
    judged = common_estimate([run.judgement for run in runs if run.judgement])
    drawings: dict[str, Draw] = {
        f"setting {name}": draw for name, draw in setting_charts(groups, judged, colour).items()
    }
    drawings["heldout_kl"] = _heldout(groups, kl.metric, f"Held out: {kl.title}, nats a token")
    drawings["heldout_ce"] = _heldout(groups, "heldout_ce", "Held out: cross-entropy, nats a token")
    text = "Held out: likeliest token is the teacher's"
    drawings["heldout_agreement"] = _heldout(groups, "heldout_agreement", text)
    if any(run.seconds for run in runs):
        drawings["kl_over_time"] = _over_time(groups, kl)
    for name, title in TRAINED.items():
        drawings[name] = _trained(groups, name, title)
    if any(run.evaluation for run in runs):
        judged = common_estimate([run.evaluation for run in runs if run.evaluation])
        frequency, position = "next token's share of the text", "tokens before it in the document"
        drawings["by_frequency"] = _grouped(groups, judged, "by_frequency", frequency)
        drawings["by_position"] = _grouped(groups, judged, "by_position", position)
        drawings["calibration"] = _calibration(groups)
    return drawings


def as_svg(draw: Draw) -> bytes:
    """One chart as SVG without a legend; the same runs give the same bytes."""
    return _render([draw], form="svg", size=(4.9, 3.3))


def write_png(draws: Sequence[Draw], path: Path) -> None:
    """Write charts side by side as one PNG, with one legend below them."""
    path.write_bytes(_render(draws, form="png", size=(4.8 * len(draws), 4.0)))


def _render(draws: Sequence[Draw], *, form: str, size: tuple[float, float]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, len(draws), figsize=size, layout="constrained")
        for draw, axis in zip(draws, np.atleast_1d(axes), strict=True):
            draw(axis)
        if form == "png":
            _legend(figure, columns=2 * len(draws))
        out = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        svg = form == "svg"  # The page's own background shows through, light or dark.
        figure.savefig(out, format=form, dpi=130, metadata=metadata, transparent=svg)
        pyplot.close(figure)
    return out.getvalue()


def _legend(figure: Any, *, columns: int) -> None:
    """One legend below all charts of a figure, which is made higher by the legend's lines."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        lines = -(-len(handles) // columns)
        figure.set_figheight(figure.get_figheight() + 0.19 * lines)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def _line(axis: Any, group: Group, x: Any, y: Any, **style: Any) -> None:
    number, label = group.number, _shown(group.name, most=_LONGEST_LABEL)
    axis.plot(x, y, color=colour(number), ls=dashes(number), lw=1.6, label=label, **style)


def _band(
    axis: Any, group: Group, curves: Sequence[tuple[np.ndarray, np.ndarray]], **style: Any
) -> list[np.ndarray]:
    """Draw the mean of a group's curves, and a band from the lowest to the highest.

    Returns what must fit into the picture: the lowest and the highest values.
    """
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return []
    x, mean, low, high = mean_and_band(curves)
    if len(curves) > 1:
        axis.fill_between(x, low, high, color=colour(group.number), alpha=0.2, lw=0)
    _line(axis, group, x, mean, **style)
    return [low, high]


def _shown(name: str, *, most: int | None = None) -> str:
    """A name in a chart: matplotlib reads what is between dollars as a formula."""
    text = plain(name)
    if most and len(text) > most:
        text = text[: most // 2] + "…" + text[-(most // 2) :]
    return text.replace("$", r"\$")


def _finish(axis: Any, *, title: str, x: str) -> None:
    axis.set_title(title, loc="left")
    axis.set_xlabel(x)


def _heldout(groups: Sequence[Group], name: str, title: str) -> Draw:
    def draw(axis: Any) -> None:
        drawn = []
        for group in groups:
            steps = [np.array([line["step"] for line in run.heldout]) for run in group.runs]
            values = [_values(run.heldout, name) for run in group.runs]
            curves = list(zip(steps, values, strict=True))
            drawn += _band(axis, group, curves, marker="o", ms=3)
        _fit_without_first(axis, drawn, teacher=_teacher_at(groups, name))
        _finish(axis, title=title, x="updates")

    return draw


def _teacher_at(groups: Sequence[Group], name: str) -> float | None:
    """The teacher's value of a held-out metric; None if the runs do not agree on one."""
    if name == "heldout_ce":
        runs = [run for group in groups for run in group.runs if run.heldout]
        values = {run.heldout[-1].get("heldout_teacher_ce") for run in runs}
        return values.pop() if len(values) == 1 else None
    return 0.0 if name.startswith("heldout_kl") else None


def _over_time(groups: Sequence[Group], kl: Estimate) -> Draw:
    def draw(axis: Any) -> None:
        runs = [run for group in groups for run in group.runs]
        longest = max((max(run.seconds.values()) for run in runs if run.seconds), default=0.0)
        scale, unit = (3600, "hours") if longest > 2 * 3600 else (60, "minutes")
        drawn = []
        for group in groups:
            # No two runs are judged at the same second, so each has a line of its own.
            for run in group.runs:
                lines = [line for line in run.heldout if line["step"] in run.seconds]
                times = [run.seconds[line["step"]] / scale for line in lines]
                drawn.append(_values(lines, kl.metric))
                _line(axis, group, times, drawn[-1], marker="o", ms=3)
        _fit_without_first(axis, drawn, teacher=0.0)
        title = f"Held out: {kl.title} over time spent training"
        _finish(axis, title=title, x=f"{unit}, without judging and saving")

    return draw


def _trained(groups: Sequence[Group], name: str, title: str) -> Draw:
    def draw(axis: Any) -> None:
        drawn = []
        for group in groups:
            curves = []
            for run in group.runs:
                values = _values(run.updates, name)
                steps = np.array([line["step"] for line in run.updates])
                width = max(1, len(values) // 20)
                if width > 1 and len(group.runs) == 1:
                    axis.plot(steps, values, color=colour(group.number), lw=0.6, alpha=0.25)
                if len(values):
                    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
                    curves.append((steps[width - 1 :], smooth))
            drawn += _band(axis, group, curves)
        _fit(axis, drawn)
        _finish(axis, title=f"{title} (running mean)", x="updates")

    return draw


def _grouped(groups: Sequence[Group], kl: Estimate, by: str, of: str) -> Draw:
    def draw(axis: Any) -> None:
        named: dict[str, None] = {}
        evaluated = [group for group in groups if group.values(lambda run: run.evaluation)]
        for group in evaluated:
            for run in group.values(lambda run: run.evaluation):
                named |= dict.fromkeys(_group_name(means) for means in run[by])
        places = {name: i for i, name in enumerate(named)}
        width = 0.8 / max(len(evaluated), 1)
        for offset, group in enumerate(evaluated):
            heights = np.full((len(group.runs), len(places)), np.nan)
            for row, run in enumerate(group.values(lambda run: run.evaluation)):
                for means in run[by]:
                    heights[row, places[_group_name(means)]] = means[kl.measure]
            known = ~np.isnan(heights).all(0)
            x = np.flatnonzero(known) + (offset - (len(evaluated) - 1) / 2) * width
            label = _shown(group.name, most=_LONGEST_LABEL)
            height = np.nanmean(heights[:, known], axis=0)
            axis.bar(x, height, width, color=colour(group.number), label=label)
        names = [_shown(name) for name in places]
        axis.set_xticks(range(len(places)), names, rotation=30, ha="right", fontsize=8)
        axis.grid(axis="x", visible=False)
        _finish(axis, title=f"{kl.title}, nats", x=of)

    return draw


def _calibration(groups: Sequence[Group]) -> Draw:
    def draw(axis: Any) -> None:
        axis.plot([0, 1], [0, 1], color="#bbbbbb", lw=1)
        for group in groups:
            for run in group.runs:
                if run.evaluation:
                    bins = run.evaluation["calibration"]
                    x, y = ([one[name] for one in bins] for name in ("confidence", "accuracy"))
                    _line(axis, group, x, y, marker="o", ms=3)
        title = "Calibration: accuracy at each confidence"
        _finish(axis, title=title, x="probability of the likeliest token")

    return draw


def _group_name(means: dict[str, Any]) -> str:
    return means["frequency"] if "frequency" in means else position_range(means)


def _values(lines: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """The metric in each line; NaN, which leaves a gap, where it is missing or not finite."""
    values = [line.get(name) for line in lines]
    return np.array([np.nan if x is None else x for x in values], float)


def _fit_without_first(
    axis: Any, curves: Sequence[np.ndarray], *, teacher: float | None = None
) -> None:
    """Draw the teacher's line, and fit the height to it and to the curves.

    Without the curves' first values if these would take more than half of the picture: an
    untrained student would dwarf all differences.
    """
    reference = [] if teacher is None else [np.array([teacher])]
    if teacher is not None:
        axis.axhline(teacher, label="the teacher", **TEACHER)
    later = [*(curve[1:] for curve in curves), *reference]
    whole = [*curves, *reference]
    _fit(axis, whole if _span(whole) <= 2 * _span(later) else later)


def _span(curves: Sequence[np.ndarray]) -> float:
    finite = _finite(curves)
    return float(np.ptp(finite)) if len(finite) else 0.0


def _finite(curves: Sequence[np.ndarray]) -> np.ndarray:
    values = np.concatenate([np.asarray(curve, float) for curve in (*curves, [])])
    return values[np.isfinite(values)]


def _fit(axis: Any, curves: Sequence[np.ndarray]) -> None:
    if _span(curves) > 0:
        values, margin = _finite(curves), 0.05 * _span(curves)
        axis.set_ylim(values.min() - margin, values.max() + margin)
