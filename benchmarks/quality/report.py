"""The study's report: results so far as tables, in the terminal and in Markdown, and a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.quality.study import Study
from decant.schemas.disk.atomic import read_json

Results = dict[tuple[str, float], dict[int, dict[str, Any]]]
"""(method, T) → seed → result."""

COLUMNS = (
    "target",
    "T",
    "B/token",
    "updates",
    "held-out KL",
    "KL − bucket's",
    "gap recovered",
    "CE",
    "agreement",
    "ECE",
    "time ÷ bucket",
    "seeds",
)
ANGLES = ("target", "T", "settings", "B/token", "angle", "of the sum", "rel. error", "student")


def report(study: Study, *, console: Console) -> None:
    """Print the results so far; write `report.md` and `report.png` into the study's directory."""
    from benchmarks.quality.angles import results as angle_results

    # Results of all seeds, not only of those that this process runs.
    results = [read_json(path) for path in sorted((study.work / "cells").glob("*.json"))]
    lines, angles = list(quality_lines(collect(results))), angle_results(study.work)
    if not lines and not angles:
        console.print(f"{study.work}: no results yet")
        return
    tables = [(COLUMNS, lines), (ANGLES, list(angle_lines(angles)))]
    for columns, rows in tables:
        console.print(_rich(columns, rows))
    caption = _caption(study, results)
    console.print(caption)
    text = "\n\n".join(_markdown(columns, rows) for columns, rows in tables)
    (study.work / "report.md").write_text(f"{caption}\n\n{text}\n", encoding="utf-8")
    picture(collect(results), angles, output=study.work / "report.png")
    console.print(f"{study.work / 'report.md'}, {study.work / 'report.png'}")


def collect(results: list[dict[str, Any]]) -> Results:
    """Results by method and temperature, then by seed."""
    out: Results = {}
    for result in results:
        at = result["method"], result["temperature"]
        out.setdefault(at, {})[result["seed"]] = result
    return out


def gap_recovered(results: Results, method: str, temperature: float) -> list[float]:
    """For each seed, the share of the KL's way from `ce` to `dense` at the same T."""
    ce, dense = results.get(("ce", 1.0), {}), results.get(("dense", temperature), {})
    mine = results.get((method, temperature), {})
    return [
        (ce[seed]["kl"] - mine[seed]["kl"]) / (ce[seed]["kl"] - dense[seed]["kl"])
        for seed in mine
        if seed in ce and seed in dense and ce[seed]["kl"] != dense[seed]["kl"]
    ]


def paired(results: Results, method: str, temperature: float, *, name: str) -> list[float]:
    """For each seed, the metric `name` minus that of `bucket` at the same T."""
    mine, bucket = (results.get((m, temperature), {}) for m in (method, "bucket"))
    return [mine[seed][name] - bucket[seed][name] for seed in mine if seed in bucket]


def quality_lines(results: Results) -> Iterable[list[str]]:
    """A line for each temperature and method."""
    for method, temperature in sorted(results, key=lambda key: (key[1], _rank(key[0]))):
        mine = results[method, temperature]
        values = list(mine.values())
        against = [] if method == "bucket" else paired(results, method, temperature, name="kl")
        size, seconds = values[0]["bytes_per_token"], _relative_time(results, method, temperature)
        recovered = [] if method in ("ce", "dense") else gap_recovered(results, method, temperature)
        yield [
            method,
            "–" if method == "ce" else f"{temperature:g}",
            "–" if size is None else f"{size:.1f}",
            str(values[0]["updates"]),
            _spread([v["kl"] for v in values], "{:.4f}"),
            _spread(against, "{:+.4f}"),
            _spread([100 * share for share in recovered], "{:.1f}") + (" %" if recovered else ""),
            _spread([v["ce"] for v in values], "{:.4f}"),
            _spread([100 * v["agreement"] for v in values], "{:.2f}") + " %",
            _spread([v["ece"] for v in values], "{:.4f}"),
            seconds,
            str(len(values)),
        ]


def angle_lines(angles: list[dict[str, Any]]) -> Iterable[list[str]]:
    """A line for each point and student."""
    for a in sorted(angles, key=_place):
        yield [
            a["method"],
            f"{a['temperature']:g}",
            a["settings"],
            ("" if a["measured"] else "≈ ") + f"{a['bytes_per_token']:.1f}",
            _spread(a["angles"], "{:.2f}") + "°",
            f"{a['angle_of_sum']:.2f}°",
            _spread(a["relative_errors"], "{:.3f}"),
            a["student"],
        ]


def _place(angle: dict[str, Any]) -> tuple:
    method, size = angle["method"], angle["bytes_per_token"]
    return angle["student"], angle["temperature"], _rank(method), size


LEAST_SHOWN = 100
"""Lowest share of the gap on the axis, in percent; bars below it are cut off and labelled."""
CLOSE = 6
"""Bytes between neighbours of which the left one has its label on its left."""
ORDER = ("ce", "online", "dense", "renormalize", "bucket", "prior", "sampled", "rs-kd")


def _rank(method: str) -> int:
    return ORDER.index(method)


def _relative_time(results: Results, method: str, temperature: float) -> str:
    """Time of an update, its teacher included, relative to `bucket` at T = 1: median over seeds."""
    bucket, mine = results.get(("bucket", 1.0), {}), results[method, temperature]
    ratios = [
        (mine[seed]["seconds_per_update"] + mine[seed].get("teacher_seconds_per_update", 0))
        / bucket[seed]["seconds_per_update"]
        for seed in mine
        if seed in bucket
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
        "differences and shares are paired by seed. B/token: records of the compact codec; of "
        f"rs-kd estimated from its distinct ids. {first['device']}."
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
    """Write the picture: gap recovered by T, and angle to the dense gradient against bytes."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    colours = {method: f"C{i}" for i, method in enumerate(ORDER)}
    _draw_gap(axes[0], results, colours)
    # Only the trained student: from the initial one, far from any target, all angles are alike.
    chosen = [a for a in angles if (a["student"], a["temperature"]) == ("trained", 1.0)]
    _draw_angles(axes[1], chosen, colours)
    axes[1].set_title("angle to the dense gradient, T = 1, densely trained student", fontsize=10)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def _draw_gap(axis: Any, results: Results, colours: dict[str, str]) -> None:
    """Draw a bar for each method, grouped by T, with a dot for each seed."""
    keys = [key for key in results if key[0] not in ("ce", "dense")]
    keys = sorted(keys, key=lambda key: (key[1], _rank(key[0])))
    at, ticks, labels, previous = 0.0, [], [], None
    for method, temperature in keys:
        shares = [100 * share for share in gap_recovered(results, method, temperature)]
        if not shares:
            continue
        at += 1.0 if previous in (None, temperature) else 1.8
        previous = temperature
        axis.bar(at, np.mean(shares), color=colours[method], alpha=0.75)
        axis.plot([at] * len(shares), shares, "k.", ms=4)
        if np.mean(shares) < -LEAST_SHOWN:
            # At the bar's top, because seeds' dots lie near the axis's lower end.
            at_top = {"va": "top", "ha": "center", "fontsize": 8}
            axis.annotate(f"{np.mean(shares):.0f}", (at, -3), **at_top)
        ticks.append(at)
        labels.append(f"{method}, T = {temperature:g}")
    axis.axhline(100, color="k", lw=0.8, ls="--")
    axis.set_xticks(ticks, labels, rotation=60, ha="right", fontsize=8)
    axis.set_ylim(-LEAST_SHOWN, 108)
    axis.set_ylabel("% of the held-out KL's way from hard labels to dense")
    axis.set_title("gap recovered (dots: seeds; dashed: dense at the same T)", fontsize=10)
    axis.grid(alpha=0.3, axis="y")


def _draw_angles(axis: Any, angles: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Draw a line for each method; `sampled`, which varies both k and m, is drawn as points."""
    from matplotlib.ticker import ScalarFormatter

    for method in sorted({a["method"] for a in angles}, key=_rank):
        mine = sorted((a for a in angles if a["method"] == method), key=_by_bytes)
        sizes = [a["bytes_per_token"] for a in mine]
        one, total = ([np.mean(a[name]) for a in mine] for name in ("angles", "angle_of_sum"))
        look = {"ms": 4, "color": colours[method]}
        joined = method != "sampled"
        axis.plot(sizes, one, ls="-" if joined else "none", marker="o", label=method, **look)
        axis.plot(sizes, total, ls=":" if joined else "none", marker="x", **look)
        for a, y in zip(mine, one, strict=True):
            if method in ("prior", "renormalize"):
                continue  # They have the same k and bytes as bucket.
            left = any(0 < size - a["bytes_per_token"] < CLOSE for size in sizes)
            axis.annotate(
                a["settings"],
                (a["bytes_per_token"], y),
                fontsize=6,
                xytext=(-5 if left else 5, -1),
                ha="right" if left else "left",
                textcoords="offset points",
            )
    axis.margins(x=0.16)  # room for the last label
    axis.set_xlabel("bytes a token")
    axis.set_ylabel("degrees (dots: one batch; crosses: sum of the batches)")
    axis.grid(alpha=0.3, which="both")
    if angles:
        axis.set_yscale("log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ScalarFormatter())
        axis.tick_params(axis="y", which="both", labelsize=7)
        axis.legend(fontsize=8)


def _by_bytes(angle: dict[str, Any]) -> float:
    return angle["bytes_per_token"]
