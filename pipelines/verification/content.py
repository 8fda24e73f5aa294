"""What is stored of some rows, against what the teacher says when it is read plainly."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.verification.reference import Reference, Said, log_softmax, segments_of
from decant.pipelines.verification.retokenise import Spelling
from decant.pipelines.verification.tolerances import (
    MASS,
    ROUNDING,
    SPELLED,
    STORED_DRAWS,
    STORED_KL,
    STORED_MAPS,
    STORED_STATES,
    STORED_TAIL,
    Limits,
)
from decant.schemas import Cache
from decant.schemas.manifest.manifest import Part
from decant.schemas.records.rows import next_tokens, stored_positions
from decant.schemas.signals import MEAN, AttentionSignal, HiddenSignal, LogitsSignal, Signal

TEMPERATURES = (1, 2, 4)
_NOTHING = np.log(1e-12)
"""A mass below this is none: neither side knows its logarithm."""


@dataclass(frozen=True)
class Figure:
    """One measure of one signal over all positions that were compared."""

    signal: str
    what: str
    mean: float
    p99: float
    max: float
    allowed: Limits

    @property
    def fine(self) -> bool:
        """Whether it is within what is allowed; NaN is not."""
        limits = self.allowed
        return self.mean <= limits.mean and self.p99 <= limits.p99 and self.max <= limits.max


@dataclass(frozen=True)
class Count:
    """Things counted of which `most` may be wrong."""

    signal: str
    what: str
    wrong: int
    of: int
    most: int = 0
    ties: int = 0
    """Apart from the wrong ones: too near to tell."""

    @property
    def fine(self) -> bool:
        """Whether no more are wrong than may be."""
        return self.wrong <= self.most


@dataclass
class Content:
    """The comparison's result."""

    rows: list[int] = field(default_factory=list)
    positions: int = 0
    """Scored ones."""
    cross_entropy: float = float("nan")
    """The teacher's own, of the next token, in nats: for people. Far above what such a teacher
    should have, it was fed another tokenizer's ids."""
    figures: list[Figure] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """Whether everything is within its limits."""
        return all(found.fine for found in (*self.figures, *self.counts))


def compare(
    cache: Cache, part: Part, rows: Sequence[int], reference: Reference, *, dtype: str
) -> Content:
    """`rows` of `part`, none of them skipped, against a teacher that computes in `dtype`."""
    judges: list[_Judge] = [
        _judge(name, signal, cache, dtype) for name, signal in part.signals.items()
    ]
    spelling = Spelling(Tokenizer.from_files(cache.tokenizer_path))
    result, losses = Content(rows=list(rows)), []
    for row in rows:
        batch = cache.read([row], signals=tuple(part.signals))
        scored, labels = batch["loss_mask"][0], next_tokens(batch["tokens"][0])
        for at in segments_of(batch, 0):
            tokens = batch["tokens"][0, at]
            spelling.see(tokens, length=batch["tokens"].shape[1])
            said = reference.say(tokens)
            plain, here = log_softmax(said.logits), scored[at]
            losses.append(-plain[here, labels[at][here]])
            for judge in judges:
                judge.see(said, {name: array[0] for name, array in batch.items()}, at)
        for judge in judges:
            judge.outside({name: array[0] for name, array in batch.items()})
    losses = np.concatenate(losses)
    result.positions, result.cross_entropy = len(losses), float(losses.mean())
    for judge in judges:
        figures, counts = judge.found()
        result.figures += figures
        result.counts += counts
    wrong, of = spelling.wrong, spelling.judged
    most = int(of * (1 - SPELLED))
    what = "tokens spelled otherwise"
    result.counts.append(Count("rows", what, wrong, of, most))
    return result


def _judge(name: str, signal: Signal, cache: Cache, dtype: str) -> "_Judge":
    if isinstance(signal, LogitsSignal):
        return _Logits(name, signal, dtype)
    if isinstance(signal, HiddenSignal):
        return _Hidden(name, signal, dtype, cache.directions(name))
    return _Attention(name, signal, dtype)


Stored = dict[str, np.ndarray]
"""What `Cache.read` gives of one row, each array without its leading axis."""


class _Judge:
    """Takes in one signal segment by segment."""

    def __init__(self, name: str, dtype: str):
        self.name = name
        self.rounding = ROUNDING[dtype]
        self.errors: dict[str, list[np.ndarray]] = {}
        self.limits: dict[str, Limits] = {}
        self.not_zero = 0
        self.must_be_zero = 0

    def see(self, said: Said, stored: Stored, at: np.ndarray) -> None:
        """A segment that lies at the row's positions `at`."""
        raise NotImplementedError

    def outside(self, stored: Stored) -> None:
        """A row as a whole: what is not read must hold nothing."""

    def found(self) -> tuple[list[Figure], list[Count]]:
        """What came of it."""
        figures = [self._figure(what, found) for what, found in self.errors.items()]
        return figures, []

    def _add(self, what: str, errors: np.ndarray, limits: Limits) -> None:
        self.errors.setdefault(what, []).append(np.ravel(errors))
        self.limits[what] = limits

    def _figure(self, what: str, found: Iterable[np.ndarray]) -> Figure:
        errors, limits = np.concatenate(list(found)), self.limits[what]
        # Nothing to compare is nothing that is wrong; NaN stays what it is.
        values = errors if len(errors) else np.zeros(1)
        p99 = float(np.quantile(values, 0.99))
        return Figure(self.name, what, float(values.mean()), p99, float(values.max()), limits)


class _Logits(_Judge):
    """Top-k, tail and draws."""

    def __init__(self, name: str, signal: LogitsSignal, dtype: str):
        super().__init__(name, dtype)
        self.signal = signal
        self.kl = self.rounding.kl + STORED_KL[signal.profile]
        self.tail = self.rounding.tail + STORED_TAIL[signal.profile]
        self.logprob = self.rounding.logprob + STORED_DRAWS[signal.profile]
        self.ids = self.ties = self.wrong = 0
        self.draws = self.drawn_from_head = self.undrawn = 0

    def see(self, said: Said, stored: Stored, at: np.ndarray) -> None:
        here = stored["loss_mask"][at]
        logits, at = said.logits[here], at[here]
        if not len(at):
            return
        ids, logprobs = stored["topk_ids"][at], stored["topk_logprobs"][at]
        mass = stored["tail_logmass"][at].astype(np.float64)
        for temperature in TEMPERATURES:
            node = self.signal.betas.index(1 / temperature)
            values = self._kl(logits, ids, logprobs, mass[:, node], beta=1 / temperature)
            self._add(f"KL at T = {temperature}, nats", values, self.kl)
        for node, beta in enumerate(self.signal.betas):
            plain = log_softmax(logits, beta=beta)
            _, expected = _parts(plain, ids)
            _, tail = _normalised(beta * logprobs.astype(np.float64), mass[:, node])
            self._add("tail's mass at any node", np.abs(np.exp(tail) - expected), self.tail)
        total = np.exp(logprobs.astype(np.float64)).sum(1) + np.exp(mass[:, -1])
        self._add("head and tail, off from 1", np.abs(total - 1), MASS)
        plain = log_softmax(logits)
        self._see_ids(plain, ids)
        if self.signal.draws:
            self._see_draws(plain, ids, stored["tail_ids"][at], stored["tail_logprobs"][at])

    def _kl(self, logits, ids, logprobs, mass, *, beta: float) -> np.ndarray:
        """KL(teacher ‖ stored) at T = 1/β over the stored ids and the rest as one, nats [n]."""
        p_head, p_tail = _parts(log_softmax(logits, beta=beta), ids)
        q_head, q_tail = _normalised(beta * logprobs.astype(np.float64), mass)
        head = np.exp(p_head) * (np.maximum(p_head, _NOTHING) - np.maximum(q_head, _NOTHING))
        p_log = np.log(np.maximum(p_tail, np.exp(_NOTHING)))
        return head.sum(1) + p_tail * (p_log - np.maximum(q_tail, _NOTHING))

    def _see_ids(self, plain: np.ndarray, ids: np.ndarray) -> None:
        k = ids.shape[1]
        last = np.partition(plain, plain.shape[1] - k, axis=1)[:, [-k]]
        short = last - np.take_along_axis(plain, ids, 1)  # nats below the k-th
        repeated = k - np.array([len(np.unique(row)) for row in ids])
        self.ids += ids.size
        self.ties += int(((short > 0) & (short <= self.rounding.tie)).sum())
        self.wrong += int((short > self.rounding.tie).sum() + repeated.sum())

    def _see_draws(self, plain, ids, drawn, logprobs) -> None:
        there = np.isfinite(logprobs)
        _, tail = _parts(plain, ids)
        # Where next to nothing is left to draw from, there may be no draw.
        self.undrawn += int((~there & (tail > np.exp(_NOTHING))[:, None]).sum())
        self.draws += drawn.size
        self.drawn_from_head += int(((drawn[:, :, None] == ids[:, None]).any(2) & there).sum())
        errors = np.abs(logprobs - np.take_along_axis(plain, drawn, 1))
        self._add("log-prob of draws, nats", errors[there], self.logprob)

    def found(self) -> tuple[list[Figure], list[Count]]:
        figures, _ = super().found()
        what = f"ids not of the top {self.signal.k}"
        counts = [Count(self.name, what, self.wrong, self.ids, ties=self.ties)]
        if self.signal.draws:
            head = Count(self.name, "draws of the top-k", self.drawn_from_head, self.draws)
            counts += [head, Count(self.name, "draws missing", self.undrawn, self.draws)]
        return figures, counts


class _Hidden(_Judge):
    """States of one layer."""

    def __init__(self, name: str, signal: HiddenSignal, dtype: str, directions: Any):
        super().__init__(name, dtype)
        self.signal = signal
        self.directions = directions

    def see(self, said: Said, stored: Stored, at: np.ndarray) -> None:
        read = stored_positions(stored["segment_ids"], stored["loss_mask"])[at]
        own = said.hidden[self.signal.layer][read].astype(np.float64)
        own = own if self.directions is None else own @ self.directions
        off = np.linalg.norm(stored[self.name][at[read]].astype(np.float64) - own, axis=1)
        length = np.maximum(np.linalg.norm(own, axis=1), 1e-30)
        limits = self.rounding.states + STORED_STATES[self.signal.dtype]
        self._add("error of a state, relative", off / length, limits)

    def outside(self, stored: Stored) -> None:
        read = stored_positions(stored["segment_ids"], stored["loss_mask"])
        self.must_be_zero += int((~read).sum())
        self.not_zero += int((stored[self.name][~read] != 0).any(-1).sum())

    def found(self) -> tuple[list[Figure], list[Count]]:
        figures, _ = super().found()
        what = "states where none belong"
        return figures, [Count(self.name, what, self.not_zero, self.must_be_zero)]


class _Attention(_Judge):
    """Maps of one block."""

    def __init__(self, name: str, signal: AttentionSignal, dtype: str):
        super().__init__(name, dtype)
        self.signal = signal

    def see(self, said: Said, stored: Stored, at: np.ndarray) -> None:
        read = stored_positions(stored["segment_ids"], stored["loss_mask"])[at]
        own = said.maps[self.signal.layer].astype(np.float64)
        heads = self.signal.heads
        own = own.mean(0, keepdims=True) if heads == MEAN else own[list(heads)]
        maps = stored[self.name][:, at[read]].astype(np.float64)
        inside, whole = maps[:, :, at], np.abs(maps).sum(-1)
        # Keys of other segments have no probability: whatever is stored of them is an error.
        elsewhere = whole - np.abs(inside).sum(-1)
        distance = 0.5 * (np.abs(inside - own[:, read]).sum(-1) + elsewhere)
        limits = self.rounding.maps + STORED_MAPS[self.signal.dtype]
        self._add("a query's total variation", distance, limits)

    def outside(self, stored: Stored) -> None:
        read = stored_positions(stored["segment_ids"], stored["loss_mask"])
        self.must_be_zero += int((~read).sum())
        self.not_zero += int((stored[self.name][:, ~read] != 0).any((0, 2)).sum())

    def found(self) -> tuple[list[Figure], list[Count]]:
        figures, _ = super().found()
        what = "maps where none belong"
        return figures, [Count(self.name, what, self.not_zero, self.must_be_zero)]


def _parts(plain: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of `ids` [n, k], and the mass of all others [n], in float64."""
    head = np.take_along_axis(plain, ids, 1).astype(np.float64)
    rest = np.exp(plain)
    np.put_along_axis(rest, ids, 0, axis=1)
    return head, rest.sum(1, dtype=np.float64)


def _normalised(head: np.ndarray, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the head's probabilities [n, k] and the tail's [n] that sum to one."""
    whole = np.logaddexp(np.logaddexp.reduce(head, axis=1), tail)
    return head - whole[:, None], tail - whole
