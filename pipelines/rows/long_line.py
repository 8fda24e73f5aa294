"""A long line of JSON lines, without holding its long strings: they are read when needed."""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from decant.pipelines.rows.long_text import LongArray, LongText

BLOCK = 1 << 20
_KEPT = 1 << 20
"""Bytes of a string that is kept in the line."""
_QUOTE_OR_ESCAPE = re.compile(rb'"|\\.', re.DOTALL)
_LONGEST_ESCAPE = 12  # a surrogate pair
# All of a text but an escape that goes on in the next block. A pair of escapes is not cut.
_WHOLE_ESCAPES = re.compile(
    r"(?:[^\\]+|\\[^u]|\\u[dD][89abAB][\da-fA-F]{2}\\u[\da-fA-F]{4}"
    r"|\\u(?![dD][89abAB])[\da-fA-F]{4})*"
)


class LongLine:
    """A line's bytes, in a temporary file, and its size. `value` parses it."""

    def __init__(self, blocks: Iterable[bytes]):
        """`blocks` are the line's bytes, one after the other."""
        self._bytes = LongArray("uint8")
        self._short, self._strings = _shortened(self._stored(blocks))

    def __len__(self) -> int:
        return len(self._bytes)

    def value(self) -> Any:
        """The JSON value, with a `LongText` for each long string of an object's fields.

        Raises as `json.loads` does. A `LongText` raises ValueError when it is read.
        """
        texts = {
            _name(number): LongText(partial(self._chunks, start, end))
            for number, (start, end) in enumerate(self._strings)
        }
        value = json.loads(self._short.decode().removeprefix("\ufeff"))
        if not isinstance(value, dict):
            return _restored(value, texts)
        return {
            _restored(key, texts): texts.get(item, item)
            if isinstance(item, str)
            else _restored(item, texts)
            for key, item in value.items()
        }

    def _stored(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self._bytes.append(np.frombuffer(block, np.uint8))
            yield block

    def _chunks(self, start: int, end: int) -> Iterator[str]:
        """The string between two bytes of the line."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest, characters = "", 0
        try:
            for at in range(start, end, BLOCK):
                is_last = at + BLOCK >= end
                block = self._bytes[at : min(at + BLOCK, end)].tobytes()
                text = rest + decoder.decode(block, final=is_last)
                cut = len(text) if is_last else _end_of_whole(text)
                chunk, rest = json.loads(f'"{text[:cut]}"'), text[cut:]
                chunk.encode()
                yield chunk
                characters += len(chunk)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"not UTF-8 in the {BLOCK:,} bytes from byte {at} of the line"
            ) from error
        except UnicodeEncodeError as error:
            where = characters + error.start
            raise ValueError(f"half of a surrogate pair at character {where}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error.msg} after byte {at} of the line") from error


def _shortened(blocks: Iterable[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    """The line with a name in place of each long string, and where these strings lie in it."""
    short, strings = bytearray(), []
    at, held, inside, begin, mark = 0, b"", False, 0, 0
    for block in itertools.chain(blocks, [b""]):
        data = held + block
        # A backslash at the end escapes the first byte of the next block.
        held = data[-1:] if block and (len(data) - len(data.rstrip(b"\\"))) % 2 else b""
        data = data[: len(data) - len(held)]
        done = 0
        for match in _QUOTE_OR_ESCAPE.finditer(data):
            if match[0] != b'"':
                continue
            quote = match.start()
            is_long = inside and at + quote - begin > _KEPT
            if is_long:
                del short[mark:]
                short += json.dumps(_name(len(strings))).encode()[1:-1]
                strings.append((begin, at + quote))
            else:
                short += data[done:quote]
            short += b'"'
            inside, begin, mark, done = not inside, at + quote + 1, len(short), quote + 1
        if not inside or at + len(data) - begin <= _KEPT:
            short += data[done:]
        at += len(data)
    return bytes(short), strings


def _name(number: int) -> str:
    return f"\0long string {number}\0"


def _end_of_whole(text: str) -> int:
    match = _WHOLE_ESCAPES.match(text)
    end = match.end() if match else 0
    # More than an escape is left only if an escape is wrong, which the parser then tells.
    return end if len(text) - end < _LONGEST_ESCAPE else len(text)


def _restored(value: Any, texts: Mapping[str, LongText]) -> Any:
    """The value with whole texts in place of names."""
    if isinstance(value, str):
        return "".join(texts[value].chunks()) if value in texts else value
    if isinstance(value, list):
        return [_restored(item, texts) for item in value]
    if isinstance(value, dict):
        return {_restored(key, texts): _restored(item, texts) for key, item in value.items()}
    return value
