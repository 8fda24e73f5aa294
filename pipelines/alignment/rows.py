"""A unit of another cache as rows of the student's tokens, with the positions that speak of them.

Every segment of every row is tokenised by itself and the segments are packed again. Nothing passes
from one unit to the next, so a unit's rows depend on the other cache's unit alone.
"""

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from decant.models.text.alignment import AlignedSegment, align_segment
from decant.models.text.projection import Projection, project_vocabulary
from decant.models.text.spelling import Spelling, token_spelling
from decant.models.text.tokenizer import Tokenizer, tokenizer_of
from decant.pipelines.rows.packing import Packer
from decant.schemas import Cache, open_cache
from decant.schemas.disk.stand_in import Travels, address_of
from decant.schemas.manifest.manifest import Source
from decant.schemas.manifest.tokenizer_files import tokenizer_folder
from decant.schemas.records.rows import PADDING, Row, Segment

VERSION = 2
"""Part of every rows_id. Raise it if the same cache would give other rows."""
OPEN_ROWS = 64
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Other(Travels):
    """The cache that is aligned and the tokenizer that it gets: all that a worker has to open."""

    cache: Path
    """The other cache's directory, or the folder that stands for its address."""
    output: Path
    """The aligned cache, with the student's tokenizer."""
    length: int
    """Positions of a row of the aligned cache."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)


_lock = threading.Lock()
_opened: dict[tuple, "Aligner"] = {}


def aligner_for(other: Other) -> "Aligner":
    """This process's aligner; it replaces that of another job."""
    key = (other.cache, other.output, other.length, tuple(sorted(other.special_tokens.items())))
    with _lock:
        if key not in _opened:
            _opened.clear()
            _opened[key] = Aligner(
                open_cache(address_of(other.cache)),
                Tokenizer.from_files(tokenizer_folder(other.output)),
                length=other.length,
                special_tokens=other.special_tokens,
            )
        return _opened[key]


@dataclass(frozen=True, eq=False)
class AlignedRow:
    """A row of the student's tokens. The arrays have one entry a position.

    `source` int64 [S]: the teacher's position that speaks of the next token, as number of the
    other cache's row times its length plus position; −1 for none.
    `spans` int32 [S]: whole teacher tokens that the next token is made of; 0 for a part of one.
    """

    row: Row
    source: np.ndarray
    spans: np.ndarray


class Aligner:
    """Makes the rows of a cache's units, in the tokens of `student`."""

    def __init__(
        self,
        cache: Cache,
        student: Tokenizer,
        *,
        length: int,
        special_tokens: Mapping[str, str],
    ):
        self.cache = cache
        self.student = student
        self.length = length
        self.special_tokens = special_tokens
        self.teacher = tokenizer_of(cache)
        self._units = cache.units()

    @cached_property
    def teacher_spelling(self) -> Spelling:
        """How the other cache's tokens spell."""
        return token_spelling(self.teacher)

    @cached_property
    def student_spelling(self) -> Spelling:
        """How the student's tokens spell."""
        return token_spelling(self.student)

    @cached_property
    def projection(self) -> Projection:
        """From the teacher's vocabulary to the student's."""
        return project_vocabulary(
            self.teacher,
            self.student,
            mapping=self.special_tokens,
            teacher_spelling=self.teacher_spelling,
            student_spelling=self.student_spelling,
        )

    @cached_property
    def first(self) -> np.ndarray:
        """`Projection.first` for every id that the other cache may hold: int32 [V]."""
        return self._of_cache(self.projection.first, fill=-1)

    @cached_property
    def partners(self) -> np.ndarray:
        """The student's id that an id of the other cache is exactly; −1 for none: int32 [V]."""
        exact = self._of_cache(self.projection.exact, fill=False)
        return np.where(exact, self.first, -1)

    def _of_cache(self, array: np.ndarray, *, fill: int | bool) -> np.ndarray:
        size = self.cache.manifest.vocabulary_size
        # A model may have more ids than its tokenizer, or fewer.
        padded = np.full(max(size, len(array)), fill, array.dtype)
        padded[: len(array)] = array
        return padded[:size]

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The files of all parts, each once."""
        return tuple(dict.fromkeys(s for part in self.cache.manifest.parts for s in part.sources))

    def rows(self, unit: int) -> list[AlignedRow]:
        """The rows that unit number `unit` gives, over all parts of the other cache.

        ValueError for text that the student's tokenizer cannot spell; it names the document.
        """
        packer = Packer(self.length, OPEN_ROWS)
        made: list[AlignedSegment] = []
        bases: list[np.ndarray] = []
        starts: list[int] = []
        rows: list[AlignedRow] = []

        def finished(row: Row) -> AlignedRow:
            return _with_positions(row, made, bases, starts)

        for segment, base in self._segments(unit):
            aligned = self._aligned(segment)
            if len(aligned.tokens) < 2:
                continue
            number = len(made)
            made.append(aligned)
            bases.append(base)
            starts.append(segment.start)
            renumbered = Segment(
                aligned.tokens,
                aligned.counted,
                segment.source,
                segment.document,
                start=number << 32,  # so that a packed piece tells where it is from
            )
            rows += [finished(row) for row in packer.add(renumbered)]
        return rows + [finished(row) for row in packer.finish()]

    def _aligned(self, segment: Segment) -> AlignedSegment:
        try:
            return align_segment(
                segment.tokens,
                segment.counted,
                teacher=self.teacher_spelling,
                student=self.student,
                student_spelling=self.student_spelling,
                mapping=self.projection.special,
                begins=segment.start == 0,
            )
        except ValueError as error:
            name = self.sources[segment.source].name
            raise ValueError(f"{name}, document {segment.document}: {error}") from error

    def _segments(self, unit: int) -> Iterator[tuple[Segment, np.ndarray]]:
        """Each segment with its positions, counted as `AlignedRow.source`."""
        numbers = {source: i for i, source in enumerate(self.sources)}
        *_, rows = self._units[unit]
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            batch = self.cache.read(some, signals=())
            for slot, row in enumerate(some.tolist()):
                ids = batch["segment_ids"][slot]
                present = [i for i in np.unique(ids).tolist() if i != PADDING]
                places = self.cache.places(row)
                for segment, (source, document, first) in zip(present, places, strict=True):
                    at = np.flatnonzero(ids == segment)
                    counted = np.concatenate([[False], batch["loss_mask"][slot, at[:-1]]])
                    tokens = batch["tokens"][slot, at]
                    base = row * np.int64(len(ids)) + at
                    yield Segment(tokens, counted, numbers[source], document, first), base


def _with_positions(
    row: Row, made: list[AlignedSegment], bases: list[np.ndarray], starts: list[int]
) -> AlignedRow:
    """The row with its positions' sources, and origins that tell the documents' places."""
    length = len(row.tokens)
    source, spans = np.full(length, -1, np.int64), np.zeros(length, np.int32)
    origins = row.origins.copy()
    for number in range(len(origins)):
        segment, offset = divmod(int(origins[number, 2]), 1 << 32)
        at = np.flatnonzero(row.segment_ids == number + 1)
        piece = slice(offset, offset + len(at))
        own, base = made[segment].source[piece], bases[segment]
        source[at] = np.where(own >= 0, base[np.maximum(own, 0)], -1)
        spans[at] = made[segment].spans[piece]
        origins[number, 2] = starts[segment] + offset
    source[~row.loss_mask] = -1
    return AlignedRow(dataclasses.replace(row, origins=origins), source, spans)
