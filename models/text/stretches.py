"""A segment of a teacher's tokens as stretches of text between special tokens, laid out on places.

A place is a byte of the text. A special token takes one place, and so does the space that a
tokenizer may put in front of a stretch: two tokenisations of one text have the same places.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from decant.models.text.special_partners import DROPPED
from decant.models.text.spelling import Spelling


class Kind(Enum):
    """What a stretch is."""

    TEXT = auto()
    SPECIAL = auto()
    """A special token that the student has, or that is left out."""
    SPELT = auto()
    """The text of a special token that the student does not have."""


@dataclass(frozen=True)
class Stretch:
    """A stretch of text, or one special token."""

    kind: Kind
    token: int
    """Id of its first token."""
    text: bytes
    """Its bytes, without a space that the teacher's tokenizer put in front; of SPECIAL none."""
    at: int
    """Place of its first byte."""
    opens: bool
    """Whether nothing but BOS is in front of it in its document."""
    after_special: bool
    """Whether it follows a special token that the student has."""


@dataclass(frozen=True)
class Layout:
    """The places [start, end) of a segment's n tokens, int64 [n] each, and its stretches."""

    starts: np.ndarray
    ends: np.ndarray
    stretches: list[Stretch]


def lay_out(
    ids: np.ndarray, *, spelling: Spelling, mapping: Mapping[int, int], begins: bool
) -> Layout:
    """Lay out the tokens of a segment.

    Args:
        ids: the tokens, int [n].
        spelling: of the tokenizer that made them.
        mapping: special id → the student's id, as `special_partners` gives it.
        begins: whether the segment is the beginning of its document.
    """
    special = spelling.is_special[ids]
    spelt = np.zeros(len(ids), bool)
    for i in np.flatnonzero(special).tolist():
        spelt[i] = int(ids[i]) in spelling.special and int(ids[i]) not in mapping
    lengths = np.where(special & ~spelt, 1, spelling.lengths[ids])
    cuts = 1 + np.flatnonzero(special[1:] | special[:-1])
    bounds = [0, *cuts.tolist(), len(ids)] if len(ids) else []
    gaps = np.zeros(len(ids), np.int64)
    stretches: list[Stretch] = []
    place, opens, before, after_partner = 0, begins, Kind.TEXT, False
    for first, last in itertools.pairwise(bounds):
        kind = Kind.SPELT if spelt[first] else Kind.SPECIAL if special[first] else Kind.TEXT
        text = b"" if kind is Kind.SPECIAL else spelling.join(ids[first:last].tolist())
        spaced = spelling.puts_space(opens=opens, after_special=before is not Kind.TEXT)
        own = spelling.without_prefix(text) if kind is Kind.TEXT and spaced else text
        at = place + (kind is Kind.TEXT)
        token = int(ids[first])
        stretches.append(Stretch(kind, token, own, at, opens, after_partner))
        gaps[first] = kind is Kind.TEXT and own == text
        place += int(gaps[first] + lengths[first:last].sum())
        opens, before = opens and token == spelling.bos, kind
        after_partner = kind is Kind.SPECIAL and mapping.get(token, DROPPED) != DROPPED
    starts = np.cumsum(gaps + lengths) - lengths
    return Layout(starts, starts + lengths, stretches)
