"""Packs documents into rows: long documents are cut, short ones share a row."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from decant.pipelines.rows.long_text import LongSegment
from decant.schemas.records.rows import Row, Segment, build_row

VERSION = 1
"""Part of every rows_id. Raise it if the same documents would give other rows."""


def pieces(document: Segment | LongSegment, *, length: int) -> Iterator[Segment]:
    """Cut a document into pieces of at most `length` tokens.

    Each piece repeats the last token of the piece before, so that the transition between the two
    is scored exactly once. No piece is made of a single token, which has no transition, nor of
    tokens of which none is learned from.
    """
    start = 0
    while start + 1 < len(document.tokens):
        piece = slice(start, start + length)
        counted, logprobs = document.counted[piece], document.logprobs
        if counted[1:].any():
            yield Segment(
                document.tokens[piece],
                counted,
                document.source,
                document.document,
                document.start + start,
                None if logprobs is None else logprobs[piece],
            )
        start += length - 1


@dataclass
class Packer:
    """Puts each piece into the first of at most `open_rows` open rows that has room for it.

    Rows have `length` positions. If no open row has room, a new row is opened; if all `open_rows`
    are open, the fullest is closed first.
    """

    length: int
    open_rows: int
    _open: list[list[Segment]] = field(default_factory=list)
    _room: list[int] = field(default_factory=list)

    def add(self, document: Segment | LongSegment) -> Iterator[Row]:
        """Add a document; returns the rows that this completes."""
        for piece in pieces(document, length=self.length):
            if len(piece.tokens) == self.length:
                yield build_row([piece], length=self.length)
            else:
                yield from self._place(piece)

    def finish(self) -> Iterator[Row]:
        """The rows still open, oldest first."""
        for segments in self._open:
            yield build_row(segments, length=self.length)
        self._open, self._room = [], []

    def _place(self, piece: Segment) -> Iterator[Row]:
        need = len(piece.tokens)
        fits = next((i for i, room in enumerate(self._room) if room >= need), None)
        if fits is None:
            if len(self._open) >= self.open_rows:
                yield self._close(int(np.argmin(self._room)))
            self._open.append([])
            self._room.append(self.length)
            fits = len(self._open) - 1
        self._open[fits].append(piece)
        self._room[fits] -= need
        # A piece has at least two tokens.
        if self._room[fits] < 2:
            yield self._close(fits)

    def _close(self, index: int) -> Row:
        self._room.pop(index)
        return build_row(self._open.pop(index), length=self.length)
