"""Reads the values of a JSON file one after the other, so that only one is held in memory.

The file is an array, or values with white space between them, as JSON lines are.
"""

import json
from collections.abc import Iterator
from typing import Any

_SPACE = " \t\r\n"
_ENDS = (*_SPACE, ",", "]")
"""Characters that end a number."""
LONGEST = 1 << 28
"""Characters of the longest value that is read: it is held in memory."""
_EDGE = 16
"""Characters at the end of what was read in which an error may come from the cut."""


def json_values(chunks: Iterator[str]) -> Iterator[Any]:
    """The values in the text that `chunks` are. ValueError where it is not valid."""
    text = _Text(chunks)
    is_array = text.take("[")
    while sign := text.sign():
        if is_array and sign == "]":
            break
        yield text.value()
        if is_array and not text.take(",") and text.sign() != "]":
            raise ValueError("not valid JSON: expected ',' or ']' behind this record")
    if is_array and not text.take("]"):
        raise ValueError("cut short: the array has no end")
    if text.sign():
        raise ValueError("not valid JSON: there is more behind the array")


class _Text:
    """A text that is read as far as it is needed."""

    def __init__(self, chunks: Iterator[str]):
        self._chunks = chunks
        self._read, self._at = "", 0
        self._decoder = json.JSONDecoder()

    def sign(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._read) and self._read[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._read) or not self._more():
                return self._read[self._at : self._at + 1]

    def take(self, sign: str) -> bool:
        """Pass over `sign` if it is next."""
        found = self.sign() == sign
        self._at += found
        return found

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._read, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._read) - _EDGE or "Unterminated" in error.msg
                if not (cut and self._more()):
                    raise ValueError(f"not valid JSON: {error.msg}") from None
                continue
            except RecursionError:
                raise ValueError("nested too deeply") from None
            # A number may go on: 345. is cut, and what is read of it is 345.
            is_whole = not isinstance(value, int | float) or self._read[end : end + 1] in _ENDS
            if (end < len(self._read) and is_whole) or not self._more():
                self._at = end
                return value

    def _more(self) -> bool:
        """Read on, at least as much as is left; False at the end."""
        left, parts = self._read[self._at :], []
        while sum(map(len, parts)) <= len(left) and (chunk := next(self._chunks, "")):
            parts.append(chunk)
        self._read, self._at = "".join([left, *parts]), 0
        if len(left) > LONGEST:
            raise ValueError(f"a record of more than {LONGEST:,} characters; write JSON lines")
        return bool(parts)
