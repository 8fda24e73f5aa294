"""The contents of a sealed cache in the terminal: counts, bytes, how sure the teacher was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from decant.pipelines.inspection.sampling import Sample
from decant.pipelines.inspection.statistics import Statistics
from decant.schemas import Cache
from decant.schemas.disk.layout import LOGITS, ROWS
from decant.schemas.disk.sizes import size_text
from decant.schemas.manifest.manifest import SPLITS
from decant.schemas.signals import (
    AttentionSignal,
    CountsSignal,
    HiddenSignal,
    LogitsSignal,
    Signal,
    SketchSignal,
)

_BAR_WIDTH = 20
_LEAST_SHARE = 0.0005
_WRITERS = 5
"""Models that a line names."""
ENTROPY_EDGES = np.arange(0, 11)
TAIL_EDGES = np.linspace(0, 1, 11)


@dataclass(frozen=True)
class SignalSize:
    """Bytes on disk of a signal, or of one of its fields."""

    signal: str
    """Empty for a field of the signal before it."""
    what: str
    bytes: int | None
    """None for a field, which is only measured on a sample."""
    per_target: float


def splits_table(cache: Cache) -> Table:
    """Rows, tokens, positions with targets and units of each split."""
    table = _table("split", "rows", "tokens", "positions with targets", "units")
    for split, *totals in split_totals(cache):
        table.add_row(split, *(f"{total:,}" for total in totals))
    return table


def split_totals(cache: Cache) -> Iterator[tuple[str, int, int, int, int]]:
    """Of each split: its name, rows, tokens, positions with targets, units."""
    units = [unit for part in cache.manifest.parts for unit in part.units]
    for split in SPLITS:
        of_split = [unit for unit in units if unit.split == split]
        rows, tokens, scored = (
            sum(getattr(u, name) for u in of_split) for name in ("rows", "tokens", "scored")
        )
        yield split, rows, tokens, scored, len(of_split)


def group_lines(cache: Cache) -> list[str]:
    """A line on each group of files that the corpus was captured in; none without groups."""
    units = [unit for part in cache.manifest.parts for unit in part.units]

    def rows(group: str, split: str) -> int:
        return sum(unit.rows for unit in units if (unit.group, unit.split) == (group, split))

    return [
        f"group {name}: {rows(name, 'train'):,} rows to train on, {rows(name, 'heldout'):,} held "
        f"out; weight {weight:g}"
        for name, weight in cache.manifest.source_weights.items()
    ]


def writer_lines(cache: Cache) -> list[str]:
    """A line on the rollouts, with the models that wrote most of them; none without rollouts."""
    writers = cache.manifest.writers
    shown = [f"{count:,} by {name or 'a model without a name'}" for name, count in writers.items()]
    more = [f"{len(shown) - _WRITERS} more writers"] if len(shown) > _WRITERS else []
    return [f"rollouts: {', '.join([*shown[:_WRITERS], *more])}"] if shown else []


def left_out(cache: Cache) -> list[str]:
    """A line each on duplicates, skipped documents and rows, and what was forgotten; or none."""
    parts = cache.manifest.parts
    once = list({part.path: part for part in parts}.values())
    counts = {
        "duplicate documents were left out": sum(part.duplicates for part in once),
        "documents were left out because of errors": sum(len(part.skipped) for part in once),
        "rows have no targets, because the teacher's outputs were not finite": sum(
            len(unit.skipped_rows) for part in parts for unit in part.units
        ),
    }
    lost = Counter[str]()
    for part in once:
        lost.update(part.unwritten)
    counts |= {f"chats lost their {name} in the chat template": n for name, n in lost.items()}
    lines = [f"{count:,} {what}" for what, count in counts.items() if count]
    return [*lines, *filter(None, [forgotten_summary(cache)])]


def forgotten_summary(cache: Cache) -> str:
    """One line on forgotten documents, files and rows; empty if nothing was forgotten."""
    parts = cache.manifest.parts
    once = {(part.path, place) for part in parts for place in part.forgotten}
    documents = sum(place.document is not None for _, place in once)
    files, rows = len(once) - documents, sum(len(part.forgotten_rows) for part in parts)
    if not once:
        return ""
    counts = [f"{n:,} {name}{'s' * (n != 1)}" for n, name in ((documents, "document"),) if n]
    counts += [f"{n:,} whole file{'s' * (n != 1)}" for n in (files,) if n]
    return f"forgotten: {' and '.join(counts)}; {rows:,} rows held nothing else and are left out"


def sizes_table(cache: Cache, sample: Sample) -> Table:
    """Bytes on disk of each signal; logits also by field, measured on the rows of `sample`."""
    table = _table("signal", "what", "in all", "bytes a position")
    for size in signal_sizes(cache, sample):
        what = size.what if size.signal else f"  {size.what}"
        in_all = "" if size.bytes is None else size_text(size.bytes)
        style = "" if size.signal else "dim"
        table.add_row(size.signal, what, in_all, f"{size.per_target:,.1f}", style=style)
    return table


_MEASURED = 256
"""Rows whose fields are measured, at most."""


def signal_sizes(cache: Cache, sample: Sample) -> list[SignalSize]:
    """Bytes of each signal; the lines after `logits` are its fields."""
    manifest = cache.manifest
    units = [unit for part in manifest.parts for unit in part.units]
    sizes = Counter[str]()
    for unit in units:
        sizes.update({name: entry.bytes for name, entry in unit.files.items()})
    scored = max(1, sum(unit.scored for unit in units))
    lines = []
    for name in (ROWS, *manifest.signals):
        what = describe(manifest.signals[name]) if name in manifest.signals else "tokens"
        lines.append(SignalSize(name, what, sizes[name], sizes[name] / scored))
        if name == LOGITS and len(sample.rows):
            measured = sample.rows[:: -(-len(sample.rows) // _MEASURED)]
            fields = cache.logits_bytes(measured)
            targets = max(1, int(cache.read(measured, signals=())["loss_mask"].sum()))
            each = {field: size / targets for field, size in fields.items()}
            each["files' own"] = sizes[name] / scored - sum(each.values())
            lines += [SignalSize("", field, None, size) for field, size in each.items()]
    return lines


def histograms(statistics: Statistics) -> str:
    """Histograms over the sample's targets, side by side: entropy, and mass outside the top-k."""
    entropy, tail = statistics.entropy, statistics.tail
    left = _histogram(entropy, ENTROPY_EDGES, "{:.0f}")
    right = _histogram(tail, TAIL_EDGES, "{:.1f}")
    titles = f"teacher's entropy, mean {_mean(entropy):.2f}", "outside the stored ids, mean "
    sides = [titles[0], *left], [titles[1] + f"{_mean(tail):.3f}", *right]
    lines = [f"{left:40}{right}".rstrip() for left, right in zip_longest(*sides, fillvalue="")]
    return "\n".join(
        [f"{len(entropy):,} positions of {statistics.sample.words}; nats, and probability", *lines]
    )


def shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of the values in each bin; values beyond the last edge count in the last bin."""
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    return counts / max(1, counts.sum())


def _histogram(values: np.ndarray, edges: np.ndarray, form: str) -> list[str]:
    """One line a bin, up to the last bin that holds enough to be seen."""
    found = shares(values, edges)
    widest = max(found.max(), 1e-9)
    last = int(np.flatnonzero(found >= _LEAST_SHARE).max(initial=0))
    lines = []
    for low, high, share in zip(edges[:-1], edges[1:], found[: last + 1], strict=False):
        bar = "█" * round(_BAR_WIDTH * share / widest)
        span = f"{form.format(low)}–{form.format(high)}"
        lines.append(f" {span:>7} {bar:{_BAR_WIDTH}} {share:6.1%}")
    return lines


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        textual = number == 0 or name == "what"
        table.add_column(name, justify="left" if textual else "right")
    return table


def describe(signal: Signal) -> str:
    """A signal's settings in a few words."""
    if isinstance(signal, LogitsSignal):
        mass = f" at most, for {signal.mass:.1%} of the mass" if signal.mass is not None else ""
        draws = f", {signal.draws} draws" if signal.draws else ""
        labels = ", next tokens" if signal.labels else ""
        return f"{signal.profile}, k = {signal.k}{mass}{draws}{labels}"
    if isinstance(signal, CountsSignal):
        return f"{signal.draws} draws of the whole distribution"
    if isinstance(signal, SketchSignal):
        step = f"step {signal.step:g}" if signal.step else "float32"
        dither = ", dithered" if signal.dither else ""
        return (
            f"rank {signal.rank} of {signal.teacher_width}, {step}{dither}, "
            f"{signal.variance_kept:.1%} of variance"
        )
    if isinstance(signal, HiddenSignal):
        kept = f", {signal.variance_kept:.1%} of variance" if signal.directions else ""
        return f"{signal.dtype}, width {signal.width} of {signal.teacher_width}{kept}"
    assert isinstance(signal, AttentionSignal)
    return f"{signal.dtype}, {signal.stored_heads} of {signal.teacher_heads} heads"
