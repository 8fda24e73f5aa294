"""Which tokens of a document are learned from: all of a text, the completion, the assistant's.

A document is tokenised as a whole; then characters decide which tokens are learned from. A token
that holds at least one character of the completion (or of the assistant's turn) is.

- text: BOS in front if the tokenizer says so; EOS at the end.
- rollout: the completion, and its end token if it has one.
- completion: BOS and EOS as for a text, unless the text already has them; EOS is learned from.
- chat: exactly the template's text, as when the model is used. The template writes BOS if the model
  wants it, and ends every turn itself, so no EOS is added. Tokens after the last one that is
  learned from are left out: no target depends on them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.long_texts import PIECE
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.rows.assistant_spans import Spans, assistant_spans
from decant.pipelines.rows.documents import Chat, Completion, Content, Document
from decant.pipelines.rows.long_text import LongArray, LongSegment, LongText
from decant.pipelines.rows.rollouts import Rollout, tokens_of
from decant.pipelines.rows.sources import Kind
from decant.schemas.records.rows import Segment

_LONG = 1 << 19
"""Characters above which a document is tokenised in pieces, which takes twice as long."""
VERSION = 2
"""Part of the rows_id of corpora with chats or completions. Raise it if their rows change.
1, of releases before 0.8, refused many chats, and learned empty blocks of thinking."""
VERSIONS = (VERSION, 1)
"""All versions that a cache may have been begun with, newest first."""


@dataclass(frozen=True)
class Marked:
    """A document as one text, and its characters that are learned from."""

    document: Document
    text: str | LongText
    learned: Spans | None = None
    """Ranges [start, end) of characters. None: all of the text."""

    @property
    def is_long(self) -> bool:
        """Whether the document is tokenised in pieces, so that its tokens need little memory."""
        if isinstance(self.document.content, Rollout):
            return False
        return isinstance(self.text, LongText) or len(self.text) > _LONG

    def chunks(self) -> Iterator[str]:
        """The text, a part at a time."""
        if isinstance(self.text, LongText):
            yield from self.text.chunks()
        else:
            for start in range(0, len(self.text), PIECE):
                yield self.text[start : start + PIECE]


def marking_rules(
    kinds: Collection[Kind], template: ChatTemplate | None, *, version: int = VERSION
) -> dict[str, Any]:
    """Entries of rows_id that depend on the kinds of the corpus's files; none if all are texts."""
    rules: dict[str, Any] = {}
    if {"chat", "completion"} & set(kinds):
        rules["learned"] = version
    if template and "chat" in kinds:
        rules["chat_template"] = template.digest
    return rules


def mark(document: Document, tokenizer: Tokenizer, template: ChatTemplate | None) -> Marked:
    """The document's text with its learned characters. ValueError for a chat that `template`
    cannot render."""
    content = document.content
    if isinstance(content, str | LongText):
        return Marked(document, content)
    if isinstance(content, Completion | Rollout):
        text = content.prompt + content.completion
        return Marked(document, text, ((len(content.prompt), len(text)),))
    assert template, "the driver checked that the tokenizer has one"
    text, spans = assistant_spans(content, template, special=tokenizer.special_texts)
    return Marked(document, text, spans)


def segments(batch: Sequence[Marked], tokenizer: Tokenizer) -> list[Segment]:
    """The documents as tokens, one uncut segment each. None of them is long.

    ValueError for a text that the tokenizer cannot spell, or a rollout that does not fit it.
    """
    written = [marked for marked in batch if isinstance(marked.document.content, Rollout)]
    others = [marked for marked in batch if not isinstance(marked.document.content, Rollout)]
    made = iter(_of_rollouts(written, tokenizer)), iter(_of_texts(others, tokenizer))
    return [next(made[0 if isinstance(m.document.content, Rollout) else 1]) for m in batch]


def _of_rollouts(batch: Sequence[Marked], tokenizer: Tokenizer) -> Iterator[Segment]:
    contents = [m.document.content for m in batch if isinstance(m.document.content, Rollout)]
    for marked, made in zip(batch, tokens_of(contents, tokenizer), strict=True):
        place = marked.document.place
        yield Segment(made.tokens, made.counted, place.source, place.offset, 0, made.logprobs)


def _of_texts(batch: Sequence[Marked], tokenizer: Tokenizer) -> list[Segment]:
    texts = [str(marked.text) for marked in batch]
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


def long_segment(marked: Marked, tokenizer: Tokenizer) -> LongSegment:
    """A long document as tokens, those that `segments` gives. They lie in temporary files."""
    content, place = marked.document.content, marked.document.place
    tokens, counted = LongArray("int32"), LongArray("bool")
    end = 0
    ids = np.zeros(0, np.int32)
    for ids, places in tokenizer.encode_long(marked.chunks()):
        if not len(tokens):
            bos = _bos(content, ids, tokenizer)
            tokens.append(np.array(bos, np.int32))
            counted.append(np.full(len(bos), isinstance(content, str | LongText)))
        learned = _learned(places, marked.learned)
        end = len(tokens) + _end(learned) if learned.any() else end
        tokens.append(ids)
        counted.append(learned)
    if isinstance(content, Chat):
        tokens.cut(end)
        counted.cut(end)
    else:
        eos = _eos(content, ids, tokenizer)
        tokens.append(np.array(eos, np.int32))
        counted.append(np.ones(len(eos), bool))
    return LongSegment(tokens, counted, place.source, place.offset)


def _learned(places: np.ndarray, spans: Spans | None) -> np.ndarray:
    """Whether each token, with characters `places` [tokens, (start, end)], overlaps a span."""
    if spans is None:
        return np.ones(len(places), bool)
    ordered = np.array(sorted(spans), np.int64).reshape(-1, 2)
    starts, ends = ordered[:, 0], np.maximum.accumulate(ordered[:, 1])
    # A token without characters counts as its place.
    last = np.searchsorted(starts, np.maximum(places[:, 1], places[:, 0] + 1)) - 1
    return (last >= 0) & (ends[last] > places[:, 0]) if len(ordered) else last >= 0


def _segment(marked: Marked, ids: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer) -> Segment:
    content, place = marked.document.content, marked.document.place
    if isinstance(content, Chat):
        end = _end(counted)
        return Segment(ids[:end], counted[:end], place.source, place.offset, 0)
    bos, eos = _bos(content, ids, tokenizer), _eos(content, ids, tokenizer)
    is_text = not isinstance(content, Completion)
    return Segment(
        np.concatenate([bos, ids, eos]).astype(np.int32),
        np.concatenate([np.full(len(bos), is_text), counted, np.ones(len(eos), bool)]),
        place.source,
        place.offset,
        0,
    )


def _end(counted: np.ndarray) -> int:
    """One more than the number of the last token that is learned from."""
    return 1 + int(np.flatnonzero(counted).max(initial=-1))


# A plain text gets BOS and EOS even if it begins or ends with one. A chat's template writes them.


def _bos(content: Content, ids: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    """The id to put in front of a document that begins with `ids`, if any."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    has_its_own = isinstance(content, Completion) and bos == ids[:1].tolist()
    return [] if has_its_own or isinstance(content, Chat) else bos


def _eos(content: Content, ids: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    """The id to put after a document that ends with `ids`, if any."""
    eos = [tokenizer.eos_id]
    has_its_own = isinstance(content, Completion) and eos == ids[-1:].tolist()
    return [] if has_its_own or isinstance(content, Chat) else eos
