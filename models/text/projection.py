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
    """Share of the student's vocabulary that is the exact partner of a teacher token."""
    teacher_overlap: float
    """Share of the teacher's vocabulary that has an exact partner."""


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
    first, exact = np.full(teacher.size, DROPPED, np.int32), np.zeros(teacher.size, bool)
    same = _same_bytes(teacher, student, ours, theirs)
    first[list(same)] = list(same.values())
    exact[list(same)] = True
    wanted = {
        i: spelt for i, spelt in enumerate(ours.bytes) if spelt is not None and i not in same
    } | {i: text.encode() for i, text in ours.special.items() if i not in special}
    for i, token in _beginnings(wanted, student, theirs).items():
        first[i] = token
    for i, partner in special.items():
        first[i], exact[i] = partner, partner != DROPPED
    partners = len(np.unique(first[exact]))
    tokens = sum(spelt is not None for spelt in theirs.bytes) + len(theirs.special)
    all_ours = sum(spelt is not None for spelt in ours.bytes) + len(ours.special)
    return Projection(
        first, exact, special, partners / max(tokens, 1), int(exact.sum()) / max(all_ours, 1)
    )


def _same_bytes(
    teacher: Tokenizer, student: Tokenizer, ours: Spelling, theirs: Spelling
) -> dict[int, int]:
    """Teacher's id → the student's id with the same bytes."""
    by_bytes: dict[bytes, list[int]] = defaultdict(list)
    for i, spelt in enumerate(theirs.bytes):
        if spelt is not None:
            by_bytes[spelt].append(i)
    names = {i: token for token, i in teacher.backend.ids.items()}
    same: dict[int, int] = {}
    doubtful: dict[int, list[int]] = {}
    for i, spelt in enumerate(ours.bytes):
        found = by_bytes.get(spelt) if spelt is not None else None
        if found and len(found) == 1:
            same[i] = found[0]
        elif found:
            named = student.backend.ids.get(names[i])
            if named in found:
                same[i] = named
            else:
                doubtful[i] = found
    written = _encoded({i: by for i in doubtful if (by := ours.bytes[i])}, student, theirs)
    for i, found in doubtful.items():
        ids = written.get(i)
        same[i] = int(ids[0]) if ids is not None and ids[0] in found else found[0]
    return same


def _encoded(
    wanted: Mapping[int, bytes], student: Tokenizer, theirs: Spelling
) -> dict[int, np.ndarray]:
    """The student's ids of the bytes that are text."""
    texts: dict[int, str] = {}
    for i, spelt in wanted.items():
        try:
            texts[i] = spelt.decode()
        except UnicodeDecodeError:
            continue
    ids = encode_inside(student, list(texts.values()), spelling=theirs)
    return {i: made for i, made in zip(texts, ids, strict=True) if len(made)}


def _beginnings(
    wanted: Mapping[int, bytes], student: Tokenizer, theirs: Spelling
) -> dict[int, int]:
    """For each of the byte strings, the student's token that begins it."""
    begun: dict[int, int] = {}
    for i, ids in _encoded(wanted, student, theirs).items():
        spelt = theirs.bytes[ids[0]]
        if spelt is not None and wanted[i].startswith(spelt):
            begun[i] = int(ids[0])
    by_bytes = {spelt: i for i, spelt in enumerate(theirs.bytes) if spelt is not None}
    longest = max(map(len, by_bytes), default=0)
    for i, spelt in wanted.items():
        if i in begun:
            continue
        for length in range(min(len(spelt), longest), 0, -1):
            if (token := by_bytes.get(spelt[:length])) is not None:
                begun[i] = token
                break
    return begun
