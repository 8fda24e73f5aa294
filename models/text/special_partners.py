"""Which special token of another tokenizer stands for each special token of a teacher's."""

from __future__ import annotations

from collections.abc import Mapping

from decant.models.text.tokenizer import Tokenizer

DROPPED = -1
"""In place of an id: the token has no partner and no text, so it is left out."""


def special_partners(
    teacher: Tokenizer, student: Tokenizer, *, mapping: Mapping[str, str] | None = None
) -> dict[int, int]:
    """Teacher's special id → the student's id, or `DROPPED`. Ids that are missing have no partner.

    A partner is the one that `mapping` names, or else the token with the same text, or else the one
    of the same role: what ends a document, what ends a turn. Whatever the texts, BOS stands for
    BOS, and what ends a document for a token that ends texts.

    Args:
        teacher: the tokenizer of a cache.
        student: the other tokenizer.
        mapping: text of a special token → text of its partner.

    ValueError if `mapping` names a text that is no token.
    """
    special = {i: t.content for i, t in teacher.backend.added_tokens().items() if t.special}
    ids = student.backend.ids
    added = student.backend.added_tokens()
    partners = {i: ids[text] for i, text in special.items() if ids.get(text) in added}
    ends = student.end_ids
    for n, end in enumerate(teacher.end_ids):
        same = partners.get(end)
        if same is None or (n == 0 and same not in ends):
            partners[end] = ends[min(n, len(ends) - 1)]
    if teacher.bos_id is not None:
        partners[teacher.bos_id] = DROPPED if student.bos_id is None else student.bos_id
    return partners | _named(teacher, student, mapping or {})


def _named(teacher: Tokenizer, student: Tokenizer, mapping: Mapping[str, str]) -> dict[int, int]:
    named = {}
    for text, partner in mapping.items():
        for tokenizer, token in ((teacher, text), (student, partner)):
            if token not in tokenizer.backend.ids:
                raise ValueError(
                    f"special token {text!r} = {partner!r}: {tokenizer.where} has no token "
                    f"{token!r}"
                )
        named[teacher.backend.ids[text]] = student.backend.ids[partner]
    return named
