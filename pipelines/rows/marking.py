"""Which tokens of a document are learned from: all of a text, the completion, the assistant's.

A document is tokenised as a whole; then characters decide which tokens are learned from. A token
that holds at least one character of the completion (or of the assistant's turn) is.

- text: BOS in front if the tokenizer says so; EOS at the end.
- completion: BOS and EOS as for a text, unless the text already has them; EOS is learned from.
- chat: exactly the template's text, as when the model is used. The template writes BOS if the model
  wants it, and ends every turn itself, so no EOS is added. Tokens after the last one that is
  learned from are left out: no target depends on them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.rows.assistant_spans import Spans, assistant_spans
from decant.pipelines.rows.documents import Chat, Completion, Document
from decant.pipelines.rows.sources import Kind
from decant.schemas.records.rows import Segment

VERSION = 2
"""Part of the rows_id of corpora with chats or completions. Raise it if their rows change."""


@dataclass(frozen=True)
class Marked:
    """A document as one text, and its characters that are learned from."""

    document: Document
    text: str
    learned: Spans | None = None
    """Ranges [start, end) of characters. None: all of the text."""


def marking_rules(kinds: Collection[Kind], template: ChatTemplate | None) -> dict[str, Any]:
    """Entries of rows_id that depend on the kinds of the corpus's files; none if all are texts."""
    rules: dict[str, Any] = {}
    if set(kinds) - {"text"}:
        rules["learned"] = VERSION
    if template and "chat" in kinds:
        rules["chat_template"] = template.digest
    return rules


def mark(document: Document, tokenizer: Tokenizer, template: ChatTemplate | None) -> Marked:
    """The document's text with its learned characters. ValueError for a chat that `template`
    cannot render."""
    content = document.content
    if isinstance(content, str):
        return Marked(document, content)
    if isinstance(content, Completion):
        text = content.prompt + content.completion
        return Marked(document, text, ((len(content.prompt), len(text)),))
    assert template, "the driver checked that the tokenizer has one"
    text, spans = assistant_spans(content, template, special=tokenizer.special_texts)
    return Marked(document, text, spans)


def segments(batch: Sequence[Marked], tokenizer: Tokenizer) -> list[Segment]:
    """The documents as tokens, one uncut segment each."""
    texts = [marked.text for marked in batch]
    if all(marked.learned is None for marked in batch):
        counted = [(ids, np.ones(len(ids), bool)) for ids in tokenizer.encode_batch(texts)]
    else:
        counted = [
            (ids, _learned(places, marked.learned))
            for marked, (ids, places) in zip(batch, tokenizer.encode_with_spans(texts), strict=True)
        ]
    return [
        _segment(marked, ids, learned, tokenizer)
        for marked, (ids, learned) in zip(batch, counted, strict=True)
    ]


def _learned(places: np.ndarray, spans: Spans | None) -> np.ndarray:
    """Whether each token, with characters `places` [tokens, (start, end)], overlaps a span."""
    learned = np.full(len(places), spans is None)
    starts = places[:, 0]
    ends = np.maximum(places[:, 1], starts + 1)  # a token without characters counts as its place
    for start, end in spans or ():
        learned |= (starts < end) & (ends > start)
    return learned


def _segment(marked: Marked, ids: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer) -> Segment:
    content, place = marked.document.content, marked.document.place
    if isinstance(content, Chat):
        end = 1 + int(np.flatnonzero(counted).max(initial=-1))
        return Segment(ids[:end], counted[:end], place.source, place.offset, 0)
    # A plain text gets BOS and EOS even if it begins or ends with one.
    is_completion = isinstance(content, Completion)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    bos = [] if is_completion and bos == ids[:1].tolist() else bos
    eos = [tokenizer.eos_id]
    eos = [] if is_completion and eos == ids[-1:].tolist() else eos
    return Segment(
        np.concatenate([bos, ids, eos]).astype(np.int32),
        np.concatenate([np.full(len(bos), not is_completion), counted, np.ones(len(eos), bool)]),
        place.source,
        place.offset,
        0,
    )
