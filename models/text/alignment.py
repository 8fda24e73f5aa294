"""A stretch of a teacher's tokens as another tokenizer's tokens, and which positions speak of them.

Both tokenisations have places in the same bytes (see `stretches.py`). Where both begin a token at
one place, the teacher's distribution in front of it speaks of the student's token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from decant.models.text.placed_tokens import PlacedTokens, placed_tokens
from decant.models.text.spelling import Spelling
from decant.models.text.stretches import Layout, lay_out
from decant.models.text.tokenizer import Tokenizer

_NOWHERE = -2


@dataclass(frozen=True)
class AlignedSegment:
    """The student's tokens of a segment of n teacher tokens; m of them."""

    tokens: np.ndarray
    """int32 [m]."""
    counted: np.ndarray
    """bool [m]: whether the token holds a byte of a counted teacher token."""
    source: np.ndarray
    """int32 [m]: the teacher position (0 … n−1 of the segment) that predicts what begins where
    token j+1 begins; −1 if no teacher token begins there, or its position is not in the segment."""
    spans: np.ndarray
    """int32 [m]: how many whole teacher tokens token j+1 is made of: the product of that many
    next-token probabilities, from `source` on, is its probability. 0 if it ends inside one."""


def align_segment(
    ids: np.ndarray,
    counted: np.ndarray,
    *,
    teacher: Spelling,
    student: Tokenizer,
    student_spelling: Spelling,
    mapping: Mapping[int, int],
    begins: bool,
) -> AlignedSegment:
    """Tokenise a segment of teacher tokens by the student's tokenizer.

    Special tokens become their partners. Those without one are spelt out. Bytes that are no UTF-8,
    such as a part of a character at an end of the segment, are left out.

    Args:
        ids: the teacher's tokens, int [n].
        counted: whether each of them is learned from, bool [n].
        teacher: the spelling of the teacher's tokenizer.
        student: the other tokenizer.
        student_spelling: its spelling.
        mapping: teacher's special id → the student's, as `Projection.special`.
        begins: whether the segment is the beginning of its document.

    ValueError if the teacher's tokens do not hold the spaces of the text, or for text that the
    student's tokenizer cannot spell; it names the place.
    """
    if teacher.drops_spaces:
        raise ValueError(
            "the cache's tokenizer drops the spaces between words, so the text cannot be made from "
            "its tokens"
        )
    layout = lay_out(np.asarray(ids, np.int64), spelling=teacher, mapping=mapping, begins=begins)
    made = placed_tokens(
        layout.stretches, student=student, spelling=student_spelling, mapping=mapping
    )
    return _matched(layout, np.asarray(counted), made)


def _matched(layout: Layout, counted: np.ndarray, made: PlacedTokens) -> AlignedSegment:
    """What the teacher's tokens say of the student's, by their places."""
    starts, ends = layout.starts, layout.ends
    first = np.searchsorted(starts, made.starts)
    begins = made.kept & (np.append(starts, _NOWHERE)[first] == made.starts)
    source = np.where(begins, first - 1, -1)
    last = np.searchsorted(ends, made.ends)
    whole = (source >= 0) & (np.append(ends, _NOWHERE)[last] == made.ends)
    spans = np.where(whole, last - first + 1, 0)
    sums = np.concatenate([[0], np.cumsum(counted, dtype=np.int64)])
    low = np.searchsorted(ends, made.starts, side="right")
    high = np.searchsorted(starts, made.ends)
    holds = sums[np.maximum(high, low)] > sums[low]
    return AlignedSegment(made.ids, holds, _of_the_next(source, -1), _of_the_next(spans, 0))


def _of_the_next(values: np.ndarray, last: int) -> np.ndarray:
    """A token's value at the position before it, which predicts it."""
    return np.append(values[1:], np.full(min(len(values), 1), last)).astype(np.int32)
