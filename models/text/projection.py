"""Which token of a student's vocabulary gets the probability of each token of a teacher's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from decant.models.text.inside_text import encode_inside
from decant.models.text.special_partners import DROPPED, special_partners
from decant.models.text.spelling import Spelling, token_spelling
from decant.models.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Projection:
    """From a teacher's vocabulary of V_t ids to a student's of V_s."""

    first: np.ndarray
    """int32 [V_t]: the first student token of each teacher token; −1 if none fits."""
    exact: np.ndarray
    """bool [V_t]: whether the teacher token is exactly that student token."""
    special: Mapping[int, int]
    """Teacher's special id → the student's, or `DROPPED`, as `special_partners` gives it."""
    overlap: float
    """Share of the student's tokens that are the exact partner of a teacher's token."""
    teacher_overlap: float
    """Share of the teacher's tokens that have an exact partner."""


def project_vocabulary(
    teacher: Tokenizer,
    student: Tokenizer,
    *,
    mapping: Mapping[str, str] | None = None,
    teacher_spelling: Spelling | None = None,
    student_spelling: Spelling | None = None,
) -> Projection:
    """The student's token for each of the teacher's.

    A token that is one token of the student's too gives its probability to it. One that spells
    several gives it to the first of them.

    Args:
        teacher: the tokenizer of a cache.
        student: the other tokenizer.
        mapping: text of a special token → text of its partner, see `special_partners`.
        teacher_spelling: `token_spelling(teacher)`, if it is there already.
        student_spelling: likewise.

    ValueError if a tokenizer changes plain text, or `mapping` names a text that is no token.
    """
    ours = teacher_spelling or token_spelling(teacher)
    theirs = student_spelling or token_spelling(student)
    special = special_partners(teacher, student, mapping=mapping)
    wanted = {i: spelt for i, spelt in enumerate(ours.bytes) if spelt is not None}
    wanted |= {i: text.encode() for i, text in ours.special.items() if i not in special}
    tokens = _Tokens(student, theirs)
    same = tokens.same(wanted, names={i: token for token, i in teacher.backend.ids.items()})
    begun = tokens.beginning({i: spelt for i, spelt in wanted.items() if i not in same})
    first, exact = np.full(teacher.size, -1, np.int32), np.zeros(teacher.size, bool)
    for i, token in (begun | same | special).items():
        first[i] = token
    exact[[*same, *(i for i, partner in special.items() if partner != DROPPED)]] = True
    return Projection(
        first,
        exact,
        special,
        overlap=len(np.unique(first[exact])) / max(theirs.count, 1),
        teacher_overlap=int(exact.sum()) / max(ours.count, 1),
    )


class _Tokens:
    """The student's tokens, found by their bytes.

    If its tokenizer drops spaces, a token that begins a word has one in front here.
    """

    def __init__(self, student: Tokenizer, spelling: Spelling):
        self._student, self._spelling = student, spelling
        self._ids: dict[bytes, list[int]] = defaultdict(list)
        for i, spelt in enumerate(spelling.bytes):
            if spelt is not None:
                begins_word = spelling.drops_spaces and i not in spelling.continuing
                self._ids[b" " + spelt if begins_word else spelt].append(i)
        self._longest = max(map(len, self._ids), default=0)

    def same(self, wanted: Mapping[int, bytes], *, names: Mapping[int, str]) -> dict[int, int]:
        """Teacher's id → the student's id with the same bytes.

        Of several, it is the one of the same name, or else the one that the tokenizer gives.
        """
        same: dict[int, int] = {}
        several: dict[int, list[int]] = {}
        for i, spelt in wanted.items():
            if not (found := self._find(spelt)):
                continue
            named = self._student.backend.ids.get(names[i])
            same[i] = named if named in found else found[0]
            if len(found) > 1 and named not in found:
                several[i] = found
        for i, token in self._written({i: wanted[i] for i in several}).items():
            if token in several[i]:
                same[i] = token
        return same

    def beginning(self, wanted: Mapping[int, bytes]) -> dict[int, int]:
        """For each of the byte strings, the student's token that begins it."""
        begun = {}
        if not self._spelling.drops_spaces:  # those take the longest token anyway
            for i, token in self._written(wanted).items():
                spelt = self._spelling.bytes[token]
                if spelt is not None and wanted[i].startswith(spelt):
                    begun[i] = token
        for i, spelt in wanted.items():
            if i not in begun and (token := self._longest_at(spelt)) is not None:
                begun[i] = token
        return begun

    def _find(self, spelt: bytes) -> list[int]:
        if not self._spelling.drops_spaces:
            return self._ids.get(spelt, [])
        word = spelt.lstrip()
        if len(word) < len(spelt):
            return self._ids.get(b" " + word, [])
        return self._ids.get(word) or self._ids.get(b" " + word, [])

    def _longest_at(self, spelt: bytes) -> int | None:
        for length in range(min(len(spelt), self._longest), 0, -1):
            if found := self._find(spelt[:length]):
                return found[0]
        return None

    def _written(self, wanted: Mapping[int, bytes]) -> dict[int, int]:
        """The first token that the student's tokenizer writes for each that is text."""
        texts: dict[int, str] = {}
        for i, spelt in wanted.items():
            try:
                texts[i] = spelt.decode()
            except UnicodeDecodeError:
                continue
        ids = encode_inside(self._student, list(texts.values()), spelling=self._spelling)
        return {i: int(made[0]) for i, made in zip(texts, ids, strict=True) if len(made)}
