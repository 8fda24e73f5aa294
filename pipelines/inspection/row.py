"""One row of a cache for people: its tokens, and what teacher and student predicted for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.inspection.entropy import entropies_of
from decant.schemas import Cache
from decant.schemas.records.rows import PADDING, WRITER_LOGPROBS

Arrays = Mapping[str, np.ndarray]
"""A student's predictions, by name: `trainer/judging/predictions.py` says which."""
Student = Callable[[Sequence[int]], Arrays]
"""Gives a student's predictions for the rows of these numbers, each array [rows, positions, …]."""

_UNFINISHED, _LONGEST_CHARACTER = "\ufffd", 4
"""What a tokenizer writes for a part of a character, and the most parts that one has."""
_SHORT = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}
_SHORTEST_TAIL = 1e-7
"""Probability that a token outside the stored ids is taken to have at most, if the tail is 0."""


class Candidate(NamedTuple):
    """A token that may follow, and how likely it is to either model."""

    text: str
    teacher: float | None
    """None if the teacher's top-k does not hold it."""
    student: float | None
    """None without a student, and for a token that only the teacher's draws hold."""


@dataclass(frozen=True)
class Prediction:
    """The distribution of one token, given the tokens before it. Entropies and KL in nats."""

    entropy: float
    """Of the teacher's whole distribution."""
    tail: float
    """Probability that the teacher gives to all tokens outside its stored top-k."""
    probability: float | None
    """What the teacher gives to the token that follows; None if that is not stored."""
    alternatives: tuple[Candidate, ...]
    """The teacher's likeliest tokens in falling order, then more of the student's likeliest."""
    draws: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens that were drawn from the tail, and the teacher's probability of each."""
    student_probability: float | None = None
    """What the student gives to the token that follows."""
    kl: float | None = None
    """KL(teacher ‖ student) with the tail as one token: a lower bound."""
    writer_probability: float | None = None
    """What the model that wrote the text gave to the token that follows; None if none wrote it."""

    @property
    def surprise(self) -> float:
        """−ln of the probability of the token that follows: a lower bound if it is not stored."""
        p = self.probability
        return float(-np.log(max(self.tail if p is None else p, _SHORTEST_TAIL)))


@dataclass(frozen=True)
class Token:
    """One position of a row that is not padding."""

    position: int
    """In the row, from 0."""
    text: str
    """Empty for the first parts of a character that several tokens share."""
    segment: int
    prediction: Prediction | None
    """None if no target is stored for this token: a document's first token, or a prompt."""


@dataclass(frozen=True)
class Origin:
    """Where a segment of a row is from."""

    segment: int
    source: str
    """Name of the corpus file."""
    document: int
    """Byte offset or number of the document in its file."""
    start: int
    """Index in the document of the segment's first token."""


def row_tokens(
    cache: Cache, row: int, tokenizer: Tokenizer, *, top: int, student: Student | None = None
) -> list[Token]:
    """The tokens of a row, each with the `top` likeliest tokens that the teacher predicted."""
    batch = {name: array[0] for name, array in cache.read([row]).items()}
    theirs = {name: array[0] for name, array in student([row]).items()} if student else {}
    text = lru_cache(maxsize=None)(lambda token: tokenizer.decode([token]))
    scored = np.flatnonzero(batch["loss_mask"])
    entropy = entropies_of(batch, scored)
    predictions = {
        int(at) + 1: _prediction(batch, theirs, int(at), entropy=float(nats), text=text, top=top)
        for at, nats in zip(scored, entropy, strict=True)
    }
    places = np.flatnonzero(batch["segment_ids"] != PADDING).tolist()
    texts = token_texts(batch["tokens"][places].tolist(), tokenizer)
    return [
        Token(at, piece, int(batch["segment_ids"][at]), predictions.get(at))
        for at, piece in zip(places, texts, strict=True)
    ]


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each token; of tokens that share a character, the last one has it all."""
    waiting: list[int] = []
    for number, token in enumerate(ids):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        unfinished = text.endswith(_UNFINISHED) and len(waiting) < _LONGEST_CHARACTER
        if unfinished and number + 1 < len(ids):
            yield ""
        else:
            yield text
            waiting = []


def _prediction(
    batch: Arrays, theirs: Arrays, at: int, *, entropy: float, text: Callable[[int], str], top: int
) -> Prediction:
    ids, logprobs = batch["topk_ids"][at], batch["topk_logprobs"][at]
    stored = np.isfinite(logprobs)
    teacher = dict(zip(ids[stored].tolist(), np.exp(logprobs[stored]).tolist(), strict=True))
    shown = list(teacher)[:top]
    student: dict[int, float] = {}
    if theirs:
        on_stored = np.exp(theirs["topk_logprobs"][at][stored]).tolist()
        own = theirs["top_ids"][at].tolist()
        student = dict(zip(own, np.exp(theirs["top_logprobs"][at]).tolist(), strict=True))
        student |= dict(zip(teacher, on_stored, strict=True))
        shown += [token for token in own[:top] if token not in shown]
    following = int(batch["tokens"][at + 1])
    return Prediction(
        entropy=entropy,
        tail=float(np.exp(batch["tail_logmass"][at, -1])) if len(ids) else 1.0,
        probability=_probability(batch, at, stored=teacher.get(following)),
        alternatives=tuple(Candidate(text(i), teacher.get(i), student.get(i)) for i in shown),
        draws=_draws(batch, at, text=text, top=top),
        student_probability=float(np.exp(theirs["label_logprobs"][at])) if theirs else None,
        kl=float(theirs["kl_bound"][at]) if theirs else None,
        writer_probability=_writer_probability(batch, at),
    )


def _probability(batch: Arrays, at: int, *, stored: float | None) -> float | None:
    """Of the token that follows: as `stored` with the top-k, or else its own log-probability."""
    if stored is not None or "label_logprobs" not in batch:
        return stored
    logprob = float(batch["label_logprobs"][at])
    return float(np.exp(logprob)) if np.isfinite(logprob) else None


def _writer_probability(batch: Arrays, at: int) -> float | None:
    logprob = float(batch[WRITER_LOGPROBS][at]) if WRITER_LOGPROBS in batch else np.nan
    return None if np.isnan(logprob) else float(np.exp(logprob))


def _draws(
    batch: Arrays, at: int, *, text: Callable[[int], str], top: int
) -> tuple[tuple[str, float], ...]:
    if "tail_ids" not in batch:
        return ()
    logprobs = batch["tail_logprobs"][at]
    drawn = np.isfinite(logprobs)
    each = dict(zip(batch["tail_ids"][at][drawn].tolist(), logprobs[drawn].tolist(), strict=True))
    falling = sorted(each.items(), key=lambda pair: (-pair[1], pair[0]))[:top]
    return tuple((text(token), float(np.exp(logprob))) for token, logprob in falling)


def visible(text: str) -> str:
    r"""A token's text on one line: a line feed is \n, a space at an end ␣."""
    inside = text.strip(" ")
    before, _, after = text.partition(inside) if inside else (text, "", "")
    line = "".join(_SHORT.get(c, c) for c in inside)
    return "␣" * len(before) + line + "␣" * len(after)


def row_origins(cache: Cache, row: int) -> list[Origin]:
    """Where each segment of a row is from; forgotten documents are left out."""
    ids = cache.read([row], signals=())["segment_ids"][0]
    segments = np.unique(ids[ids != PADDING]).tolist()
    origins = zip(segments, cache.origins(row), strict=True)
    return [Origin(segment, *origin) for segment, origin in origins]
