"""Tokenises a long text in pieces, with the ids of the whole text: memory does not grow with it.

A tokenizer splits a text before its model sees it (a *stretch* is a word, a line break, an added
token), so a text may be cut between two stretches. How it splits near the end of a piece depends on
what follows. So each piece is read with some text beyond it, and the next piece begins where at
least a few stretches, tokenised from there, come out as they did in the piece before. A text
without such a place is tokenised as a whole.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from decant.models.text.backend import Backend
from decant.models.text.composed_spans import Form, composing_form, with_composed

PIECE = 1 << 18
"""Characters of a piece. A token takes about 300 bytes in the library's result."""
BEYOND = 1 << 13
"""Characters after a place that must be known to split there."""
_LONGEST = 1 << 22
"""Characters of a piece without a place to cut, after which the whole text is taken."""
_WITNESSES = 32
"""Stretches after a cut that must come out the same on both sides."""

Encoded = tuple[np.ndarray, np.ndarray]
"""ids int32 [n], and the characters [start, end) of each token, int64 [n, 2]."""


class LongTexts:
    """Tokenises texts that come in chunks."""

    def __init__(self, backend: Backend, *, piece: int = PIECE, beyond: int = BEYOND):
        """`piece`: characters of a piece; `beyond`: characters that are read after it."""
        self._backend = backend
        self._size = piece
        self._beyond = beyond

    def encode(self, chunks: Iterable[str]) -> Iterator[Encoded]:
        """The tokens of the text that `chunks` make up, a piece at a time.

        Spans count the characters of the whole text.
        """
        buffer = _Buffer(chunks)
        at, size = 0, self._size if self._can_be_cut else None
        now = self._piece(buffer, 0, size)
        while not now.is_last:
            assert size, "a piece without a size is the last"
            for cut, known in self._cuts(now):
                following = self._piece(buffer, cut, self._size)
                if following.begins_as(now, cut, known):
                    break
            else:
                size = size * 2 if size < _LONGEST else None
                now = self._piece(buffer, 0, size)
                continue
            first = int(np.searchsorted(now.spans[:, 0], cut))
            yield now.ids[:first], self._composed(now.text[:cut], now.spans[:first]) + at
            buffer.drop(cut)
            at, size, now = at + cut, self._size, following
        yield now.ids, self._composed(now.text, now.spans) + at

    def _composed(self, text: str, spans: np.ndarray) -> np.ndarray:
        return with_composed(text, spans, form=self._form)

    @cached_property
    def _form(self) -> Form | None:
        return composing_form(self._backend)

    def _piece(self, buffer: "_Buffer", start: int, size: int | None) -> "_Piece":
        """The piece that begins at `start` of the buffer; None is all that is left."""
        text, is_last = buffer.read(start, None if size is None else size + self._beyond)
        return _Piece(text, self._backend.encoding(text), is_last=is_last)

    def _cuts(self, piece: "_Piece") -> Iterator[tuple[int, int]]:
        """(cut, known): places to cut at, the best first, and up to where its tokens are known."""
        known = len(piece.text) - self._beyond
        starts = piece.starts(piece.new_words, known)
        if len(starts) <= _WITNESSES:
            starts = piece.starts(self._unmerged(piece), known)
        # Tokenizers may add a space to a text that has none in front, or strip one.
        after: dict[bool, int] = {}
        for cut in reversed(starts[:-_WITNESSES]):
            if self._stands_alone(piece.text, cut):
                after.setdefault(piece.text[cut].isspace(), cut)
            if len(after) == 2:
                break
        for cut in after.values():
            yield cut, starts[-1]

    def _stands_alone(self, text: str, at: int) -> bool:
        """Whether no normaliser and no added token acts across this place."""
        before, after = text[at - 1], text[at]
        if self._strips and before.isspace() and after.isspace():
            return False
        if not self._steps["normalizer"]:
            return True
        decomposed = unicodedata.normalize("NFKD", after)
        composed = unicodedata.normalize("NFC", before + after)
        apart = unicodedata.normalize("NFC", before) + unicodedata.normalize("NFC", after)
        return not unicodedata.combining(decomposed[0]) and composed == apart

    @cached_property
    def _strips(self) -> bool:
        """Whether an added token takes the spaces beside it."""
        return any(token.lstrip or token.rstrip for token in self._backend.added_tokens().values())

    @cached_property
    def _steps(self) -> dict[str, Any]:
        return self._backend.steps()

    @cached_property
    def _can_be_cut(self) -> bool:
        """Whether a split depends on nearby text only: expressions look one character ahead."""
        rules = json.dumps(self._steps)
        expressions = re.findall(r'"Regex": ("(?:[^"\\]|\\.)*")', rules)
        looks = r"\(\?(?:=|!(?!\\[sS]\))|<[=!])|\\[1-9]|(?<!\\)\.[*+]"
        return not any(re.search(looks, json.loads(text)) for text in expressions)

    def _unmerged(self, piece: "_Piece") -> np.ndarray:
        """Whether each token begins with a character that no merge joins to the one before.

        For tokenizers that merge a text without splitting it first, as Gemma's do.
        """
        tokens = piece.encoding.tokens
        if not self._pairs:
            return np.zeros(len(tokens), bool)
        apart = [
            not (_is_byte(before) or _is_byte(after) or before[-1] + after[0] in self._pairs)
            for before, after in itertools.pairwise(tokens)
        ]
        return np.array([False, *apart], bool)

    @cached_property
    def _pairs(self) -> frozenset[str]:
        """All pairs of characters inside tokens; empty if the model does not merge characters."""
        if not self._backend.merges_characters():
            return frozenset()
        return frozenset(a + b for token in self._backend.ids for a, b in itertools.pairwise(token))


class _Piece:
    """A piece of text and its tokens."""

    def __init__(self, text: str, encoding: tokenizers.Encoding, *, is_last: bool):
        self.text, self.encoding, self.is_last = text, encoding, is_last
        self.ids = np.asarray(encoding.ids, np.int32)
        self.spans = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)

    @property
    def new_words(self) -> np.ndarray:
        """Whether each token begins another stretch than the token before."""
        words = np.array([-1 if word is None else word for word in self.encoding.word_ids])
        return np.diff(words, prepend=words[:1]) != 0

    def starts(self, independent: np.ndarray, known: int) -> list[int]:
        """First characters, up to `known`, of the tokens that are `independent` of all before."""
        tokens = np.flatnonzero(independent)
        tokens = tokens[self.spans[tokens - 1, 1] <= self.spans[tokens, 0]]
        starts = self.spans[tokens, 0]
        return starts[(starts > 0) & (starts <= known)].tolist()

    def begins_as(self, before: "_Piece", cut: int, known: int) -> bool:
        """Whether this piece, cut from `before`, has the same tokens there up to `known`."""
        here = self.spans[:, 0] < known - cut
        there = (before.spans[:, 0] >= cut) & (before.spans[:, 0] < known)
        return np.array_equal(self.ids[here], before.ids[there]) and np.array_equal(
            self.spans[here] + cut, before.spans[there]
        )


class _Buffer:
    """Text that comes in chunks, read as far as it is needed."""

    def __init__(self, chunks: Iterable[str]):
        self._chunks = iter(chunks)
        self._text = ""
        self._is_all = False

    def read(self, start: int, size: int | None) -> tuple[str, bool]:
        """Up to `size` characters from `start`, and whether they are the last."""
        parts, have = [self._text], len(self._text)
        while not self._is_all and (size is None or have <= start + size):
            chunk = next(self._chunks, None)
            self._is_all = chunk is None
            parts.append(chunk or "")
            have += len(chunk or "")
        self._text = "".join(parts)
        end = have if size is None else min(start + size, have)
        return self._text[start:end], self._is_all and end == have

    def drop(self, count: int) -> None:
        """Forget the first `count` characters."""
        self._text = self._text[count:]


def _is_byte(token: str) -> bool:
    return token.startswith("<0x")
