"""Documents out of one shard's files, each with its place; what cannot be read is named."""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipelines.sources import Shard, SourceFile, Span


@dataclass(frozen=True)
class Place:
    """Where a document begins: the source's number and the byte offset in its text."""

    source: int
    offset: int


@dataclass(frozen=True)
class Document:
    """A text and its place."""

    place: Place
    text: str

    @property
    def content_hash(self) -> bytes:
        """sha256 of the text: finds duplicates and chooses the held-out documents."""
        return hashlib.sha256(self.text.encode()).digest()


Refuse = Callable[[Place, str], None]
"""Called with the place of a document that cannot be read and what is wrong; may raise."""


def read_documents(
    shard: Shard, sources: Sequence[SourceFile], *, text_field: str, refuse: Refuse
) -> Iterator[Document]:
    """Non-empty documents of `shard`, in order. The same inputs give the same documents."""
    for span in shard.spans:
        source = sources[span.source]
        if source.is_jsonl:
            documents = _json_lines(span, source, text_field=text_field, refuse=refuse)
        else:
            documents = _whole_file(span, source, refuse=refuse)
        yield from (document for document in documents if document.text)


def _open(source: SourceFile) -> BinaryIO:
    path = Path(source.path)
    size = path.stat().st_size if path.is_file() else -1
    if size != source.bytes:
        raise ValueError(
            f"{path}: had {source.bytes} bytes when this run began, now "
            f"{'it is missing' if size < 0 else f'{size}'}; a corpus must not change during a run"
        )
    return gzip.open(path) if source.path.endswith(".gz") else path.open("rb")  # type: ignore


def _whole_file(span: Span, source: SourceFile, *, refuse: Refuse) -> Iterator[Document]:
    place = Place(span.source, 0)
    with _open(source) as file:
        data = file.read()
    try:
        yield Document(place, data.decode())
    except UnicodeDecodeError as error:
        refuse(place, f"not UTF-8 at byte {error.start}")


def _json_lines(
    span: Span, source: SourceFile, *, text_field: str, refuse: Refuse
) -> Iterator[Document]:
    with _open(source) as file:
        if span.start:
            # A line that began before the span belongs to the shard before.
            file.seek(span.start - 1)
            file.readline()
        compressed = source.path.endswith(".gz")
        while compressed or file.tell() < span.end:
            place = Place(span.source, file.tell())
            line = file.readline()
            if not line:
                break
            if line.strip():
                problem, text = _text_of(line, text_field)
                if problem:
                    number = _line_number(source, place.offset)
                    refuse(place, f"line {number}: {problem}")
                else:
                    yield Document(place, text)


def _text_of(line: bytes, text_field: str) -> tuple[str, str]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start} of the line", ""
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at character {error.pos}", ""
    if not isinstance(record, dict) or text_field not in record:
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        return f"no field {text_field!r} (has: {fields}); set corpus.text_field", ""
    if not isinstance(record[text_field], str):
        return f"field {text_field!r} is {type(record[text_field]).__name__}, not a string", ""
    return "", record[text_field]


def _line_number(source: SourceFile, offset: int) -> int:
    with _open(source) as file:
        return file.read(offset).count(b"\n") + 1
