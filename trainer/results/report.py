"""The command `report`: one HTML page that compares runs, and its charts as PNGs.

The page needs no other file and no network; the same runs give the same page.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decant.foreign import escaped
from decant.foreign import page as filled_page
from decant.schemas.disk.atomic import write_bytes
from decant.trainer.config import Report
from decant.trainer.results.charts import HELDOUT, as_svg, charts, write_png
from decant.trainer.results.report_tables import (
    all_measures,
    cell,
    chip,
    summary,
    table,
    teachers_line,
)
from decant.trainer.results.run_summary import ABSENT, RunSummary, differences, read_run_summaries
from decant.trainer.results.samples import samples_of
from decant.trainer.results.seed_groups import Group, group_by_seed
from decant.trainer.results.sweep import read_comparison

PAGE = "report.html"
HELDOUT_CHARTS = "learned.png"
"""File of the three held-out curves in one picture."""

Samples = Mapping[int, list[dict[str, str]] | str]
"""By the group's number: its samples, or why it has none."""


def report(config: Report) -> Path:
    """Write the page and the pictures into `config.output`; returns the page's path.

    Raises FileNotFoundError for a directory that holds neither a run nor a sweep.
    """
    runs = read_run_summaries(config.runs)
    groups = group_by_seed(runs)
    drawings = charts(groups)
    images = {name: as_svg(draw) for name, draw in drawings.items()}
    config.output.mkdir(parents=True, exist_ok=True)
    for name, draw in drawings.items():
        write_png([draw], config.output / f"{name.replace(' ', '-')}.png")
    write_png([drawings[name] for name in HELDOUT], config.output / HELDOUT_CHARTS)
    text = page(groups, images, _samples(groups, config), failed=_failed(config.runs))
    write_bytes(config.output / PAGE, text.encode())
    return config.output / PAGE


def _samples(groups: Sequence[Group], config: Report) -> Samples:
    """Samples of the first run of each group. A run that cannot give any does not stop the
    report."""
    if not config.samples and not config.prompts:
        return {}
    samples: dict[int, list[dict[str, str]] | str] = {}
    for group in groups:
        try:
            samples[group.number] = samples_of(group.runs[0].path, config)
        except (ValueError, OSError, FloatingPointError) as error:
            samples[group.number] = str(error)
    return samples


def _failed(paths: Sequence[Path]) -> dict[str, str]:
    """Students that failed in these sweeps, and why, as far as the sweeps have ended."""
    return {k: v for path in paths for k, v in read_comparison(path)["failed"].items()}


def page(
    groups: Sequence[Group],
    images: Mapping[str, bytes],
    samples: Samples,
    *,
    failed: Mapping[str, str],
) -> str:
    """The page's HTML; `images` are the charts as SVG, by name."""
    runs = [run for group in groups for run in group.runs]
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"Run {runs[0].name}"
    body = [
        f"<h1>{escaped(title)}</h1>",
        summary(groups),
        *(f'<p class="note">{escaped(f"{k} failed: {why}")}</p>' for k, why in failed.items()),
        _details("All measures of each run", all_measures(groups)),
        "<h2>Curves</h2>",
        _legend(groups),
        _charts(images),
        *_samples_section(groups, samples),
        "<h2>Settings that differ</h2>",
        _differences(groups),
        "<h2>Caches</h2>",
        _caches(groups),
        "<h2>All settings</h2>",
        *(_details(escaped(run.name), _settings(run)) for run in runs),
    ]
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    return filled_page(template, {"title": escaped(title), "body": "\n".join(body)})


def _legend(groups: Sequence[Group]) -> str:
    """The one legend of all charts."""
    entries = [f"<li>{chip(group.number)}{escaped(group.name)}</li>" for group in groups]
    if teachers_line(groups):
        entries.append('<li><span class="line teacher"></span>the teacher</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _charts(images: Mapping[str, bytes]) -> str:
    figures = [
        f'<img alt="{escaped(name.replace("_", " "))}" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(image).decode()}">'
        for name, image in images.items()
    ]
    return '<div class="charts">' + "\n".join(figures) + "</div>"


def _samples_section(groups: Sequence[Group], samples: Samples) -> list[str]:
    """For each prompt: the text itself, then how each student goes on."""
    if not samples:
        return []
    lists = [each for each in samples.values() if not isinstance(each, str)]
    prompts = {(one["prompt"], one["goes_on"]): None for each in lists for one in each}
    parts = ["<h2>Samples</h2>"]
    for prompt, goes_on in prompts:
        lines = [f'<p class="prompt">{_text(prompt)}</p>']
        if goes_on:
            lines.append(_sample("the text itself", goes_on))
        for group in groups:
            each = samples[group.number]
            name = chip(group.number) + escaped(group.name)
            chosen = [] if isinstance(each, str) else [x for x in each if x["prompt"] == prompt]
            lines += [_sample(name, one["sample"]) for one in chosen]
        parts.append(f'<div class="samples">{"".join(lines)}</div>')
    missing = [(group.name, samples[group.number]) for group in groups]
    return parts + [
        f'<p class="note">{escaped(name)}: no samples. {escaped(why)}</p>'
        for name, why in missing
        if isinstance(why, str)
    ]


def _sample(name: str, text: str) -> str:
    return f"<p><small>{name}</small><br>{_text(text)}</p>"


def _text(text: str) -> str:
    """Text with its line breaks."""
    return f'<span class="text">{escaped(text)}</span>'


def _differences(groups: Sequence[Group]) -> str:
    """A row a setting if the runs fit side by side, else a row a run: never wider than needed."""
    runs = [run for group in groups for run in group.runs]
    differing = differences(runs)
    if not differing:
        return "<p>One run only.</p>" if len(runs) == 1 else "<p>None: all settings agree.</p>"
    names = _names(groups)
    if len(runs) <= len(differing):
        rows = [
            [cell(escaped(name), head=True), *(cell(_setting(value)) for value in values)]
            for name, values in differing.items()
        ]
        return table(["setting", *names], rows, left=True)
    rows = [
        [cell(name, head=True), *(cell(_setting(values[at])) for values in differing.values())]
        for at, name in enumerate(names)
    ]
    return table(["run", *map(escaped, differing)], rows, left=True)


def _caches(groups: Sequence[Group]) -> str:
    """One row for each cache, with the number of runs that read it."""
    runs = [run for group in groups for run in group.runs]
    caches: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for run in runs:
        for facts in run.caches:
            sizes = str(facts["bytes_per_token"])
            caches.setdefault(facts["cache_id"] + sizes, (facts, []))[1].append(run.name)
    if not caches:
        return "<p>Not recorded: releases before 0.5 began these runs.</p>"
    head = ["cache", "teacher", "train rows", "train tokens", "bytes a token, by signal"]
    if len(caches) > 1:
        head.append("runs")
    rows = []
    for facts, readers in caches.values():
        sizes = ", ".join(f"{name} {size:,.1f}" for name, size in facts["bytes_per_token"].items())
        cells = [
            f"<code>{escaped((facts['teacher_id'] or ABSENT)[:12])}</code>",
            f"{facts['train']['rows']:,}",
            f"{facts['train']['tokens']:,}",
            f'<div class="wrap">{escaped(sizes)}</div>',
        ]
        if len(caches) > 1:
            cells.append(f'<div class="wrap">{escaped(", ".join(readers))}</div>')
        first = cell(f"<code>{escaped(facts['cache_id'][:12])}</code>", head=True)
        rows.append([first, *map(cell, cells)])
    return table(head, rows, left=True)


def _settings(run: RunSummary) -> str:
    rows = [
        [cell(escaped(name), head=True), cell(_setting(value))]
        for name, value in sorted(run.settings.items())
    ]
    return table(["setting", "value"], rows, left=True)


def _names(groups: Sequence[Group]) -> list[str]:
    return [chip(group.number) + escaped(run.name) for group in groups for run in group.runs]


def _details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _setting(value: Any) -> str:
    """A setting as HTML, a hash shortened to its first 12 characters."""
    if value is None:
        return ABSENT
    text = str(value)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return escaped(text[:12] if is_hash else text)
