"""The student's tokens of a segment, and the places that they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decant.models.text.inside_text import encode_inside
from decant.models.text.special_partners import DROPPED
from decant.models.text.spelling import Spelling
from decant.models.text.stretches import Kind, Stretch
from decant.models.text.tokenizer import Tokenizer

_BEFORE_ALL = -1
_AROUND = 20
"""Characters that an error shows on both sides of the place."""


@dataclass(frozen=True)
class PlacedTokens:
    """m tokens in order, arrays of [m]. Places are those of `stretches.py`."""

    ids: np.ndarray
    """int32."""
    starts: np.ndarray
    ends: np.ndarray
    kept: np.ndarray
    """bool: whether the token's bytes are those of the text at its places."""


def placed_tokens(
    stretches: Sequence[Stretch],
    *,
    student: Tokenizer,
    spelling: Spelling,
    mapping: Mapping[int, int],
) -> PlacedTokens:
    """The student's tokens of the stretches, with its BOS in front of a document if it puts one.

    ValueError for text that the student's tokenizer cannot spell.
    """
    runs = [run for stretch in stretches for run in _runs(stretch, spelling)]
    encoded = iter(_encoded(runs, student, spelling))
    made: list[PlacedTokens] = []
    for stretch in stretches:
        partner = mapping.get(stretch.token, DROPPED)
        if stretch.kind is Kind.SPECIAL and partner != DROPPED:
            made.append(_one(partner, stretch.at))
        for run in _runs(stretch, spelling):
            made.append(_placed(run, next(encoded), student, spelling))
    begun = [part.ids[0] for part in made if len(part.ids)][:1]
    opens = bool(stretches) and stretches[0].opens
    if opens and spelling.bos is not None and begun != [spelling.bos]:
        made.insert(0, _one(spelling.bos, _BEFORE_ALL, places=0))
    return PlacedTokens(
        np.concatenate([np.empty(0, np.int32), *(part.ids for part in made)]),
        np.concatenate([np.empty(0, np.int64), *(part.starts for part in made)]),
        np.concatenate([np.empty(0, np.int64), *(part.ends for part in made)]),
        np.concatenate([np.empty(0, bool), *(part.kept for part in made)]),
    )


@dataclass(frozen=True)
class _Run:
    """Text that is valid UTF-8."""

    text: str
    data: bytes
    at: int
    """Place of its first byte."""
    spaced: bool
    """Whether the student's tokenizer may put a space in front."""


def _runs(stretch: Stretch, spelling: Spelling) -> Iterator[_Run]:
    """The valid parts of a stretch. What is between them is no UTF-8."""
    spaced = stretch.kind is Kind.TEXT and spelling.puts_space(
        opens=stretch.opens, after_special=stretch.after_special
    )
    at, data = 0, stretch.text
    while at < len(data):
        try:
            end, invalid = len(data), len(data)
            text = data[at:].decode()
        except UnicodeDecodeError as error:
            end, invalid = at + error.start, at + error.end
            text = data[at:end].decode()
        if text:
            yield _Run(text, data[at:end], stretch.at + at, spaced and at == 0)
        at = invalid


def _encoded(runs: Sequence[_Run], student: Tokenizer, spelling: Spelling) -> Iterator[np.ndarray]:
    own = iter(student.encode_batch([run.text for run in runs if run.spaced]))
    inner = [run.text for run in runs if not run.spaced]
    inside = iter(encode_inside(student, inner, spelling=spelling))
    return (next(own if run.spaced else inside) for run in runs)


def _placed(run: _Run, ids: np.ndarray, student: Tokenizer, spelling: Spelling) -> PlacedTokens:
    joined = spelling.join(ids.tolist())
    before = len(joined) - len(run.data)
    if joined != run.data and joined != b" " + run.data:
        return _placed_by_characters(run, student, spelling)
    ends = run.at - before + np.cumsum(spelling.lengths[ids])
    return PlacedTokens(ids, ends - spelling.lengths[ids], ends, np.ones(len(ids), bool))


def _placed_by_characters(run: _Run, student: Tokenizer, spelling: Spelling) -> PlacedTokens:
    """For text that the tokenizer changes: the places of the characters that a token is made of.

    Spaces that it drops belong to the token after them.
    """
    ((ids, spans),) = student.encode_with_spans([run.text])
    _refuse_unknown(run, ids, spans, student, spelling)
    starts, ends = _byte_offsets(run.text)[spans].T
    before = np.concatenate([[0], np.maximum.accumulate(ends)])[: len(ids)]
    written = [spelling.written[i] for i in ids.tolist()]
    places = zip(starts.tolist(), ends.tolist(), strict=True)
    same = [run.data[a:b] == spelt for (a, b), spelt in zip(places, written, strict=True)]
    # Tokens that are parts of one character all have its span.
    kept = np.array(same, bool) & (starts >= before) & (starts < ends)
    return PlacedTokens(ids, run.at + np.minimum(before, starts), run.at + ends, kept)


def _refuse_unknown(
    run: _Run, ids: np.ndarray, spans: np.ndarray, student: Tokenizer, spelling: Spelling
) -> None:
    """ValueError if the tokenizer has no token for a part of the text."""
    covered = np.zeros(len(run.text) + 1, np.int64)
    np.add.at(covered, spans[:, 0], 1)
    np.add.at(covered, spans[:, 1], -1)
    lost = np.flatnonzero(np.cumsum(covered)[:-1] == 0).tolist()
    places = [(i, i + 1) for i in lost if run.text[i].isprintable() and run.text[i] != " "]
    if spelling.unknown is not None:
        literal = spelling.special.get(spelling.unknown)
        found = spans[ids == spelling.unknown].tolist()
        places += [(start, end) for start, end in found if run.text[start:end] != literal]
    for start, end in sorted(places)[:1]:
        around = run.text[max(start - _AROUND, 0) : end + _AROUND]
        raise ValueError(
            f"{student.where}: the tokenizer has no token for {run.text[start:end]!r} in "
            f"{around!r} (character {start} of the text)"
        )


def _byte_offsets(text: str) -> np.ndarray:
    """Bytes in front of each character and of the end, int64 [len(text) + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _one(token: int, at: int, *, places: int = 1) -> PlacedTokens:
    starts = np.array([at], np.int64)
    return PlacedTokens(np.array([token], np.int32), starts, starts + places, np.ones(1, bool))
