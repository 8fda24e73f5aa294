"""A matrix of codes in few bits: weight = (code − zero point) · scale, exact in float32.

Scales and zero points belong to tiles: the whole matrix, a row, a group of a row's columns or a
rectangle. A product of a code and a scale is rounded once, to float32.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from decant.models.prequantised.stored import AT_ONCE, Header, Index, Read


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A two-dimensional array of numbers in a file, several packed in each integer or none."""

    name: str
    """Of the tensor."""
    shape: tuple[int, int]
    """Of the numbers, unpacked."""
    bits: int = 0
    """Of a packed number; 0: not packed."""
    axis: int = 1
    """Along which numbers are packed."""
    order: tuple[int, ...] = ()
    """Place within its integer of each of the numbers that share one; (): ascending."""
    offset: int = 0
    """Subtracted from each number that is read."""
    exponents: bool = False
    """Bytes e that mean 2^(e − 127)."""

    def at(self, read: Read, rows: slice, columns: slice) -> np.ndarray:
        """The numbers of a rectangle, float32."""
        if not self.bits:
            found = np.asarray(read(self.name, self._in_file(rows, columns)))
            found = found.reshape(rows.stop - rows.start, columns.stop - columns.start)
            if self.exponents:
                return np.ldexp(np.float32(1), found.astype(np.int32) - 127)
            return found.astype(np.float32) - np.float32(self.offset)
        count = 32 // self.bits
        spans = [rows, columns]
        along = spans[self.axis]
        first, last = along.start // count, -(-along.stop // count)
        spans[self.axis] = slice(first, last)
        words = read(self.name, (spans[0], spans[1])).view(np.uint32)
        unpacked = unpack(words, bits=self.bits, axis=self.axis, order=self.order)
        inside = [slice(None)] * 2
        inside[self.axis] = slice(along.start - first * count, along.stop - first * count)
        return unpacked[tuple(inside)].astype(np.float32) - np.float32(self.offset)

    def _in_file(self, rows: slice, columns: slice) -> Index | None:
        """The index into the tensor, which may lack axes of length 1. None: all of it."""
        whole = (rows.stop - rows.start, columns.stop - columns.start) == self.shape
        return None if whole else (rows, columns)


def unpack(words: np.ndarray, *, bits: int, axis: int, order: tuple[int, ...] = ()) -> np.ndarray:
    """The numbers in uint32 words [rows, columns], uint8, along `axis`; the lowest bits first."""
    places = order or tuple(range(32 // bits))
    shifts = np.array(places, np.uint32) * np.uint32(bits)
    words = np.expand_dims(words, axis + 1)
    shifts = shifts if axis else shifts[:, None]
    numbers = ((words >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8)
    rows, columns = words.shape[0], words.shape[2 if axis == 0 else 1]
    return numbers.reshape((rows, -1) if axis else (-1, columns))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Numbers of which each belongs to a rectangle of a matrix."""

    numbers: Numbers
    tile: tuple[int, int]
    """Rows and columns of a rectangle; those at the far edges may be smaller."""

    def part(self, read: Read, spans: Index, groups: dict[int, np.ndarray]) -> Part:
        """The numbers of a rectangle of the matrix.

        `groups`: axis → group of each of its positions. Other axes are in equal runs.
        """
        inside, places = [], []
        for axis, span in enumerate(spans):
            if axis in groups:
                inside.append(slice(0, self.numbers.shape[axis]))
                places.append(groups[axis][span])
            else:
                of = np.arange(span.start, span.stop) // self.tile[axis]
                first, last = (int(of[0]), int(of[-1]) + 1) if len(of) else (0, 0)
                inside.append(slice(first, last))
                places.append(of - first)
        if inside[1].stop - inside[1].start == 1:
            places[1] = np.zeros(1, np.int64)  # broadcasts
        return Part(self.numbers.at(read, *inside), *places)


class Part(NamedTuple):
    """Numbers of a rectangle's tiles, and the tile of each row and column."""

    values: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    def of_rows(self, start: int, stop: int) -> np.ndarray:
        """The number of each element of some rows, or what broadcasts to that."""
        return self.values[np.ix_(self.rows[start:stop], self.columns)]


@dataclasses.dataclass(frozen=True)
class Groups:
    """The group of each input of a matrix, as a tensor lists them (act-order)."""

    name: str
    count: int
    """Groups that there are scales for."""
    size: int
    """Inputs of a group, if the tensor says nothing."""

    def of_inputs(self, read: Read) -> np.ndarray:
        """The group of each input. ValueError if there is none of that number."""
        found = np.asarray(read(self.name, None)).astype(np.int64)
        if (found == -1).any():  # written, but not reordered
            return np.arange(len(found)) // self.size
        if len(found) and not 0 <= found.min() <= found.max() < self.count:
            raise ValueError(
                f"tensor {self.name} names groups {found.min()} to {found.max()}; there are "
                f"scales for {self.count}."
            )
        return found


def find_groups(header: Header, name: str, *, inputs: int, size: int) -> Groups | None:
    """The groups in the tensor `name`; None if it lists none. ValueError if it is damaged."""
    found = header.get(name)
    if found is None or found.shape == (0,):
        return None
    if found.shape != (inputs,) or found.dtype not in ("I32", "I64"):
        raise ValueError(f"tensor {name} is {tuple(found)}; expected a group for {inputs} inputs.")
    return Groups(name, -(-inputs // size), size)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight [output, input] in few bits; see `Stored`."""

    kind: str
    codes: Numbers
    scales: Tiles
    zeros: Tiles | None = None
    groups: Groups | None = None
    """None: an input's group is its number divided by the groups' size."""
    transposed: bool = False
    """The tensors hold [input, output]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[output, input]."""
        return self.codes.shape[::-1] if self.transposed else self.codes.shape

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors."""
        zeros = (self.zeros.numbers.name,) if self.zeros else ()
        groups = (self.groups.name,) if self.groups else ()
        return (self.codes.name, self.scales.numbers.name, *zeros, *groups)

    def read(self, read: Read, index: Index) -> np.ndarray:
        """The elements at `index`, float32."""
        rows, columns = spans = index[::-1] if self.transposed else index
        inputs = 0 if self.transposed else 1
        groups = {inputs: self.groups.of_inputs(read)} if self.groups else {}
        scales = self.scales.part(read, spans, groups)
        zeros = self.zeros.part(read, spans, groups) if self.zeros else None
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        step = max(1, AT_ONCE // max(1, out.shape[1]))
        for start in range(0, len(out), step):
            stop = min(start + step, len(out))
            block = slice(rows.start + start, rows.start + stop)
            part = self.codes.at(read, block, columns)
            if zeros:
                part -= zeros.of_rows(start, stop)
            np.multiply(part, scales.of_rows(start, stop), out=out[start:stop])
        return out.T if self.transposed else out
