"""Reads the records of a corpus file, each with its place: text, JSON, Parquet and CSV tables."""

import codecs
import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

from decant.pipelines.rows.json_values import json_values
from decant.pipelines.rows.long_line import BLOCK, LongLine
from decant.pipelines.rows.long_text import LongText
from decant.pipelines.rows.remote_file import BUFFER
from decant.pipelines.rows.remote_files import open_ranges, open_sequential
from decant.pipelines.rows.sources import SourceFile, Span
from decant.pipelines.rows.zstd_file import ZstdFile

Located = Callable[[str], str]
"""Puts a record's line or number in front of a problem with it."""

_BOM = codecs.BOM_UTF8
_OTHER_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DAMAGE_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
_RECORDS_A_BATCH = 256
_DAMAGED = "damaged or cut short, cannot be decompressed: "
_BLOCK = 1 << 20
LONG = 16 << 20
"""Bytes above which a document is not held in memory."""
_LONGEST_CELL = 1 << 30
_MOST_COUNTED = 1 << 30
"""Bytes before a span that are read to tell the number of a bad line."""


@dataclass(frozen=True)
class Place:
    """Where a document begins."""

    source: int
    """Number of the source file."""
    offset: int
    """Byte offset in the decompressed text; in a table or array the number of records before it."""


@dataclass(frozen=True)
class Record:
    """One record of a file, or the problem with it."""

    place: Place
    value: Any = None
    """A text file's text (if it is long, a `LongText`), a JSON value, or a table's record as a
    dictionary."""
    problem: str = ""
    """Why the record cannot be read, with its place in the file; empty if it can."""
    located: Located = str


Fields = Callable[[Collection[str]], Sequence[str]]
"""Given a table's column names, returns the ones to read. Raises ValueError if none is usable."""


def read_records(span: Span, source: SourceFile, *, fields: Fields) -> Iterator[Record]:
    """Records that begin in `span`, in order. An unreadable one is a record with a problem.

    If the rest of the file cannot be read, the last record says so.
    """
    if source.format == "parquet":
        return _table(span, source, fields=fields)
    if source.format == "csv":
        return _csv(span, source, fields=fields)
    read = {"jsonl": _json_lines, "json": _json}.get(source.format, _whole_file)
    return read(span, source)


def _unchanged(source: SourceFile) -> Path:
    """The path of a file of this machine, which has the size that it had."""
    path = Path(source.path)
    size = path.stat().st_size if path.is_file() else -1
    if size != source.bytes:
        raise ValueError(
            f"{path}: had {source.bytes} bytes when this run began, now "
            f"{'it is missing' if size < 0 else f'{size}'}; a corpus must not change during a run"
        )
    return path


def _open(source: SourceFile, *, until: int | None = None) -> io.BufferedIOBase:
    """The file's decompressed bytes. `until` is the end of those that are wanted, if known."""
    remote = source.remote and open_sequential(source.remote, until=until)
    if source.compression == ".gz":
        return gzip.GzipFile(fileobj=remote) if remote else gzip.GzipFile(_unchanged(source))
    file = remote or _unchanged(source).open("rb")
    return io.BufferedReader(ZstdFile(file)) if source.compression else file


def _whole_file(span: Span, source: SourceFile) -> Iterator[Record]:
    place = Place(span.source, 0)
    try:
        with _open(source) as file:
            data = file.read(LONG + 1)
        if len(data) > LONG:
            yield Record(place, LongText(partial(_chunks, source)))
        else:
            yield Record(place, data.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        yield Record(place, problem=_not_utf8(data, error))
    except _DAMAGE_ERRORS as error:
        yield Record(place, problem=f"{_DAMAGED}{error}")


def _chunks(source: SourceFile) -> Iterator[str]:
    """The text of a file. ValueError with the problem if it cannot be read."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at, block, is_first = 0, b"", True
    try:
        with _open(source) as file:
            while block := file.read(_BLOCK):
                text = decoder.decode(block)
                yield text.removeprefix("\ufeff") if is_first else text
                at, is_first = at + len(block), is_first and not text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        before = at - len(decoder.getstate()[0])
        raise ValueError(_not_utf8(block, error, at=before)) from error
    except _DAMAGE_ERRORS as error:
        raise ValueError(f"{_DAMAGED}{error}") from error


def _not_utf8(data: bytes, error: UnicodeDecodeError, *, at: int = 0) -> str:
    """`data` begins at byte `at` of the file."""
    if not at and data.startswith(_OTHER_BOMS):
        return "UTF-16 or UTF-32, not UTF-8; convert the file"
    return f"not UTF-8 at byte {at + error.start}"


class _LineNumbers:
    """The number of a span's lines in the whole file, which is read at the first bad line only."""

    def __init__(self, span: Span, source: SourceFile):
        self._span, self._source = span, source

    def located(self, problem: str, *, line: int, offset: int) -> str:
        """`problem` of the line that is number `line` of the span, from 0, and begins at `offset`
        of the file."""
        if self._span.start > _MOST_COUNTED:
            return f"line at byte {offset}: {problem}"
        return f"line {self._before + line + 1}: {problem}"

    @cached_property
    def _before(self) -> int:
        """Lines that begin before the span."""
        left, lines = self._span.start, 0
        if not left:
            return 0
        with _open(self._source) as file:
            last = b"\n"
            while block := file.read(min(left, _BLOCK)):
                left -= len(block)
                lines += block.count(b"\n")
                last = block[-1:]
        return lines + (last != b"\n")


def _json_lines(span: Span, source: SourceFile) -> Iterator[Record]:
    numbers = _LineNumbers(span, source)
    with _open(source, until=None if source.compression else span.end) as file:
        offset = span.start
        if offset:
            # A line that begins before the span belongs to the shard before this one.
            file.seek(offset - 1)
            offset += _rest_of_line(file) - 1
        for number in itertools.count():
            if offset >= span.end and not source.compression:
                return
            place = Place(span.source, offset)
            located = partial(numbers.located, line=number, offset=offset)
            try:
                line = file.readline(LONG)
                long = _long_line(line, file) if _is_cut(line) else None
            except _DAMAGE_ERRORS as error:
                why = f"damaged or cut short after {offset} bytes of text, the rest is lost: "
                yield Record(place, problem=f"{why}{error}")
                return
            if not line:
                return
            if not offset and line.startswith(_OTHER_BOMS):
                yield Record(place, problem="UTF-16 or UTF-32, not UTF-8; convert the file")
                return
            offset += len(line) if long is None else len(long)
            if not place.offset:
                line = line.removeprefix(_BOM)
            if long or line.strip():
                value, problem = _parsed(line, long)
                yield Record(place, value, problem and located(problem), located)


def _rest_of_line(file: io.BufferedIOBase) -> int:
    """Read on to the next line; returns the number of bytes."""
    size = 0
    while block := file.readline(BLOCK):
        size += len(block)
        if block.endswith(b"\n"):
            break
    return size


def _is_cut(line: bytes) -> bool:
    """Whether `readline` stopped because of its limit."""
    return len(line) >= LONG and not line.endswith(b"\n")


def _long_line(beginning: bytes, file: io.BufferedIOBase) -> LongLine:
    def blocks() -> Iterator[bytes]:
        block = beginning
        while block:
            yield block
            block = b"" if block.endswith(b"\n") else file.readline(BLOCK)

    return LongLine(blocks())


def _parsed(line: bytes, long: LongLine | None) -> tuple[Any, str]:
    try:
        return (json.loads(line.decode()) if long is None else long.value()), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error.msg} at character {error.pos}"
    except ValueError as error:
        digits = f"an integer of more than {sys.get_int_max_str_digits():,} digits"
        # The library's own message speaks of Python.
        return None, digits if "integer string" in str(error) else str(error)
    except RecursionError:
        return None, "nested too deeply"


def _json(span: Span, source: SourceFile) -> Iterator[Record]:
    values, number = json_values(_chunks(source)), 0
    while True:
        place = Place(span.source, number)
        located = partial("record {}: {}".format, number + 1)
        try:
            value = next(values)
        except StopIteration:
            return
        except ValueError as error:
            yield Record(place, problem=located(f"{error}; the rest of the file is lost"))
            return
        yield Record(place, value, located=located)
        number += 1


def _csv(span: Span, source: SourceFile, *, fields: Fields) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_CELL)
    place, located = Place(span.source, 0), str
    try:
        reader = csv.reader(_lines(_chunks(source)), strict=True)
        header = next(reader, [])
        wanted = [(header.index(name), name) for name in fields(header)] if header else []
        number = 0
        for row in reader:
            if not row:  # an empty line
                continue
            place = Place(span.source, number)
            located = partial("record {}: {}".format, number + 1)
            if len(row) == len(header):
                yield Record(place, {name: row[at] for at, name in wanted}, located=located)
            else:
                why = f"{len(row)} cells, but the header has {len(header)}"
                yield Record(place, problem=located(why))
            number += 1
    except (csv.Error, ValueError) as error:
        yield Record(place, problem=located(f"{error}; the rest of the file is lost"))


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    begun: list[str] = []  # joined once, because a line may be as long as many chunks
    length = 0
    for chunk in chunks:
        *lines, rest = chunk.split("\n")
        for line in lines:
            yield "".join([*begun, line, "\n"])
            begun, length = [], 0
        begun.append(rest)
        length += len(rest)
        if length > _LONGEST_CELL:
            raise ValueError(f"a line of more than {_LONGEST_CELL:,} characters")
    if length:
        yield "".join(begun)


def _table(span: Span, source: SourceFile, *, fields: Fields) -> Iterator[Record]:
    file = open_ranges(source.remote) if source.remote else _unchanged(source)
    # Of a file at an address, the columns are read on bit by bit, not a row group's at once.
    remote = source.remote is not None
    try:
        table = pyarrow.parquet.ParquetFile(
            file,
            page_checksum_verification=True,
            buffer_size=BUFFER if remote else 0,
            pre_buffer=not remote,
        )
        columns = list(fields(table.schema_arrow.names))
    except (pyarrow.ArrowException, OSError) as error:
        if not span.start:  # if the file is cut, only its first span reports the damage
            why = "damaged, cut short or no Parquet file: "
            yield Record(Place(span.source, 0), problem=f"{why}{_first_line(error)}")
        return
    except ValueError as error:
        if not span.start:
            yield Record(Place(span.source, 0), problem=str(error))
        return
    with table:
        at = 0
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            if span.start <= _first_byte(group) < span.end:
                yield from _row_group(table, number, columns, Place(span.source, at))
            at += group.num_rows


def _first_byte(group: pyarrow.parquet.RowGroupMetaData) -> int:
    first = group.column(0)
    return min(first.data_page_offset, first.dictionary_page_offset or first.data_page_offset)


def _row_group(
    table: pyarrow.parquet.ParquetFile, number: int, columns: list[str], first: Place
) -> Iterator[Record]:
    at = first.offset
    try:
        for batch in table.iter_batches(
            _RECORDS_A_BATCH, row_groups=[number], columns=columns, use_threads=False
        ):
            for one in range(batch.num_rows):
                yield _record(batch.slice(one, 1), Place(first.source, at))
                at += 1
    except (pyarrow.ArrowException, OSError) as error:
        why = f"record {at + 1}: damaged, the rest of its row group is lost: "
        yield Record(Place(first.source, at), problem=f"{why}{_first_line(error)}")


def _record(row: pyarrow.RecordBatch, place: Place) -> Record:
    located = partial("record {}: {}".format, place.offset + 1)
    try:
        return Record(place, row.to_pylist()[0], located=located)
    except UnicodeDecodeError as error:
        return Record(place, problem=located(f"not UTF-8 at byte {error.start} of the field"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
