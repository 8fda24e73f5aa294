"""One row as a self-contained web page: shaded tokens, candidates, draws, attention, norms.

The text, the shades and a table of all numbers need no script; the script reads that table.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from decant.foreign import escaped, page
from decant.pipelines.inspection.row import Origin, Prediction, Token, visible
from decant.pipelines.inspection.row_table import is_written
from decant.schemas import Cache
from decant.schemas.signals import AttentionSignal, HiddenSignal
from decant.schemas.targets.attention import encode_log

_HERE = Path(__file__).parent
_MOST_BYTES = 24 << 20
"""Of attention maps in a page. Beyond it, a layer's heads are averaged, or the layer left out."""
_SHADES = 10


class View(NamedTuple):
    """A number of each prediction by which tokens are shaded, without a script."""

    code: str
    """A letter; a token's classes are this letter and its shade, `e3`."""
    name: str
    high: float
    """The number that has the darkest shade, and every larger one."""
    unit: str


ENTROPY = View("e", "entropy", 6, "nats")
SURPRISE = View("u", "surprise, −ln p", 8, "nats")
TAIL = View("t", "outside the stored ids", 1, "")
KL = View("k", "KL to the student", 3, "nats")


@dataclass(frozen=True)
class Neighbours:
    """Where a row's page links to; addresses are relative to it, and None if there is no page."""

    previous: tuple[int, str] | None = None
    """Row and address."""
    next: tuple[int, str] | None = None
    overview: str | None = None


def row_page(
    cache: Cache,
    row: int,
    tokens: Sequence[Token],
    *,
    origins: Sequence[Origin] = (),
    neighbours: Neighbours | None = None,
    student: str = "",
    maps: bool = True,
) -> str:
    """HTML of the page for row `row`, whose `tokens` come from `row_tokens`.

    `student` says whose predictions stand beside the teacher's. Without `maps` the page leaves out
    attention maps, which may be megabytes.
    """
    neighbours = neighbours or Neighbours()
    places = [token.position for token in tokens]
    attention, notes_on_maps = _attention(cache, row, places if maps else [])
    beside = any(t.prediction and t.prediction.kl is not None for t in tokens)
    written = is_written(tokens)
    views = [ENTROPY, SURPRISE, TAIL, *([KL] if beside else [])]
    norms = _norms(cache, row, places)
    data = {"student": beside, "writer": written, "norms": norms, "attention": attention}
    # "<" is escaped, so that "</script>" in a name does not end the script.
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    heads = _columns(beside=beside, written=written)
    name = cache.address if cache.mirror else cache.path.resolve().name
    values = {
        "title": escaped(f"Row {row:,} of {name}"),
        "style": style(),
        "shading": "\n".join(_shading(views)),
        "nav": _navigation(neighbours),
        "notes": "".join(f"<p>{line}</p>" for line in _notes(tokens, student, notes_on_maps)),
        "views": "".join(_radio(view, checked=view is ENTROPY) for view in views),
        "legends": "".join(map(_legend, views)) + _MORE_LEGEND,
        "row_keys": " <kbd>p</kbd> <kbd>n</kbd>: other rows." if neighbours.overview else "",
        "text": _text(tokens, origins, views),
        "after": "" if tokens else "<p>This row holds nothing.</p>",
        "columns": " ".join(f"<b>{name}</b> {what}" for name, what in heads.values() if what),
        "head": "<tr>" + "".join(f"<th>{name}" for name, _ in heads.values()),
        "numbers": "\n".join(_line(token, beside=beside, written=written) for token in tokens),
        "data": embedded,
    }
    return page((_HERE / "row_page.html").read_text("utf-8"), values)


def style() -> str:
    """The style that all pages share."""
    return (_HERE / "pages.css").read_text("utf-8")


def _navigation(neighbours: Neighbours) -> str:
    links = []
    if neighbours.overview:
        links.append(f'<a href="{escaped(neighbours.overview)}">overview</a>')
    for way, arrow, pair in (
        ("prev", "← row {:,}", neighbours.previous),
        ("next", "row {:,} →", neighbours.next),
    ):
        if pair:
            row, address = pair
            text = arrow.format(row)
            links.append(f'<a rel="{way}" href="{escaped(address)}">{text}</a>')
        elif neighbours.overview:
            end = "first page" if way == "prev" else "last page"
            links.append(f'<span class="quiet">{end}</span>')
    return "".join(links)


def _notes(tokens: Sequence[Token], student: str, on_maps: Sequence[str]) -> Iterator[str]:
    """The page's first lines: counts and means, the student, what is left out."""
    predictions = [token.prediction for token in tokens if token.prediction]
    line = f"{len(tokens):,} tokens, {len(predictions):,} with targets"
    if predictions:
        means = {
            "entropy": np.mean([p.entropy for p in predictions]),
            "surprise": np.mean([p.surprise for p in predictions]),
        }
        kls = [p.kl for p in predictions if p.kl is not None]
        if kls:
            means["KL to the student ≥"] = np.mean(kls)
        line += "; means in nats: " + ", ".join(f"{n} {v:.2f}" for n, v in means.items())
    yield escaped(line)
    if student:
        yield escaped(student)
    for note in on_maps:
        yield f'<span class="quiet">{escaped(note)}</span>'


def _shading(views: Sequence[View]) -> Iterator[str]:
    """Rules that shade tokens by the view whose radio button is checked."""
    for view in views:
        yield f"body:has(#v-{view.code}:checked) .legend.{view.code} {{ display: flex; }}"
        for i in range(1, _SHADES):
            chosen = f"body:has(#v-{view.code}:checked) .{view.code}{i}"
            yield f"{chosen} {{ background: var(--s{i}); }}"
    for i in range(1, _SHADES):
        yield f".x{i} {{ background: var(--s{i}); }}"


def _radio(view: View, *, checked: bool) -> str:
    on = " checked" if checked else ""
    button = f'<input type="radio" name="view" id="v-{view.code}" value="{view.code}"{on}>'
    return f"<label>{button}{view.name}</label>"


_SWATCHES = "".join(f'<i style="background:var(--s{i})"></i>' for i in range(_SHADES))
_MORE_LEGEND = (
    f'<span class="legend more"><span id="more-low"></span><b>{_SWATCHES}</b>'
    '<span id="more-high"></span></span>'
)


def _legend(view: View) -> str:
    least = "" if view.high == 1 else "≥ "
    return (
        f'<span class="legend {view.code}"><span>0</span><b>{_SWATCHES}</b>'
        f"<span>{least}{view.high:g} {view.unit}</span></span>"
    )


def _text(tokens: Sequence[Token], origins: Sequence[Origin], views: Sequence[View]) -> str:
    """The row's tokens, each segment below the place that it is from."""
    places = {origin.segment: origin for origin in origins}
    pieces = []
    for segment, inside in groupby(tokens, key=lambda token: token.segment):
        if origin := places.get(segment):
            start = f", from its token {origin.start:,} on" if origin.start else ""
            pieces.append(
                f"<h2>{escaped(origin.source)} "
                f'<span class="quiet">document {origin.document}{start}</span></h2>'
            )
        spans = "".join(_span(token, views) for token in inside)
        pieces.append(f'<div class="text">{spans}</div>')
    return "".join(pieces)


def _span(token: Token, views: Sequence[View]) -> str:
    classes = ["o"] if token.prediction is None else list(_shades(token.prediction, views))
    if "\n" in token.text:
        classes.append("b")  # so that a line feed can be seen and clicked
    named = f' class="{" ".join(classes)}"' if classes else ""
    return f"<span{named}>{escaped(token.text)}</span>"


def _shades(prediction: Prediction, views: Sequence[View]) -> Iterator[str]:
    numbers = {
        ENTROPY: prediction.entropy,
        SURPRISE: prediction.surprise,
        TAIL: prediction.tail,
        KL: prediction.kl,
    }
    for view in views:
        number = numbers[view]
        if number is not None and math.isfinite(number):
            shade = min(_SHADES - 1, max(0, int(_SHADES * number / view.high)))
            if shade:
                yield f"{view.code}{shade}"


def _columns(*, beside: bool, written: bool) -> dict[str, tuple[str, str]]:
    """Of each column of the table: its heading, and what it means."""
    whose = "both models', with both probabilities" if beside else "the teacher's"
    columns = {
        "place": ("#", ""),
        "token": ("token", ""),
        "p": ("p", "is the teacher's probability of the token, – if it is not among the stored."),
        "entropy": ("entropy", "is that of the teacher's prediction, in nats."),
        "tail": ("tail", "is the probability of all tokens that are not stored."),
        "likely": ("likeliest", f"are the likeliest tokens: {whose}."),
        "draws": ("draws", "are the likeliest tokens that were drawn from the tail."),
    }
    if beside:
        columns["student"] = ("student", "is the student's probability of the token.")
        meaning = "is the divergence from teacher to student in nats, with the tail as one token."
        columns["kl"] = ("KL ≥", meaning)
    if written:
        meaning = "is the probability that the model gave to the token when it wrote it."
        columns["writer"] = ("writer", meaning)
    return columns


def _line(token: Token, *, beside: bool, written: bool) -> str:
    """A line of the table. End tags are left out, as HTML allows: there may be thousands."""
    start = f'<tr><td class="n">{token.position}<td class="text">{escaped(visible(token.text))}'
    prediction = token.prediction
    if prediction is None:
        return start + "<td>" * (5 + 2 * beside + written)
    likely = " ".join(
        _pair(one.text, one.teacher, *([one.student] if beside else []))
        for one in prediction.alternatives
    )
    draws = " ".join(_pair(text, p) for text, p in prediction.draws)
    numbers = [share(prediction.probability), f"{prediction.entropy:.2f}"]
    cells = [*numbers, f"{prediction.tail:.4f}", likely, draws]
    if beside:
        cells += [share(prediction.student_probability), f"{prediction.kl:.2f}"]
    if written:
        cells.append(share(prediction.writer_probability))
    return start + "".join(f"<td>{cell}" for cell in cells)


def _pair(text: str, *probabilities: float | None) -> str:
    return f"{_bold(text)} {' '.join(map(share, probabilities))}"


@lru_cache(1 << 16)
def _bold(text: str) -> str:
    return f"<b>{escaped(visible(text))}</b>"


def share(p: float | None) -> str:
    """A probability with three digits that count; – if it is not known."""
    if p is None:
        return "–"
    return f"{p:.3f}" if p >= 0.0995 or p == 0 else f"{p:#.2g}"


def _attention(
    cache: Cache, row: int, places: Sequence[int]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Maps of every stored layer, and notes on layers that are averaged or left out.

    A map is base64 of uint8-log codes [heads, places, places].
    """
    signals = cache.manifest.signals
    names = [name for name, signal in signals.items() if isinstance(signal, AttentionSignal)]
    if names and not places:
        return [], ["Attention maps: decant inspect CACHE --row N --html row.html"]
    layers, notes, used = [], [], 0
    for name in names:
        maps = cache.read([row], signals=(name,))[name][0].astype(np.float32)
        maps = maps[:, places][:, :, places]
        if used + maps.size > _MOST_BYTES:
            maps = maps.mean(axis=0, keepdims=True)
            notes.append(f"{name}: the mean of its heads, all would be too large for a page")
        if used + maps.size > _MOST_BYTES:
            notes[-1] = f"{name}: left out, too large for a page"
            continue
        used += maps.size
        codes = base64.b64encode(encode_log(maps).tobytes()).decode()
        layers.append({"name": name, "heads": len(maps), "codes": codes})
    return layers, notes


def _norms(cache: Cache, row: int, places: Sequence[int]) -> dict[str, list[float]]:
    """Euclidean norm of the states of every stored layer at each place, by signal name."""
    norms_by_signal = {}
    for name, signal in cache.manifest.signals.items():
        if isinstance(signal, HiddenSignal):
            states = cache.read([row], signals=(name,))[name][0, places].astype(np.float32)
            norms = np.linalg.norm(states, axis=-1)
            norms_by_signal[name] = [round(float(norm), 3) for norm in norms]
    return norms_by_signal
