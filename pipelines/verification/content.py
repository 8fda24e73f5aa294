"""Compares the stored signals of some rows with the plain outputs of the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.verification.companions import LABELS, STARTS, CountsCheck, SketchCheck
from decant.pipelines.verification.measures import Count, Figure, SignalCheck, StoredRow
from decant.pipelines.verification.reference import (
    Reference,
    SegmentOutput,
    log_softmax,
    segments_of,
)
from decant.pipelines.verification.retokenise import Spelling
from decant.pipelines.verification.tolerances import (
    MASS,
    SPELLED,
    STORED_DRAWS,
    STORED_KL,
    STORED_LABELS,
    STORED_MAPS,
    STORED_STATES,
    STORED_TAIL,
)
from decant.progress import track
from decant.schemas import Cache
from decant.schemas.manifest.manifest import Part
from decant.schemas.records.rows import WRITER_LOGPROBS, next_tokens, stored_positions
from decant.schemas.signals import (
    MEAN,
    AttentionSignal,
    CountsSignal,
    HiddenSignal,
    LogitsSignal,
    Signal,
    SketchSignal,
)
from decant.schemas.targets.draws import COUNTS_STREAM, uniform_starts

TEMPERATURES = (1, 2, 4)
_NOTHING = np.log(1e-12)
"""Masses below this count as equal: their logarithms are not known on either side."""


@dataclass
class Content:
    """The comparison of one part's rows with the teacher."""

    rows: list[int] = field(default_factory=list)
    """Row numbers."""
    positions: int = 0
    """Positions with a target."""
    cross_entropy: float = float("nan")
    """The teacher's mean cross-entropy of the next token, in nats. For people: a value far too high
    for the teacher means that it read ids of another tokenizer."""
    figures: list[Figure] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """Whether every figure and count is within its limits."""
        return all(measure.fine for measure in (*self.figures, *self.counts))


def compare_rows(
    cache: Cache,
    part: Part,
    rows: Sequence[int],
    reference: Reference,
    *,
    dtype: str,
    console: Console | None = None,
) -> Content:
    """Compare the rows numbered `rows`, all of `part`, with the reference; none may be skipped.

    `dtype` is the teacher's compute dtype, which decides the tolerances. Progress goes to
    `console`.
    """
    unembedding = reference.unembedding
    checks = [
        _signal_check(name, signal, cache, part, dtype, unembedding)
        for name, signal in part.signals.items()
    ]
    spelling = Spelling(Tokenizer.from_files(cache.tokenizer_path))
    result, losses = Content(rows=list(rows)), []
    with track(rows, "verify: rows", total=len(rows), unit="rows", console=console) as tracked:
        for row in tracked:
            batch = cache.read([row], signals=tuple(part.signals))
            scored, labels = batch["loss_mask"][0], next_tokens(batch["tokens"][0])
            stored = {name: array[0] for name, array in batch.items()}
            stored |= {LABELS: labels, STARTS: _counts_starts(cache, row, length=len(labels))}
            for at in segments_of(batch, 0):
                tokens = batch["tokens"][0, at]
                # What a model wrote need not be how the tokenizer spells it.
                if WRITER_LOGPROBS not in stored or np.isnan(stored[WRITER_LOGPROBS][at]).all():
                    spelling.see(tokens, length=batch["tokens"].shape[1])
                output = reference.run(tokens)
                logprobs, here = log_softmax(output.logits), scored[at]
                losses.append(-logprobs[here, labels[at][here]])
                for check in checks:
                    check.add_segment(output, stored, at)
            for check in checks:
                check.add_row(stored)
    losses = np.concatenate(losses)
    result.positions, result.cross_entropy = len(losses), float(losses.mean())
    for check in checks:
        figures, counts = check.measures()
        result.figures += figures
        result.counts += counts
    wrong, of = spelling.wrong, spelling.judged
    most = int(of * (1 - SPELLED))
    what = "tokens spelled otherwise"
    result.counts.append(Count("rows", what, wrong, of, most))
    return result


def _counts_starts(cache: Cache, row: int, *, length: int) -> np.ndarray:
    return uniform_starts(cache.row_key(row), positions=length, stream=COUNTS_STREAM)


def _signal_check(
    name: str, signal: Signal, cache: Cache, part: Part, dtype: str, unembedding: np.ndarray
) -> SignalCheck:
    if isinstance(signal, LogitsSignal):
        return _LogitsCheck(name, signal, dtype)
    if isinstance(signal, CountsSignal):
        return CountsCheck(name, signal, dtype)
    if isinstance(signal, SketchSignal):
        return SketchCheck(name, signal, dtype, cache, part, unembedding)
    if isinstance(signal, HiddenSignal):
        return _HiddenCheck(name, signal, dtype, cache.directions(name))
    return _AttentionCheck(name, signal, dtype)


class _LogitsCheck(SignalCheck):
    """Top-k, tail moments and tail draws."""

    def __init__(self, name: str, signal: LogitsSignal, dtype: str):
        super().__init__(name, dtype)
        self.signal = signal
        self.kl = self.rounding.kl + STORED_KL[signal.profile]
        self.tail = self.rounding.tail + STORED_TAIL[signal.profile]
        self.logprob = self.rounding.logprob + STORED_DRAWS[signal.profile]
        self.label = self.rounding.logprob + STORED_LABELS[signal.profile]
        self.ids = self.ties = self.wrong = 0
        self.draws = self.draws_in_head = self.missing_draws = 0

    def add_segment(self, output: SegmentOutput, stored: StoredRow, at: np.ndarray) -> None:
        here = stored["loss_mask"][at]
        logits, at = output.logits[here], at[here]
        if not len(at) or not self.signal.k:
            return
        if self.signal.labels:
            expected = log_softmax(logits)[np.arange(len(at)), stored[LABELS][at]]
            errors = np.abs(stored["label_logprobs"][at] - expected)
            self._add("log-prob of the next token, nats", errors, self.label)
        if not self.signal.k:
            return
        ids, logprobs = stored["topk_ids"][at], stored["topk_logprobs"][at]
        if self.signal.mass is not None:
            ids = np.where(np.isfinite(logprobs), ids, -1)  # −1: the position stores fewer ids
        mass = stored["tail_logmass"][at].astype(np.float64)
        for temperature in TEMPERATURES:
            node = self.signal.betas.index(1 / temperature)
            values = self._kl(logits, ids, logprobs, mass[:, node], beta=1 / temperature)
            self._add(f"KL at T = {temperature}, nats", values, self.kl)
        for node, beta in enumerate(self.signal.betas):
            _, expected = _head_and_tail(log_softmax(logits, beta=beta), ids)
            _, tail = _normalised(_times(beta, logprobs), mass[:, node])
            self._add("tail's mass at any node", np.abs(np.exp(tail) - expected), self.tail)
        total = np.exp(logprobs.astype(np.float64)).sum(1) + np.exp(mass[:, -1])
        self._add("head and tail, off from 1", np.abs(total - 1), MASS)
        expected = log_softmax(logits)
        self._add_ids(expected, ids)
        if self.signal.draws:
            self._add_draws(expected, ids, stored["tail_ids"][at], stored["tail_logprobs"][at])

    def _kl(self, logits, ids, logprobs, mass, *, beta: float) -> np.ndarray:
        """KL(teacher ‖ stored) at T = 1/β, nats [n]; the ids outside `ids` count as one."""
        p_head, p_tail = _head_and_tail(log_softmax(logits, beta=beta), ids)
        q_head, q_tail = _normalised(_times(beta, logprobs), mass)
        head = np.exp(p_head) * (np.maximum(p_head, _NOTHING) - np.maximum(q_head, _NOTHING))
        p_log = np.log(np.maximum(p_tail, np.exp(_NOTHING)))
        return head.sum(1) + p_tail * (p_log - np.maximum(q_tail, _NOTHING))

    def _add_ids(self, expected: np.ndarray, ids: np.ndarray) -> None:
        k, held = ids.shape[1], ids >= 0
        sizes = held.sum(1)
        top = -np.sort(-np.partition(expected, expected.shape[1] - k, axis=1)[:, -k:], axis=1)
        kth = np.take_along_axis(top, np.maximum(sizes - 1, 0)[:, None], 1)
        # Nats below the last id that the position should store.
        short = np.where(held, kth - np.take_along_axis(expected, np.maximum(ids, 0), 1), 0)
        repeated = sizes - np.array([len(np.unique(row[row >= 0])) for row in ids])
        self.ids += int(sizes.sum())
        self.ties += int(((short > 0) & (short <= self.rounding.tie)).sum())
        self.wrong += int((short > self.rounding.tie).sum() + repeated.sum())

    def _add_draws(self, expected, ids, tail_ids, tail_logprobs) -> None:
        valid = np.isfinite(tail_logprobs)
        _, tail = _head_and_tail(expected, ids)
        # A tail of almost no mass may have no draws.
        self.missing_draws += int((~valid & (tail > np.exp(_NOTHING))[:, None]).sum())
        self.draws += tail_ids.size
        self.draws_in_head += int(((tail_ids[:, :, None] == ids[:, None]).any(2) & valid).sum())
        errors = np.abs(tail_logprobs - np.take_along_axis(expected, tail_ids, 1))
        self._add("log-prob of draws, nats", errors[valid], self.logprob)

    def measures(self) -> tuple[list[Figure], list[Count]]:
        figures, _ = super().measures()
        what = f"ids not of the top {self.signal.k}"
        counts = [Count(self.name, what, self.wrong, self.ids, ties=self.ties)]
        if self.signal.draws:
            head = Count(self.name, "draws of the top-k", self.draws_in_head, self.draws)
            counts += [head, Count(self.name, "draws missing", self.missing_draws, self.draws)]
        return figures, counts


class _HiddenCheck(SignalCheck):
    """Hidden states of one layer."""

    def __init__(self, name: str, signal: HiddenSignal, dtype: str, directions: Any):
        super().__init__(name, dtype)
        self.signal = signal
        self.directions = directions

    def add_segment(self, output: SegmentOutput, stored: StoredRow, at: np.ndarray) -> None:
        read = stored_positions(stored["segment_ids"], stored["loss_mask"])[at]
        expected = output.hidden[self.signal.layer][read].astype(np.float64)
        expected = expected if self.directions is None else expected @ self.directions
        states = stored[self.name][at[read]].astype(np.float64)
        off = np.linalg.norm(states - expected, axis=1)
        length = np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
        limits = self.rounding.states + STORED_STATES[self.signal.dtype]
        self._add("error of a state, relative", off / length, limits)

    def add_row(self, stored: StoredRow) -> None:
        read = stored_positions(stored["segment_ids"], stored["loss_mask"])
        self.must_be_zero += int((~read).sum())
        self.not_zero += int((stored[self.name][~read] != 0).any(-1).sum())

    def measures(self) -> tuple[list[Figure], list[Count]]:
        figures, _ = super().measures()
        what = "states where none belong"
        return figures, [Count(self.name, what, self.not_zero, self.must_be_zero)]


class _AttentionCheck(SignalCheck):
    """Attention maps of one block."""

    def __init__(self, name: str, signal: AttentionSignal, dtype: str):
        super().__init__(name, dtype)
        self.signal = signal

    def add_segment(self, output: SegmentOutput, stored: StoredRow, at: np.ndarray) -> None:
        read = stored_positions(stored["segment_ids"], stored["loss_mask"])[at]
        expected = output.maps[self.signal.layer].astype(np.float64)
        heads = self.signal.heads
        expected = expected.mean(0, keepdims=True) if heads == MEAN else expected[list(heads)]
        maps = stored[self.name][:, at[read]].astype(np.float64)
        inside, whole = maps[:, :, at], np.abs(maps).sum(-1)
        # Keys of other segments must have probability 0: all stored mass on them is an error.
        elsewhere = whole - np.abs(inside).sum(-1)
        distance = 0.5 * (np.abs(inside - expected[:, read]).sum(-1) + elsewhere)
        limits = self.rounding.maps + STORED_MAPS[self.signal.dtype]
        self._add("a query's total variation", distance, limits)

    def add_row(self, stored: StoredRow) -> None:
        read = stored_positions(stored["segment_ids"], stored["loss_mask"])
        self.must_be_zero += int((~read).sum())
        self.not_zero += int((stored[self.name][:, ~read] != 0).any((0, 2)).sum())

    def measures(self) -> tuple[list[Figure], list[Count]]:
        figures, _ = super().measures()
        what = "maps where none belong"
        return figures, [Count(self.name, what, self.not_zero, self.must_be_zero)]


def _head_and_tail(logprobs: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of `ids` [n, k], and the probability of all other ids [n], in float64.

    −1 stands for no id; its log-probability is −inf.
    """
    held = ids >= 0
    head = np.where(held, np.take_along_axis(logprobs, np.maximum(ids, 0), 1), -np.inf)
    rest = np.exp(logprobs)
    rows, _ = np.nonzero(held)
    rest[rows, ids[held]] = 0
    return head.astype(np.float64), rest.sum(1, dtype=np.float64)


def _times(beta: float, logprobs: np.ndarray) -> np.ndarray:
    """β·log p in float64; log 0 stays −inf at β = 0, where an empty slot must not count."""
    some = logprobs > -np.inf
    return np.where(some, beta * np.where(some, logprobs, 0).astype(np.float64), -np.inf)


def _normalised(head: np.ndarray, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the head's ids [n, k] and of the tail [n], scaled to sum to one."""
    whole = np.logaddexp(np.logaddexp.reduce(head, axis=1), tail)
    return head - whole[:, None], tail - whole
