"""The command `report`: one HTML page that compares runs, and its charts as PNGs.

The page needs no other file and no network; the same runs give the same page.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from decant.foreign import escaped
from decant.foreign import page as filled_page
from decant.schemas.disk.atomic import write_bytes
from decant.trainer.config import Report
from decant.trainer.results.charts import CURVES, as_svg, charts, colour, write_png
from decant.trainer.results.run_summary import ABSENT, RunSummary, differences, read_run_summaries

PAGE = "report.html"
HELDOUT_CHARTS = "learned.png"
"""File of the three held-out curves in one picture."""

SIDE_BY_SIDE = 4
"""Most runs that the table shows as columns; more runs are shown as lines."""

Value = Callable[[RunSummary], Any]
MEASURES: tuple[tuple[str, str, Value, str, int], ...] = (
    ("judged on", "", lambda r: r.judged_on, "{}", 0),
    ("updates", "", lambda r: r.updates[-1]["step"] if r.updates else None, "{:,}", 0),
    ("KL ≥", "nats a token, T = 1", lambda r: r.measure("heldout_kl_bound"), "{:.4f}", -1),
    ("KL ≈", "by the tail prior", lambda r: r.measure("heldout_kl_estimate"), "{:.4f}", -1),
    ("KL, draws", "unbiased estimate", lambda r: r.measure("heldout_kl_unbiased"), "{:.4f}", -1),
    ("CE", "nats a token", lambda r: r.measure("heldout_ce"), "{:.4f}", -1),
    ("perplexity", "", lambda r: r.measure("heldout_perplexity"), "{:,.1f}", -1),
    ("top-1", "same as the teacher", lambda r: r.measure("heldout_agreement"), "{:.1%}", 1),
    ("top-5", "shared with it", lambda r: r.measure("heldout_top5_agreement"), "{:.1%}", 1),
    ("right", "next token", lambda r: r.measure("heldout_accuracy"), "{:.1%}", 1),
    ("ECE", "", lambda r: r.measure("heldout_ece"), "{:.3f}", -1),
    ("accepted", "as a draft", lambda r: r.measure("heldout_acceptance"), "{:.1%}", 0),
    ("read", "bytes a token", lambda r: r.bytes_per_token, "{:,.1f}", 0),
    ("update", "µs a token", lambda r: r.microseconds_per_token, "{:,.1f}", 0),
    ("trained", "minutes", lambda r: max(r.seconds.values(), default=0) / 60 or None, "{:,.1f}", 0),
    ("MFU", "", lambda r: _last(r, "mfu"), "{:.1%}", 0),
)
"""Of each measure: name, unit, value of a run, format, and sign of better values (0: neither)."""


def report(config: Report) -> Path:
    """Write the page and the pictures into `config.output`; returns the page's path.

    Raises FileNotFoundError for a directory that holds no run.
    """
    runs = read_run_summaries(config.runs)
    drawings = charts(runs)
    images = {name: as_svg(draw) for name, draw in drawings.items()}
    config.output.mkdir(parents=True, exist_ok=True)
    for name, draw in drawings.items():
        write_png([draw], config.output / f"{name}.png")
    write_png([drawings[name] for name in CURVES], config.output / HELDOUT_CHARTS)
    write_bytes(config.output / PAGE, page(runs, images).encode())
    return config.output / PAGE


def page(runs: Sequence[RunSummary], images: dict[str, bytes]) -> str:
    """The page's HTML; `images` are the charts as SVG, by name."""
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"Run {runs[0].name}"
    body = [
        f"<h1>{escaped(title)}</h1>",
        '<p class="note">Measured on held-out rows, on which no run was trained. KL ≥ counts the '
        "teacher’s tail as one token and is a lower bound. Run <code>decant evaluate</code> on a "
        "run to get the other KLs.</p>",
        _incomparable(runs),
        _summary(runs),
        "<h2>Curves</h2>",
        _charts(images),
        "<h2>Settings that differ</h2>",
        _differences(runs),
        "<h2>Caches</h2>",
        _caches(runs),
        "<h2>All settings</h2>",
        *(_settings(run) for run in runs),
    ]
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    return filled_page(template, {"title": escaped(title), "body": "\n".join(body)})


def _incomparable(runs: Sequence[RunSummary]) -> str:
    """A note if the runs were judged against different teachers."""
    if _comparable(runs):
        return ""
    return (
        "<p><strong>These runs were judged against different teachers</strong> (see “judged on”), "
        "so their figures say nothing about which is better.</p>"
    )


def _comparable(runs: Sequence[RunSummary]) -> bool:
    return len({run.judged_against for run in runs if run.judged_against}) <= 1


def _summary(runs: Sequence[RunSummary]) -> str:
    """The table of measures: few runs as columns, which fit a phone; more runs as lines."""
    rows = [[_named(runs, number)] for number in range(len(runs))]
    head, comparable = ["run"], len(runs) > 1 and _comparable(runs)
    for name, unit, value, form, way in MEASURES:
        values = [value(run) for run in runs]
        if all(one is None for one in values):
            continue
        head.append(f"{escaped(name)} <small>{escaped(unit)}</small>" if unit else escaped(name))
        best = _best(values, way)
        for row, one in zip(rows, values, strict=True):
            row.append(_cell(_formatted(one, form), best=comparable and one == best))
    if len(runs) > SIDE_BY_SIDE:
        return _table(head, rows)
    sides = [_named(runs, number, cell=False) for number in range(len(runs))]
    kinds = [_cell("loss", head=True), *(_cell(_wrapped(run.kind)) for run in runs)]
    turned = [
        [_cell(text, head=True), *cells]
        for text, cells in zip(head[1:], zip(*(row[1:] for row in rows), strict=True), strict=True)
    ]
    return _table(["", *sides], [kinds, *turned])


def _best(values: Sequence[Any], way: int) -> Any:
    known = [value for value in values if value is not None]
    if not way or not known:
        return object()
    return max(known) if way > 0 else min(known)


def _charts(images: dict[str, bytes]) -> str:
    figures = [
        f'<img alt="{escaped(name.replace("_", " "))}" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(image).decode()}">'
        for name, image in images.items()
    ]
    return '<div class="charts">' + "\n".join(figures) + "</div>"


def _differences(runs: Sequence[RunSummary]) -> str:
    differing = differences(runs)
    if not differing:
        return "<p>One run only.</p>" if len(runs) == 1 else "<p>None: all settings agree.</p>"
    head = ["setting", *(_named(runs, number, cell=False) for number in range(len(runs)))]
    rows = [
        [_cell(escaped(name), head=True), *(_cell(_setting(value)) for value in values)]
        for name, values in differing.items()
    ]
    return _table(head, rows, left=True)


def _caches(runs: Sequence[RunSummary]) -> str:
    head = ["run", "cache", "teacher", "train rows", "train tokens", "bytes a token, by signal"]
    rows = []
    for number, run in enumerate(runs):
        for cache in run.caches:
            sizes = (f"{name} {size:,.1f}" for name, size in cache["bytes_per_token"].items())
            cells = (
                f"<code>{escaped(cache['cache_id'][:12])}</code>",
                f"<code>{escaped((cache['teacher_id'] or ABSENT)[:12])}</code>",
                f"{cache['train']['rows']:,}",
                f"{cache['train']['tokens']:,}",
                escaped(", ".join(sizes)),
            )
            rows.append([_named(runs, number), *map(_cell, cells)])
    if not rows:
        return "<p>Not recorded: releases before 0.5 began these runs.</p>"
    return _table(head, rows, left=True)


def _settings(run: RunSummary) -> str:
    rows = [
        [_cell(escaped(name), head=True), _cell(_setting(value))]
        for name, value in sorted(run.settings.items())
    ]
    table = _table(["setting", "value"], rows, left=True)
    return f"<details><summary>{escaped(run.name)}</summary>{table}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: bool = False) -> str:
    first = "".join(f"<th>{text}</th>" for text in head)
    rest = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    kind = ' class="left"' if left else ""
    return (
        f'<div class="wide"><table{kind}><thead><tr>{first}</tr></thead>'
        f"<tbody>{rest}</tbody></table></div>"
    )


def _named(runs: Sequence[RunSummary], number: int, *, cell: bool = True) -> str:
    """A run's name with its colour, and in a table cell its loss in a few words."""
    run = runs[number]
    text = f'<span class="chip" style="background:{colour(number)}"></span>{escaped(run.name)}'
    return _cell(f"{text}<br><small>{escaped(run.kind)}</small>", head=True) if cell else text


def _cell(text: str, *, head: bool = False, best: bool = False) -> str:
    if head:
        return f"<th>{text}</th>"
    return f'<td class="best">{text}</td>' if best else f"<td>{text}</td>"


def _wrapped(text: str) -> str:
    return f'<div class="wrap">{escaped(text)}</div>'


def _formatted(value: Any, form: str) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, list):
        return " – ".join(form.format(x) for x in value)
    return _wrapped(value) if isinstance(value, str) else form.format(value)


def _setting(value: Any) -> str:
    """A setting as HTML, a hash shortened to its first 12 characters."""
    if value is None:
        return ABSENT
    text = str(value)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return escaped(text[:12] if is_hash else text)


def _last(run: RunSummary, name: str) -> Any:
    return next((line[name] for line in reversed(run.updates) if name in line), None)
