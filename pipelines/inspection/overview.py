"""The page of a whole cache: teacher, rows, bytes, how sure the teacher was, rows to browse."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from decant.foreign import escaped, page
from decant.pipelines.inspection import contents
from decant.pipelines.inspection.histogram import svg
from decant.pipelines.inspection.row import Origin
from decant.pipelines.inspection.row_page import style
from decant.pipelines.inspection.sampling import Sample
from decant.pipelines.inspection.sources import SourceCounts
from decant.pipelines.inspection.statistics import Statistics
from decant.schemas import Cache
from decant.schemas.disk.sizes import size_text

_EXTREMES = 8
"""Hardest and easiest rows that are listed."""
_OPEN_SOURCES, _MOST_SOURCES = 20, 5000
_BEGINNING = 160
_WIDEST = 44
"""Characters of a command beside which its reason fits a line."""
_BY_KL = '<option value="kl">largest KL to the student first</option>'


@dataclass(frozen=True)
class RowEntry:
    """A row that has a page. Means in nats; NaN for a row without targets."""

    row: int
    split: str
    address: str
    """Of its page, from the overview."""
    tokens: int
    entropy: float
    surprise: float
    kl: float | None
    """Mean KL to the student; None without one."""
    origins: tuple[Origin, ...]
    text: str


@dataclass(frozen=True)
class Overview:
    """All that the page shows."""

    cache: Cache
    teacher: dict[str, str]
    statistics: Statistics
    sources: Sequence[SourceCounts]
    counted: Sample
    """The rows whose sources were counted."""
    entries: Sequence[RowEntry]
    student: str
    """Whose predictions stand beside the teacher's; empty for none."""


def overview_page(shown: Overview) -> str:
    """The page's HTML."""
    name = (
        shown.cache.address
        if shown.cache.mirror
        else "/".join(shown.cache.path.resolve().parts[-2:])
    )
    values = {
        "title": escaped(f"Cache {name}"),
        "style": style(),
        "lead": escaped(_lead(shown)),
        "cards": "".join(
            f"<li><b>{value}</b><span>{what}</span></li>" for value, what in _cards(shown)
        ),
        "teacher": _definitions(shown.teacher | _ids(shown.cache)),
        "splits": _splits(shown.cache),
        "left_out": "".join(
            f"<p>{escaped(line)}</p>"
            for line in (*contents.writer_lines(shown.cache), *contents.left_out(shown.cache))
        ),
        "sizes": _sizes(shown),
        "measured": escaped(
            f"From {shown.statistics.sample.words}: {len(shown.statistics.entropy):,} positions "
            "with a target."
        ),
        "histograms": _histograms(shown.statistics),
        "extremes": _extremes(shown),
        "browsable": _browsable(shown),
        "orders": '<option value="kl">largest KL to the student first</option>'
        * bool(shown.student),
        "columns": _widths(beside=bool(shown.student)),
        "head": _head(beside=bool(shown.student)),
        "rows": "\n".join(_row(entry) for entry in shown.entries),
        "counted": escaped(_counted(shown)),
        "sources": _sources(shown.sources),
        "next": escaped("\n".join(next_commands(shown.cache))),
    }
    return page((Path(__file__).parent / "overview.html").read_text("utf-8"), values)


def next_commands(cache: Cache) -> list[str]:
    """Commands that one may want after looking at a cache, each with a reason."""
    path = shlex.quote(cache.address)
    commands = {
        f"decant inspect {path} --row 0": "one row, token by token",
        f"decant inspect {path} --html pages": "pages for a browser",
        f"decant inspect {path} --html pages --run RUN": "a student beside the teacher",
        f"decant verify {path}": "is every file and target right?",
        f"decant train --cache {path} --run RUN": "train a student from it",
    }
    if cache.mirror:
        del commands[f"decant verify {path}"]  # reads every file, which must be on this machine
    width = max(map(len, commands))
    if width > _WIDEST:
        return [line for command, why in commands.items() for line in (f"# {why}", command)]
    return [f"{command:{width}}  # {why}" for command, why in commands.items()]


def _lead(shown: Overview) -> str:
    manifest = shown.cache.manifest
    signals = ", ".join(manifest.signals)
    student = f" Beside the teacher: {shown.student}." if shown.student else ""
    return (
        f"A teacher's outputs ({signals}) at every position of a corpus, in rows of "
        f"{manifest.sequence_length:,} tokens.{student}"
    )


def _cards(shown: Overview) -> Iterator[tuple[str, str]]:
    units = [unit for part in shown.cache.manifest.parts for unit in part.units]
    scored = sum(unit.scored for unit in units)
    size = sum(entry.bytes for unit in units for entry in unit.files.values())
    yield f"{sum(unit.rows for unit in units):,}", "rows"
    yield f"{scored:,}", "positions with a target"
    yield size_text(size), "on disk"
    yield f"{size / max(scored, 1):,.0f}", "bytes a position"
    if len(shown.statistics.entropy):
        yield f"{shown.statistics.entropy.mean():.2f}", "mean entropy, nats"
        yield f"{shown.statistics.tail.mean():.1%}", "outside the stored ids"


def _ids(cache: Cache) -> dict[str, str]:
    manifest = cache.manifest
    of_signals = {
        f"signal id of {name}": signal.signal_id for name, signal in manifest.signals.items()
    }
    return {
        "cache id": manifest.cache_id,
        "rows id": manifest.rows_id,
        "tokenizer": manifest.tokenizer,
        **of_signals,
    }


def _definitions(facts: dict[str, str]) -> str:
    lines = []
    for name, value in facts.items():
        shown = escaped(value)
        if len(value) == 64 and value.isalnum():
            shown = f'<code title="{shown}">{shown[:16]}</code>'
        lines.append(f"<dt>{escaped(name)}</dt><dd>{shown}</dd>")
    return "".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, textual: int = 1) -> str:
    """A table of escaped cells; the first `textual` columns hold text, the others numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="{"name" if i < textual else "n"}">{value}</{tag}>'
            for i, value in enumerate(values)
        )

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{lines}</tbody></table>"


def _splits(cache: Cache) -> str:
    rows = [
        [split, *(f"{total:,}" for total in totals)]
        for split, *totals in contents.split_totals(cache)
    ]
    return _table(["split", "rows", "tokens", "with targets", "units"], rows)


def _sizes(shown: Overview) -> str:
    rows = []
    for size in contents.signal_sizes(shown.cache, shown.statistics.sample):
        name = escaped(size.signal) if size.signal else '<span class="quiet">of it:</span>'
        in_all = "" if size.bytes is None else size_text(size.bytes)
        rows.append([name, escaped(size.what), in_all, f"{size.per_target:,.1f}"])
    return _table(["signal", "what", "in all", "bytes a position"], rows, textual=2)


def _histograms(statistics: Statistics) -> str:
    if not len(statistics.entropy):
        return "<p>No position has a target.</p>"
    entropy = svg(
        statistics.entropy,
        np.linspace(0, 10, 21),
        title="Entropy",
        unit="nats; the last bin holds 10 and more",
    )
    tail = svg(statistics.tail, np.linspace(0, 1, 21), title="Tail mass", unit="probability")
    return (
        f"<div><h3>Entropy of the teacher's predictions</h3>{entropy}</div>"
        f"<div><h3>Probability outside the stored ids, T = 1</h3>{tail}</div>"
    )


def _extremes(shown: Overview) -> str:
    entries = {entry.row: entry for entry in shown.entries}
    lists = []
    for title, hardest in (("Hardest rows", True), ("Easiest rows", False)):
        chosen = shown.statistics.by_entropy(_EXTREMES, hardest=hardest)
        lines = "".join(_extreme(shown, int(i), entries) for i in chosen)
        lists.append(
            f'<div><h3>{title} <span class="quiet">by mean entropy</span></h3>'
            f'<ol class="rows">{lines}</ol></div>'
        )
    return "".join(lists)


def _extreme(shown: Overview, i: int, entries: dict[int, RowEntry]) -> str:
    statistics = shown.statistics
    row = int(statistics.sample.rows[i])
    figures = f"{statistics.row_entropy[i]:.2f} nats, surprise {statistics.row_surprise[i]:.2f}"
    if not (entry := entries.get(row)):
        return f"<li>row {row:,}: {figures}</li>"
    names = escaped(", ".join(dict.fromkeys(origin.source for origin in entry.origins)))
    return (
        f'<li><a href="{escaped(entry.address)}">row {row:,}</a>: {figures} '
        f'<span class="quiet">{names}</span><span class="cut">{_beginning(entry.text)}</span></li>'
    )


def _beginning(text: str) -> str:
    return escaped(" ".join(text[: 2 * _BEGINNING].split())[:_BEGINNING])


def _browsable(shown: Overview) -> str:
    held, of = len(shown.entries), shown.statistics.sample.of
    if held == of:
        return f"All {of:,} rows have a page. Search finds their texts."
    if not held:
        return "No row has a page: <code>--rows</code> says how many get one."
    return (
        f"{held:,} of {of:,} rows have a page: the hardest, the easiest and others spread evenly. "
        "Search finds the texts of these. <code>--rows</code> makes more pages, "
        "<code>--row N</code> one of a certain row."
    )


def _widths(*, beside: bool) -> str:
    numbers = 4 if beside else 3
    return (
        '<colgroup><col class="a"><col class="a">'
        + '<col class="b">' * numbers
        + "<col></colgroup>"
    )


def _head(*, beside: bool) -> str:
    cells = "".join(f'<th class="n">{name}</th>' for name in _numbers(beside=beside))
    return f"<th>row</th><th>split</th>{cells}<th>text and sources</th>"


def _numbers(*, beside: bool) -> list[str]:
    return ["tokens", "entropy", "surprise", *(["KL ≥"] if beside else [])]


def _row(entry: RowEntry) -> str:
    means = [entry.entropy, entry.surprise, *([] if entry.kl is None else [entry.kl])]
    numbers = zip(
        _numbers(beside=entry.kl is not None),
        [f"{entry.tokens:,}", *map(_mean, means)],
        strict=True,
    )
    kl = "" if entry.kl is None else f' data-kl="{entry.kl:.4f}"'
    places = "".join(
        f'<small data-source="{escaped(origin.source)}" data-document="{origin.document}">'
        f"{escaped(origin.source)}, document {origin.document}</small>"
        for origin in entry.origins
    )
    cells = "".join(f'<td class="n" data-name="{name}">{number}</td>' for name, number in numbers)
    return (
        f'<tr data-row="{entry.row}" data-entropy="{np.nan_to_num(entry.entropy):.4f}"{kl}>'
        f'<td data-name="row"><a href="{escaped(entry.address)}">{entry.row:,}</a></td>'
        f"<td>{entry.split}</td>{cells}"
        f'<td><details><summary><span class="cut">{_beginning(entry.text)}</span></summary>'
        f'<div class="text">{escaped(entry.text)}</div></details>{places}</td></tr>'
    )


def _mean(number: float) -> str:
    return "–" if np.isnan(number) else f"{number:.2f}"


def _counted(shown: Overview) -> str:
    text = f"{len(shown.sources):,} files; counted in {shown.counted.words}."
    return text if shown.counted.whole else f"{text} A file without a row among these has zeros."


def _sources(sources: Sequence[SourceCounts]) -> str:
    """The fullest sources; the others folded away, and beyond some thousands only their number."""
    head = ["file", "documents", "rows", "positions"]
    rows = [
        [escaped(one.name), f"{one.documents:,}", f"{one.rows:,}", f"{one.positions:,}"]
        for one in sources[:_MOST_SOURCES]
    ]
    shown = f'<div class="wide">{_table(head, rows[:_OPEN_SOURCES])}</div>'
    if rest := rows[_OPEN_SOURCES:]:
        shown += (
            f"<details><summary>{len(rest):,} more files</summary>"
            f'<div class="wide">{_table(head, rest)}</div></details>'
        )
    if left := len(sources) - len(rows):
        shown += f"<p>{left:,} more are listed in the cache's manifest.json.</p>"
    return shown
