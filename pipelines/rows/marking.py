"""Which tokens of a document are learned from: all of a text, the completion, the assistant's.

A document is always tokenised as a whole, then tokens are found by their characters; a token that
holds a character of the completion and others too is learned from.

- text: BOS as the tokenizer says; EOS after it.
- completion: the same round prompt and completion, where the text does not have them already;
  EOS is learned.
- chat: what the template writes and nothing else, as it is when the model is used. Templates write
  BOS where a model wants it, and end every turn; EOS would be an end after the end. What follows
  the last token that is learned from is left out, as nothing depends on it.
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

VERSION = 1
"""Part of the rows_id of corpora with chats or completions: a change makes other rows."""


@dataclass(frozen=True)
class Marked:
    """A document as one text and the characters [start, end) to learn; None stands for all."""

    document: Document
    text: str
    learned: Spans | None = None


def marking_rules(kinds: Collection[Kind], template: ChatTemplate | None) -> dict[str, Any]:
    """What decides rows of these kinds besides their text; nothing for texts alone."""
    rules: dict[str, Any] = {}
    if set(kinds) - {"text"}:
        rules["learned"] = VERSION
    if template and "chat" in kinds:
        rules["chat_template"] = template.digest
    return rules


def mark(document: Document, tokenizer: Tokenizer, template: ChatTemplate | None) -> Marked:
    """The document as it is tokenised. ValueError for a chat that cannot be rendered."""
    content = document.content
    if isinstance(content, str):
        return Marked(document, content)
    if isinstance(content, Completion):
        text = content.prompt + content.completion
        return Marked(document, text, ((len(content.prompt), len(text)),))
    assert template, "the driver has seen that there is one"
    text, spans = assistant_spans(content, template, special=tokenizer.special_texts)
    return Marked(document, text, spans)


def segments(batch: Sequence[Marked], tokenizer: Tokenizer) -> list[Segment]:
    """The documents as tokens, each uncut."""
    texts = [marked.text for marked in batch]
    if all(marked.learned is None for marked in batch):
        counted = [(ids, np.ones(len(ids), bool)) for ids in tokenizer.encode_batch(texts)]
    else:
        counted = [
            (ids, _learned(places, marked.learned))
            for marked, (ids, places) in zip(batch, tokenizer.encode_with_spans(texts), strict=True)
        ]
    return [_segment(m, *found, tokenizer) for m, found in zip(batch, counted, strict=True)]


def _learned(places: np.ndarray, spans: Spans | None) -> np.ndarray:
    learned = np.full(len(places), spans is None)
    starts = places[:, 0]
    ends = np.maximum(places[:, 1], starts + 1)  # a token of no character is where it stands
    for start, end in spans or ():
        learned |= (starts < end) & (ends > start)
    return learned


def _segment(marked: Marked, ids: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer) -> Segment:
    content, place = marked.document.content, marked.document.place
    if isinstance(content, Chat):
        end = 1 + int(np.flatnonzero(counted).max(initial=-1))
        return Segment(ids[:end], counted[:end], place.source, place.offset, 0)
    has = isinstance(content, Completion)  # texts get both, whatever they begin and end with
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    bos = [] if has and bos == ids[:1].tolist() else bos
    eos = [tokenizer.eos_id]
    eos = [] if has and eos == ids[-1:].tolist() else eos
    return Segment(
        np.concatenate([bos, ids, eos]).astype(np.int32),
        np.concatenate([np.full(len(bos), not has), counted, np.ones(len(eos), bool)]),
        place.source,
        place.offset,
        0,
    )
