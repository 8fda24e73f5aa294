"""The study's report: results so far as tables, in the terminal and in Markdown, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.quality.study import Study
from decant.schemas.disk.atomic import read_json

Key = tuple[str, int | None, float]
"""Method, size, T."""
Results = dict[Key, dict[int, dict[str, Any]]]
"""Key → seed → result."""

COLUMNS = (
    "target",
    "T",
    "B/token",
    "updates",
    "held-out KL",
    "gap recovered",
    "CE",
    "agreement",
    "ECE",
    "time ÷ record",
    "seeds",
)
ANGLES = ("target", "T", "B/token", "angle", "of the sum", "rel. error")


def report(study: Study, *, console: Console) -> None:
    """Print the results so far; write `report.md` and `report.png` into the study's directory."""
    from benchmarks.quality.angles import results as angle_results

    # Results of all seeds, not only of those that this process runs.
    paths = sorted((study.results_path / "cells").glob("*.json"))
    results = [read_json(path) for path in paths]
    lines, angles = list(quality_lines(collect(results))), angle_results(study.results_path)
    if not lines and not angles:
        console.print(f"{study.results_path}: no results yet")
        return
    tables = [(COLUMNS, lines), (ANGLES, list(angle_lines(angles)))]
    for columns, rows in tables:
        console.print(_rich(columns, rows))
    caption = _caption(study, results)
    console.print(caption)
    text = "\n\n".join(_markdown(columns, rows) for columns, rows in tables)
    study.work.mkdir(parents=True, exist_ok=True)
    (study.work / "report.md").write_text(f"{caption}\n\n{text}\n", encoding="utf-8")
    picture(collect(results), angles, output=study.work / "report.png")
    console.print(f"{study.work / 'report.md'}, {study.work / 'report.png'}")


def collect(results: list[dict[str, Any]]) -> Results:
    """Results by method, size and temperature, then by seed."""
    out: Results = {}
    for result in results:
        at = result["method"], result["size"], result["temperature"]
        out.setdefault(at, {})[result["seed"]] = result
    return out


def gap_recovered(results: Results, key: Key) -> list[float]:
    """For each seed, the share of the KL's way from `ce` to `dense` at the same T."""
    *_, temperature = key
    ce = results.get(("ce", None, 1.0), {})
    dense, mine = results.get(("dense", None, temperature), {}), results.get(key, {})
    return [
        (ce[seed]["kl"] - mine[seed]["kl"]) / (ce[seed]["kl"] - dense[seed]["kl"])
        for seed in mine
        if seed in ce and seed in dense and ce[seed]["kl"] != dense[seed]["kl"]
    ]


def quality_lines(results: Results) -> Iterable[list[str]]:
    """A line for each temperature, method and size."""
    for key in sorted(results, key=_order(results)):
        method, _, temperature = key
        values = list(results[key].values())
        size = values[0]["bytes_per_token"]
        recovered = [] if method in ("ce", "dense") else gap_recovered(results, key)
        yield [
            method,
            "–" if method == "ce" else f"{temperature:g}",
            "–" if size is None else f"{size:.1f}",
            str(values[0]["updates"]),
            _spread([v["kl"] for v in values], "{:.4f}"),
            _spread([100 * share for share in recovered], "{:.1f}") + (" %" if recovered else ""),
            _spread([v["ce"] for v in values], "{:.4f}"),
            _spread([100 * v["agreement"] for v in values], "{:.2f}") + " %",
            _spread([v["ece"] for v in values], "{:.4f}"),
            _relative_time(results, key),
            str(len(values)),
        ]


def _order(results: Results) -> Callable[[Key], tuple]:
    """By temperature, method and bytes."""

    def place(key: Key) -> tuple:
        method, _, temperature = key
        any_seed = next(iter(results[key].values()))
        return temperature, ORDER.index(method), any_seed["bytes_per_token"] or 0

    return place


def angle_lines(angles: list[dict[str, Any]]) -> Iterable[list[str]]:
    """A line for each point."""
    for a in sorted(angles, key=_place):
        yield [
            a["method"],
            f"{a['temperature']:g}",
            f"{a['bytes_per_token']:.1f}",
            _spread(a["angles"], "{:.2f}") + "°",
            f"{a['angle_of_sum']:.2f}°",
            _spread(a["relative_errors"], "{:.3f}"),
        ]


def _place(angle: dict[str, Any]) -> tuple:
    method, size = angle["method"], angle["bytes_per_token"]
    return angle["temperature"], ORDER.index(method), size


LEAST_SHOWN = -60
"""Lowest share of the gap on the axes, in percent; lines leave the picture below it."""
ORDER = (
    "ce",
    "online",
    "dense",
    "renormalize",
    "bucket",
    "prior",
    "sampled",
    "rs-kd",
    "counts",
    "fresh",
    "sketch",
    "record",
    "dithered",
)


def _relative_time(results: Results, key: Key) -> str:
    """Time of an update, its teacher included, relative to `record` at T = 1: median over seeds."""
    record, mine = results.get(("record", None, 1.0), {}), results[key]
    ratios = [
        (mine[seed]["seconds_per_update"] + mine[seed].get("teacher_seconds_per_update", 0))
        / record[seed]["seconds_per_update"]
        for seed in mine
        if seed in record
    ]
    return f"{np.median(ratios):.2f}" if ratios else ""


def _spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation; without the latter for a single value."""
    if not values:
        return ""
    mean = form.format(np.mean(values))
    deviation = form.replace("+", "").format(np.std(values, ddof=1)) if len(values) > 1 else None
    return f"{mean} ± {deviation}" if deviation else mean


def _caption(study: Study, results: list[dict[str, Any]]) -> str:
    if not results:
        return ""
    first = results[0]
    return (
        f"{first['positions']:,} held-out positions judged against the dense teacher at T = 1; "
        f"student of {study.layers} layers cut from {study.teacher}, {study.updates} updates of "
        f"{study.batch_rows} × {study.sequence_length} tokens, α = 0.9, learning rate "
        f"{study.learning_rate:g}. Mean ± standard deviation over seeds (the order of rows); "
        "shares are paired by seed. B/token: all records of the cache's targets; of rs-kd through "
        f"the codec of counts. {first['device']}."
    )


def _rich(columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column == "target" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(results: Results, angles: list[dict[str, Any]], *, output: Path) -> None:
    """Write the picture: for each T the gap recovered against bytes, and angles against bytes."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    temperatures = sorted({temperature for *_, temperature in results})
    count = len(temperatures)
    chosen = [a for a in angles if a["temperature"] == 1.0]
    panels = count + bool(chosen)
    figure, axes = pyplot.subplots(1, panels, figsize=(4.6 * panels, 4.6), squeeze=False)
    colours = {method: f"C{i}" for i, method in enumerate(ORDER[3:])}
    for axis, temperature in zip(axes[0], temperatures, strict=False):
        _draw_gap(axis, results, temperature, colours)
    if chosen:
        _draw_angles(axes[0, -1], chosen, colours)
        axes[0, -1].set_title("angle to the dense gradient, T = 1", fontsize=10)
    handles, labels = _legend(axes[0])
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.set_layout_engine("constrained")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """One entry for each method that any of the axes shows."""
    shown: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    return list(shown.values()), list(shown)


def _draw_gap(axis: Any, results: Results, temperature: float, colours: dict[str, str]) -> None:
    """A line for each method: share of the gap against bytes; dots are seeds."""
    for method in ORDER[3:]:
        keys = [key for key in results if (key[0], key[2]) == (method, temperature)]
        points = []
        for key in sorted(keys, key=_order(results)):
            if shares := gap_recovered(results, key):
                size = next(iter(results[key].values()))["bytes_per_token"]
                points.append((size, [100 * share for share in shares]))
        if not points:
            continue
        look = {"color": colours[method]}
        mean = [np.mean(shares) for _, shares in points]
        axis.plot([size for size, _ in points], mean, "-o", ms=4, label=method, **look)
        for size, shares in points:
            axis.plot([size] * len(shares), shares, ".", ms=3, **look)
    axis.axhline(100, color="k", lw=0.8, ls="--")
    axis.set_ylim(max(LEAST_SHOWN, axis.get_ylim()[0]), 108)
    axis.set_xlabel("bytes a token")
    axis.set_ylabel("% of the held-out KL's way from hard labels to dense")
    axis.set_title(f"gap recovered, T = {temperature:g}", fontsize=10)
    axis.grid(alpha=0.3)


def _draw_angles(axis: Any, angles: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Draw two lines for each method: angles of one batch, and of the batches' sum."""
    from matplotlib.ticker import ScalarFormatter

    for method in ORDER[3:]:
        mine = sorted((a for a in angles if a["method"] == method), key=_by_bytes)
        if not mine:
            continue
        sizes = [a["bytes_per_token"] for a in mine]
        one, total = ([np.mean(a[name]) for a in mine] for name in ("angles", "angle_of_sum"))
        look = {"ms": 4, "color": colours[method]}
        axis.plot(sizes, one, ls="-", marker="o", label=method, **look)
        axis.plot(sizes, total, ls=":", marker="x", **look)
    axis.set_xlabel("bytes a token")
    axis.set_ylabel("degrees (dots: one batch; crosses: sum of the batches)")
    axis.grid(alpha=0.3, which="both")
    if angles:
        axis.set_yscale("log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ScalarFormatter())
        axis.tick_params(axis="y", which="both", labelsize=7)


def _by_bytes(angle: dict[str, Any]) -> float:
    return angle["bytes_per_token"]
