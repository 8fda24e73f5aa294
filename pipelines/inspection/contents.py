"""What a sealed cache holds and where its bytes go; one row of it, token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from rich.table import Table

from decant.models.text.tokenizer import Tokenizer
from decant.schemas import Cache
from decant.schemas.disk.layout import LOGITS, ROWS
from decant.schemas.manifest.manifest import SPLITS
from decant.schemas.records.rows import PADDING
from decant.schemas.signals import AttentionSignal, HiddenSignal, LogitsSignal, Signal
from decant.schemas.targets.targets import tail_logmass_at

_BARS = 40
_STEP = 1e-3


@dataclass(frozen=True)
class Prediction:
    """What the teacher said of one token before it read it."""

    entropy: float
    """Of the whole distribution, in nats."""
    tail: float
    """Probability outside the stored ids."""
    probability: float | None
    """Of the token that came; None where it is not among the stored ids."""
    alternatives: tuple[tuple[str, float], ...]
    """The likeliest tokens and their probabilities, falling."""


@dataclass(frozen=True)
class Token:
    """One position of a row; padding is left out."""

    text: str
    segment: int
    prediction: Prediction | None
    """None where nothing is stored: a document's first token, a prompt."""


def entropies(
    logprobs: Float[np.ndarray, "n k"], tail_logmass: Float[np.ndarray, "n nodes"]
) -> Float[np.ndarray, " n"]:
    """Entropy in nats of each stored distribution, its tail included.

    The tail's share is −exp(A(1))·A'(1): the derivative of a log of sums of exponentials is their
    mean exponent. As exact as the grid of A, to about 0.02 nats where it is stored in levels.
    """
    head, tail = logprobs.astype(np.float64), tail_logmass.astype(np.float64)
    with np.errstate(invalid="ignore"):
        of_head = -np.where(np.isfinite(head), np.exp(head) * head, 0).sum(1)
        last, before, first = (tail_logmass_at(tail, 1 - i * _STEP) for i in range(3))
        slope = (3 * last - 4 * before + first) / (2 * _STEP)
        of_tail = np.where(np.isfinite(last), -np.exp(last) * slope, 0)
    return of_head + of_tail


def tokens_of(cache: Cache, row: int, tokenizer: Tokenizer, *, top: int) -> list[Token]:
    """A row as people read it, with the `top` likeliest tokens of each prediction."""
    batch = {name: array[0] for name, array in cache.read([row]).items()}
    scored = np.flatnonzero(batch["loss_mask"])
    ids, logprobs = batch["topk_ids"][scored], batch["topk_logprobs"][scored]
    entropy = entropies(logprobs, batch["tail_logmass"][scored])
    tails = np.exp(batch["tail_logmass"][scored, -1])
    predictions: dict[int, Prediction] = {}
    for i, at in enumerate(scored):
        came = int(batch["tokens"][at + 1])
        place = np.flatnonzero(ids[i] == came)
        likeliest = zip(ids[i][:top], np.exp(logprobs[i][:top]), strict=True)
        predictions[int(at) + 1] = Prediction(
            entropy=float(entropy[i]),
            tail=float(tails[i]),
            probability=float(np.exp(logprobs[i][place[0]])) if len(place) else None,
            alternatives=tuple((tokenizer.decode([j]), float(p)) for j, p in likeliest),
        )
    return [
        Token(tokenizer.decode([token]), int(segment), predictions.get(at))
        for at, (token, segment) in enumerate(
            zip(batch["tokens"], batch["segment_ids"], strict=True)
        )
        if segment != PADDING
    ]


def contents(cache: Cache) -> Table:
    """Rows, tokens and targets by split."""
    units = [unit for part in cache.manifest.parts for unit in part.units]
    table = Table("split", "rows", "tokens", "with targets", "units", title=str(cache.path))
    for split in SPLITS:
        of_split = [unit for unit in units if unit.split == split]
        totals = (sum(getattr(u, name) for u in of_split) for name in ("rows", "tokens", "scored"))
        table.add_row(split, *(f"{total:,}" for total in totals), f"{len(of_split):,}")
    return table


def forgotten(cache: Cache) -> str:
    """What was forgotten; empty if nothing was."""
    parts = cache.manifest.parts
    once = {(part.path, place) for part in parts for place in part.forgotten}
    documents = sum(place.document is not None for _, place in once)
    files, rows = len(once) - documents, sum(len(part.forgotten_rows) for part in parts)
    if not once:
        return ""
    what = [f"{n:,} {name}{'s' * (n != 1)}" for n, name in ((documents, "document"),) if n]
    what += [f"{n:,} whole file{'s' * (n != 1)}" for n in (files,) if n]
    return (
        f"forgotten: {' and '.join(what)}; {rows:,} rows held nothing else and are not counted on"
    )


def origins(cache: Cache, row: int) -> list[str]:
    """Where each document of a row comes from, without those that are forgotten."""
    return [
        f"{name}, document {document}, from its token {start} on"
        for name, document, start in cache.origins(row)
    ]


def sizes(cache: Cache, sample: Sequence[int] | np.ndarray) -> Table:
    """Bytes of every signal on disk; those of logits by field, as `sample` has them."""
    manifest = cache.manifest
    units = [unit for part in manifest.parts for unit in part.units]
    found = Counter[str]()
    for unit in units:
        found.update({name: entry.bytes for name, entry in unit.files.items()})
    scored = max(1, sum(unit.scored for unit in units))
    table = Table("signal", "what", "MB", "bytes a target", title="where the bytes go")
    for name in (ROWS, *manifest.signals):
        what = _described(manifest.signals[name]) if name in manifest.signals else "tokens"
        table.add_row(name, what, f"{found[name] / 1e6:,.1f}", f"{found[name] / scored:,.1f}")
        if name == LOGITS and len(sample):
            fields = cache.logits_bytes(sample)
            targets = int(cache.read(sample, signals=())["loss_mask"].sum())
            each = {field: size / max(1, targets) for field, size in fields.items()}
            each["files' own"] = found[name] / scored - sum(each.values())
            for field, size in each.items():
                table.add_row("", f"  {field}", "", f"{size:,.1f}", style="dim")
    return table


def distributions(cache: Cache, sample: Sequence[int] | np.ndarray) -> str:
    """Histograms over the targets of some rows: entropy, and mass outside the stored ids."""
    batch = cache.read(sample)
    scored = batch["loss_mask"]
    tails = batch["tail_logmass"][scored]
    entropy = entropies(batch["topk_logprobs"][scored], tails)
    mass = np.exp(tails[:, -1])
    n = f"{int(scored.sum()):,} targets of {len(sample)} rows"
    return "\n".join(
        [
            f"teacher's entropy, nats; mean {entropy.mean():.2f}  ({n})",
            *_histogram(entropy, np.arange(0, 11), "{:4.0f}"),
            f"mass outside the stored ids at T = 1; mean {mass.mean():.3f}",
            *_histogram(mass, np.linspace(0, 1, 11), "{:4.1f}"),
        ]
    )


def row_table(tokens: Sequence[Token]) -> Table:
    """A row for the terminal."""
    table = Table("token", "p", "entropy", "tail", "the teacher's likeliest", show_lines=False)
    for token in tokens:
        said = token.prediction
        if said is None:
            table.add_row(_visible(token.text), "", "", "", "", style="dim")
            continue
        likely = "  ".join(f"{_visible(text)} {p:.2f}" for text, p in said.alternatives)
        p = "–" if said.probability is None else f"{said.probability:.3f}"
        table.add_row(_visible(token.text), p, f"{said.entropy:.2f}", f"{said.tail:.3f}", likely)
    return table


def _visible(text: str) -> str:
    # Brackets would be rich's markup.
    return repr(text)[1:-1].replace("[", r"\[")


def _histogram(values: np.ndarray, edges: np.ndarray, form: str) -> list[str]:
    """A line a bin; what lies beyond the last edge is in the last bin."""
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    shares = counts / max(1, counts.sum())
    widest = max(shares.max(), 1e-9)
    return [
        f"  {form.format(low)} – {form.format(high)}  {'█' * round(_BARS * share / widest):{_BARS}}"
        f" {share:6.1%}"
        for low, high, share in zip(edges[:-1], edges[1:], shares, strict=True)
    ]


def _described(signal: Signal) -> str:
    if isinstance(signal, LogitsSignal):
        draws = f", {signal.draws} draws" if signal.draws else ""
        return f"{signal.profile}, k = {signal.k}{draws}"
    if isinstance(signal, HiddenSignal):
        kept = f", {signal.variance_kept:.1%} of variance" if signal.directions else ""
        return f"{signal.dtype}, width {signal.width} of {signal.teacher_width}{kept}"
    assert isinstance(signal, AttentionSignal)
    return f"{signal.dtype}, {signal.stored_heads} of {signal.teacher_heads} heads"
