"""Spans of tokens where a normaliser composes characters: "e" and U+0301 become one "é".

The library gives what it composed the place of the first character, as if the others were deleted.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from typing import Literal

import numpy as np

from decant.models.text.backend import Backend
from decant.models.text.token_rules import flat_steps

Form = Literal["NFC", "NFKC"]

_LONGEST = 64
"""Characters that are looked at around a missing one. Text in use has at most 30 marks in a row."""


def composing_form(backend: Backend) -> Form | None:
    """How a tokenizer composes characters before it splits the text; None if it does not."""
    names = {step["type"] for step in flat_steps(backend.steps()["normalizer"])}
    if names & {"NFKC", "Precompiled"}:  # SentencePiece's tables are NFKC with exceptions
        return "NFKC"
    return "NFC" if "NFC" in names else None


def with_composed(text: str, spans: np.ndarray, *, form: Form | None) -> np.ndarray:
    """The spans, in which tokens of composed characters hold all that they are made from.

    Args:
        text: the text that was tokenised, before normalisation.
        spans: int [n, 2], characters [start, end) of each token as the library gives them.
        form: how the tokenizer composes; None if it does not.
    """
    if form is None or unicodedata.is_normalized(form, text) or not len(spans):
        return spans
    missing = _missing(len(text), spans)
    first, last = np.arange(len(text)), np.arange(len(text))
    for at in np.flatnonzero(missing).tolist():
        start = _starter(text, at, missing)
        if start is None:
            continue
        end = at
        while end + 1 < min(len(text), start + _LONGEST) and unicodedata.combining(text[end + 1]):
            end += 1
        # Marks may have changed places, so all tokens of the group get all of it.
        is_mark = unicodedata.combining(text[at])
        if not _composes([*text[start : end + 1]] if is_mark else [text[start:at], text[at]], form):
            continue
        first[start : end + 1] = start
        last[start : end + 1] = np.maximum(last[start : end + 1], end)
    filled = spans[:, 0] < spans[:, 1]
    starts, ends = spans[filled].T
    composed = spans.copy()
    composed[filled] = np.stack([first[starts], last[ends - 1] + 1], axis=1)
    return composed


def _missing(length: int, spans: np.ndarray) -> np.ndarray:
    """Whether no token holds the character, bool [length]."""
    edges = np.zeros(length + 1, np.int64)
    np.add.at(edges, spans[:, 0], 1)
    np.add.at(edges, spans[:, 1], -1)
    return np.cumsum(edges)[:-1] == 0


def _starter(text: str, at: int, missing: np.ndarray) -> int | None:
    """Place of the character that `at` would be composed with: the last one that is no mark."""
    for place in itertools.islice(range(at - 1, -1, -1), _LONGEST):
        if not missing[place] and not unicodedata.combining(text[place]):
            return place
    return None


def _composes(parts: Sequence[str], form: Form) -> bool:
    """Whether parts become one character, instead of going away."""
    apart = sum(len(unicodedata.normalize(form, part)) for part in parts)
    return len(unicodedata.normalize(form, "".join(parts))) < apart
