"""The header of a GGUF file: its metadata, and where each tensor lies.

The gguf package reads headers too, but it trusts them: a count of 2⁶² in a file of 60 bytes keeps
it busy for ever, and tensors may lie outside the file. It also takes 2 s for a vocabulary of
50,000 tokens, which takes 0.1 s here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from collections.abc import Iterator
from typing import Any

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Type

from decant.models.checkpoints.file_bytes import LocalFile, RemoteFile

_FIRST = 1 << 20
"""Bytes that are read at first."""
_LARGEST_HEADER = 128 << 20
"""Bytes. A vocabulary of a million tokens with its merges takes about 40 MB."""
_MOST_ITEMS = 1 << 21
"""Items of all arrays together; Gemma 3, with 262,144 tokens, has 1.3 million."""
_MOST_FIELDS = 1 << 16
"""Metadata fields, and tensors."""
_MOST_AXES = 4
_ALIGNMENT = 32
"""Tensors begin at multiples of this, unless `general.alignment` gives another number."""
_NUMBERS = {
    Type.UINT8: struct.Struct("<B"),
    Type.INT8: struct.Struct("<b"),
    Type.UINT16: struct.Struct("<H"),
    Type.INT16: struct.Struct("<h"),
    Type.UINT32: struct.Struct("<I"),
    Type.INT32: struct.Struct("<i"),
    Type.FLOAT32: struct.Struct("<f"),
    Type.BOOL: struct.Struct("<?"),
    Type.UINT64: struct.Struct("<Q"),
    Type.INT64: struct.Struct("<q"),
    Type.FLOAT64: struct.Struct("<d"),
}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    kind: Kind
    """How its numbers are stored."""
    shape: tuple[int, ...]
    """Axes in the order of Hugging Face files; GGUF reverses them."""
    start: int
    """Its first byte in the file."""
    size: int
    """Its bytes, all of which the file has."""


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    metadata: dict[str, Any]
    """Numbers, booleans, strings, and lists of these."""
    tensors: dict[str, GgufTensor]


def read_header(file: LocalFile | RemoteFile) -> GgufHeader:
    """The header of a GGUF file of version 2 or 3.

    ValueError if it is not one, if a count or size exceeds the file or what any model needs, if a
    name occurs twice, or if two tensors overlap.
    """
    cursor = _Cursor(file)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    if (version := cursor.number(Type.UINT32)) not in (2, 3):
        raise ValueError(f"its version is {version}; 2 and 3, little-endian, can be read")
    tensor_count, field_count = cursor.count(_MOST_FIELDS), cursor.count(_MOST_FIELDS)
    metadata = _unique(cursor.field() for _ in range(field_count))
    found = _unique(cursor.tensor() for _ in range(tensor_count))
    return GgufHeader(metadata, _placed(found, metadata, cursor.at, file.size))


@dataclasses.dataclass
class _Cursor:
    """A place in the header, which moves past what it reads."""

    file: LocalFile | RemoteFile
    data: bytes = b""
    """The beginning of the file."""
    at: int = 0
    items: int = 0
    """Items of arrays read so far."""

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            self._read_on()
        return self.data[start : self.at]

    def _read_on(self) -> None:
        held, most = len(self.data), min(self.file.size, _LARGEST_HEADER)
        if self.at > most:
            raise ValueError(f"its header goes on to byte {self.at:,}; expected an end by {most:,}")
        end = min(max(self.at, 2 * held, _FIRST), most)
        self.data += self.file.read(held, end).tobytes()

    def number(self, kind: Type) -> Any:
        form = _NUMBERS[kind]
        return form.unpack(self.take(form.size))[0]

    def count(self, most: int) -> int:
        value = self.number(Type.UINT64)
        if value > most:
            raise ValueError(f"byte {self.at - 8:,} says {value:,}; at most {most:,} can be read")
        return value

    def string(self) -> str:
        # str, because a UnicodeDecodeError shows the whole string.
        data = self.take(self.count(_LARGEST_HEADER))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the string before byte {self.at:,} is not UTF-8") from error

    def _strings(self, count: int) -> list[str]:
        # Of a vocabulary's 100,000 nearly all are decoded without a call; `string` reads on in the
        # file, and says what is wrong.
        size_at, found = _NUMBERS[Type.UINT64].unpack_from, []
        for _ in range(count):
            held, start = len(self.data), self.at + 8
            end = start + size_at(self.data, self.at)[0] if start <= held else held + 1
            try:
                text = str(self.data[start:end], "utf-8") if end <= held else None
            except UnicodeDecodeError:
                text = None
            if text is None:
                text = self.string()
            else:
                self.at = end
            found.append(text)
        return found

    def field(self) -> tuple[str, Any]:
        name = self.string()
        return name, self._value(Type(self.number(Type.UINT32)))

    def _value(self, kind: Type) -> Any:
        if kind == Type.STRING:
            return self.string()
        if kind != Type.ARRAY:
            return self.number(kind)
        of, count = Type(self.number(Type.UINT32)), self.count(_MOST_ITEMS - self.items)
        self.items += count
        if of == Type.ARRAY:
            raise ValueError("it has an array of arrays")
        if of == Type.STRING:
            return self._strings(count)
        return [
            value for (value,) in _NUMBERS[of].iter_unpack(self.take(count * _NUMBERS[of].size))
        ]

    def tensor(self) -> tuple[str, GgufTensor]:
        """A tensor whose `start` counts from the first tensor's."""
        name = self.string()
        axes = self.number(Type.UINT32)
        if not 1 <= axes <= _MOST_AXES:
            raise ValueError(f"tensor {name} has {axes} axes; expected 1 to {_MOST_AXES}")
        shape = tuple(self.number(Type.UINT64) for _ in range(axes))[::-1]
        kind = Kind(self.number(Type.UINT32))
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"tensor {name}: rows of {shape[-1]} are no blocks of {block}")
        return name, GgufTensor(
            kind, shape, self.number(Type.UINT64), math.prod(shape) // block * size
        )


def _unique(pairs: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in pairs:
        if name in named:
            raise ValueError(f"{name} is in it twice")
        named[name] = value
    return named


def _placed(
    tensors: dict[str, GgufTensor], metadata: dict[str, Any], header: int, length: int
) -> dict[str, GgufTensor]:
    """The tensors with their places in a file of `length` bytes that has a header of `header`."""
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}; expected a power of two")
    first = -(-header // alignment) * alignment
    placed = {
        name: dataclasses.replace(tensor, start=first + tensor.start)
        for name, tensor in tensors.items()
    }
    in_order = sorted(placed.items(), key=lambda item: (item[1].start, item[1].size))
    for name, tensor in in_order:
        if tensor.start + tensor.size > length:
            raise ValueError(
                f"tensor {name} ends at byte {tensor.start + tensor.size:,} of {length:,}; the "
                "file was cut short"
            )
    for (name, tensor), (other, following) in itertools.pairwise(in_order):
        if tensor.start + tensor.size > following.start:
            raise ValueError(f"tensors {name} and {other} overlap")
    return placed
