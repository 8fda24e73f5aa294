"""Compares rows of an aligned cache with what the cache that it was made from gives again."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from decant.models.text.tokenizer import tokenizer_of
from decant.pipelines.alignment.planning import encode_head, other_unit
from decant.pipelines.alignment.rows import Aligner
from decant.pipelines.alignment.targets import RowTargets, TargetMaker
from decant.pipelines.calibration.heads import records_of
from decant.pipelines.verification.content import Content
from decant.pipelines.verification.measures import Count, Figure
from decant.pipelines.verification.tolerances import ROUNDING, STORED_KL, STORED_LABELS, Limits
from decant.progress import track
from decant.schemas import Cache, open_cache
from decant.schemas.disk.layout import COUNTS, LOGITS, PartLayout
from decant.schemas.manifest.manifest import Aligned, Part
from decant.schemas.manifest.plan import read_plan
from decant.schemas.records.rows import PADDING
from decant.schemas.signals import CountsSignal
from decant.schemas.targets.targets import Targets
from decant.schemas.targets.unmatched import UNMATCHED, split_unmatched

_OTHER_COUNTS = 0.01
"""Share of positions whose counts may differ: rounding of another machine moves a draw."""


def compare_aligned(
    cache: Cache,
    part: Part,
    rows: Sequence[int],
    *,
    place: str | None,
    console: Console | None = None,
) -> Content:
    """Make the targets of the rows numbered `rows`, all of `part`, again and compare them.

    `place` says where the other cache is now (None: where it was). ValueError if it is not there,
    or another one.
    """
    assert part.aligned
    layout = PartLayout(cache.path / part.path)
    plan = read_plan(cache.plan_path(part))
    other = _open(place or plan.aligned_with, part.aligned, cache=cache)
    aligner = Aligner(
        other,
        tokenizer_of(cache),
        length=cache.manifest.sequence_length,
        special_tokens=part.aligned.special_tokens,
    )
    counts = part.signals.get(COUNTS)
    draws = counts.draws if isinstance(counts, CountsSignal) else 0
    maker = TargetMaker(aligner, logits=part.logits, draws=draws)
    records = records_of(plan, layout.root)
    assert records
    check = _Check(cache, part)
    by_unit = defaultdict(list)
    for row in rows:
        unit, offset = _place(cache, part, row)
        by_unit[unit].append((row, offset))
    shown = {"total": len(by_unit), "unit": "units", "console": console}
    with track(by_unit, "verify: units", **shown) as units:
        for unit in units:
            made = aligner.rows(other_unit(unit, part.aligned))
            for row, offset in by_unit[unit]:
                if offset >= len(made):
                    check.missing += 1
                    continue
                (again,) = maker.of_rows([made[offset]])
                head = records.decode(encode_head(records, again), length=len(again.taught))
                check.add(row, again, head if len(again.targets) else again.targets)
    return check.content(rows)


def _open(place: str, aligned: Aligned, *, cache: Cache) -> Cache:
    try:
        other = open_cache(place)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{cache.address}: was aligned from {place}, which is not there: {error}. If that "
            "cache lies elsewhere now, say --teacher"
        ) from error
    if other.manifest.rows_id != aligned.rows_id:
        raise ValueError(
            f"{place}: has rows_id {other.manifest.rows_id[:12]}, but {cache.address} was aligned "
            f"from rows_id {aligned.rows_id[:12]}. Point --teacher at that cache"
        )
    return other


def _place(cache: Cache, part: Part, row: int) -> tuple[int, int]:
    """The row's unit, by its number in the plan, and its offset there."""
    first = 0
    for other in cache.manifest.parts:
        for number, unit in other.numbered_units:
            if other is part and first <= row < first + unit.rows:
                return number, row - first
            first += unit.rows
    raise AssertionError(f"row {row} is not of {part.path}")


class _Check:
    """Sums up the differences of rows."""

    def __init__(self, cache: Cache, part: Part):
        self.cache, self.part = cache, part
        self.missing = self.tokens = self.other_tokens = self.scored = self.other_places = 0
        self.counted = self.other_counts = 0
        self.kl: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []

    def add(self, row: int, again: RowTargets, head: Targets) -> None:
        """Compare a stored row with what it is again; `head` as a reader would get it."""
        batch = self.cache.read([row], signals=tuple(self.part.signals))
        stored = {name: array[0] for name, array in batch.items()}
        # Forgotten documents are blank in the stored row.
        there = stored["segment_ids"] != PADDING
        self.tokens += int(there.sum())
        self.other_tokens += int((stored["tokens"] != again.row.tokens)[there].sum())
        k = self.part.logits.k
        taught = (stored["topk_logprobs"] > -np.inf).any(-1) if k else stored["counts"].any(-1)
        if UNMATCHED in stored:
            taught |= (stored[UNMATCHED] > -np.inf).any(-1)
            head = _as_read(head, vocabulary=self.cache.manifest.vocabulary_size)
        mask = stored["loss_mask"]
        self.scored += int(mask.sum())
        self.other_places += int((taught != again.taught)[mask].sum())
        both = np.flatnonzero(taught & again.taught & mask)
        at = (np.cumsum(again.taught) - 1)[both]
        if k:
            self.kl.append(_kl(head, at, stored, both))
        if head.label_logprobs is not None:
            off = stored["label_logprobs"][both] - head.label_logprobs[at]
            self.labels.append(np.abs(off))
        if again.counts is not None:
            ours = _dense(again.counts.ids[at], again.counts.counts[at])
            theirs = _dense(stored["count_ids"][both], stored["counts"][both])
            self.counted += len(both)
            self.other_counts += sum(a != b for a, b in zip(ours, theirs, strict=True))

    def content(self, rows: Sequence[int]) -> Content:
        """All that was found."""
        profile, rounding = self.part.logits.profile, ROUNDING["float32"]
        figures = []
        for what, errors, limits in (
            ("KL at T = 1, nats", self.kl, rounding.kl + STORED_KL[profile]),
            (
                "log-prob of the next token, nats",
                self.labels,
                rounding.logprob + _twice(STORED_LABELS[profile]),
            ),
        ):
            if errors:
                figures.append(_figure(what, np.concatenate(errors), limits))
        counts = [
            Count("rows", "rows that are no more", self.missing, len(rows)),
            Count("rows", "tokens of other text", self.other_tokens, self.tokens),
            Count(LOGITS, "positions with a target or without", self.other_places, self.scored),
        ]
        if self.counted:
            most = int(self.counted * _OTHER_COUNTS)
            what = "positions of other counts"
            counts.append(Count(COUNTS, what, self.other_counts, self.counted, most))
        own = np.concatenate(self.labels) if self.labels else np.zeros(0)
        return Content(rows=list(rows), positions=len(own), figures=figures, counts=counts)


def _as_read(head: Targets, *, vocabulary: int) -> Targets:
    """A matched head as `Cache.read` gives it."""
    arrays = {
        "topk_ids": head.ids[None],
        "topk_logprobs": head.logprobs[None],
        "tail_logmass": head.tail_logmass[None],
    }
    split = split_unmatched(arrays, vocabulary=vocabulary)
    ids, logprobs, masses = (split[name][0] for name in arrays)
    return Targets(ids, logprobs, masses, label_logprobs=head.label_logprobs)


def _kl(head: Targets, at: np.ndarray, stored, both: np.ndarray) -> np.ndarray:
    """KL(again ‖ stored) at T = 1 with the tail as one category, float64 [n]."""
    ids, logp = head.ids[at], head.logprobs[at].astype(np.float64)
    theirs = stored["topk_ids"][both], stored["topk_logprobs"][both].astype(np.float64)
    same = (ids[:, :, None] == theirs[0][:, None, :]) & np.isfinite(theirs[1])[:, None, :]
    logq = np.where(same, theirs[1][:, None, :], -np.inf).max(-1)
    # An id that is not stored there is in the tail, which has more than it.
    tail = stored["tail_logmass"][both, -1].astype(np.float64)
    logq = np.where(np.isfinite(logq), logq, tail[:, None])
    p = np.where(np.isfinite(logp), np.exp(logp), 0.0)
    kl = (p * np.where(p > 0, logp - logq, 0.0)).sum(1)
    own = np.maximum(head.tail_logmass[at, -1].astype(np.float64), -60)
    return np.maximum(kl + np.exp(own) * (own - np.maximum(tail, -60)), 0.0)


def _dense(ids: np.ndarray, counts: np.ndarray) -> list[dict[int, int]]:
    return [
        {i: n for i, n in zip(a, b, strict=True) if n}
        for a, b in zip(ids.tolist(), counts.tolist(), strict=True)
    ]


def _twice(limits: Limits) -> Limits:
    """Both sides are rounded to the same steps, so that they are none or one step apart."""
    return limits + limits


def _figure(what: str, errors: np.ndarray, limits: Limits) -> Figure:
    values = errors if len(errors) else np.zeros(1)
    p99 = float(np.quantile(values, 0.99))
    few = limits.of_few(len(errors))
    return Figure(LOGITS, what, float(values.mean()), p99, float(values.max()), few)
