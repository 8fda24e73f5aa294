"""Corpus to rows, on Beam: duplicates dropped, held-out documents apart, one commit a shard."""

import dataclasses
import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.config import Corpus
from decant.pipelines.rows.documents import Document, Refuse, read_documents
from decant.pipelines.rows.marking import Marked, mark, marking_rules, segments
from decant.pipelines.rows.packing import VERSION as PACKING_VERSION
from decant.pipelines.rows.packing import Packer
from decant.pipelines.rows.records import Place, located
from decant.pipelines.rows.sources import Shard, SourceFile, cut_shards
from decant.pipelines.runners.run_pipeline import Build
from decant.schemas.disk import steps
from decant.schemas.disk.array_record import write_records
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.layout import ROWS, PartLayout
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.manifest import SPLITS, Skipped, Source, Split, Unit, unit_from_json
from decant.schemas.manifest.plan import PlannedRows, planned_rows_from_json
from decant.schemas.records.rows import Row, Segment, encode_row

_CHARACTERS_A_BATCH = 1 << 20
_BYTES_A_PROCESS = 32 << 20  # a process takes seconds to start, and the tokenizer as long for this
_OLDER = -1
"""Number of every shard and source of older parts: they are not of this part."""
_SAMPLE_ROWS = 4096  # train rows with the smallest keys that a shard offers to calibration


@dataclass(frozen=True)
class TokeniseJob:
    """Everything a tokenise worker needs. `corpus` is settled."""

    part: Path
    tokenizer: Path
    sources: tuple[SourceFile, ...]
    corpus: Corpus
    unit_rows: int
    older: tuple[SourceFile, ...] = ()
    """Files of older parts: a document that one of them holds too is left out."""


def row_rules(
    corpus: Corpus, sources: Sequence[SourceFile], *, template: ChatTemplate | None = None
) -> dict[str, Any]:
    """What decides rows besides the text and the tokenizer; goes into rows_id."""
    return marking_rules({source.kind for source in sources}, template) | {
        "version": PACKING_VERSION,
        "sequence_length": corpus.sequence_length,
        "bos": "as the tokenizer",
        "eos": "after every document",
        "deduplicate": "exact",
        "heldout": corpus.heldout,
        "open_rows": corpus.open_rows,
        "shard_bytes": corpus.shard_bytes,
        "text_field": corpus.text_field,
        "on_error": corpus.on_error,
    }


def choose_unit_rows(sources: Sequence[SourceFile], *, length: int) -> int:
    """U: a power of two, about 4M tokens, at most 4,096 rows, small enough for 16 units."""
    rows = sum(source.bytes for source in sources) / 4 / length  # about four bytes a token
    limit = max(1, min(4096, (4 << 20) // length, int(rows / 16)))
    return 1 << (limit.bit_length() - 1)


def tokenise_workers(asked: int | None, sources: Sequence[SourceFile]) -> int:
    """Processes that tokenise: what was asked for, or one a core with enough for each to do.

    ValueError if fewer than one was asked for.
    """
    if asked is None:
        size = sum(source.bytes for source in sources)
        return max(1, min(_cores(), size // _BYTES_A_PROCESS))
    if asked < 1:
        raise ValueError(f"tokenise_workers is {asked}; expected 1 or more, or leave it out")
    return asked


def _cores() -> int:
    """Cores that this process may use: in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenise(job: TokeniseJob, *, rows_id: str, run: Callable[[Build], None]) -> PlannedRows:
    """All rows of the part on disk under their final names, and the list of their units.

    Does only the shards that no earlier run finished. `run` runs the Beam pipeline that it is
    given a builder of. ValueError when the corpus has nothing to predict.
    """
    layout = PartLayout(job.part)
    done = layout.work / "rows.json"
    if done.exists():
        return planned_rows_from_json(read_json(done))
    assert job.corpus.shard_bytes, "settled"
    shards = cut_shards(job.sources, shard_bytes=job.corpus.shard_bytes)
    if not all(_shard_commit(job, shard.number).exists() for shard in shards):
        run(lambda pipeline: _build(pipeline, job, shards))
    rows = _gather(job, shards, rows_id=rows_id)
    steps.reached(Step.ROWS_GATHERED)
    write_json(done, dataclasses.asdict(rows))
    return rows


def tokenise_some(job: TokeniseJob, shards: Sequence[Shard]) -> PlannedRows:
    """Rows of these shards alone, as if they were all there is, in this process."""
    seen: set[bytes] = set()
    drops: dict[int, set[Place]] = {shard.number: set() for shard in shards}
    for shard in shards:
        for content, (number, place) in _hashes(shard, job):
            if content in seen:
                drops[number].add(place)
            seen.add(content)
    for shard in shards:
        tokenise_shard(shard, job, drop=frozenset(drops[shard.number]))
    return _gather(job, list(shards), rows_id="")


def _build(pipeline: beam.Pipeline, job: TokeniseJob, shards: list[Shard]) -> None:
    """Only hashes, places and shard descriptions travel; text is read again where it is used."""
    cut = pipeline | "Shards" >> beam.Create(shards) | "Spread" >> beam.Reshuffle()
    hashes = cut | "Hash documents" >> beam.FlatMap(_hashes, job)
    if job.older:
        # Read again rather than remembered: caches keep no hashes of documents.
        older = pipeline | "Older shards" >> beam.Create(older_shards(job)) | beam.Reshuffle()
        kept = older | "Hash older documents" >> beam.FlatMap(_older_hashes, job)
        hashes = (hashes, kept) | "Of all parts" >> beam.Flatten()
    drops = (
        hashes
        | "Same content" >> beam.GroupByKey()
        | "All but the first" >> beam.FlatMap(_all_but_first)
    )
    keyed = cut | "By number" >> beam.Map(lambda shard: (shard.number, shard))
    _ = (
        {"shard": keyed, "drop": drops}
        | "With their duplicates" >> beam.CoGroupByKey()
        | "Tokenise" >> beam.Map(_tokenise_grouped, job)
    )


def _hashes(shard: Shard, job: TokeniseJob) -> Iterator[tuple[bytes, tuple[int, Place]]]:
    documents = read_documents(
        shard, job.sources, text_field=job.corpus.text_field, refuse=lambda place, why: None
    )
    for document in documents:
        yield document.content_hash[:16], (shard.number, document.place)


def older_shards(job: TokeniseJob) -> list[Shard]:
    """The files of older parts, cut for reading."""
    assert job.corpus.shard_bytes, "settled"
    return cut_shards(job.older, shard_bytes=job.corpus.shard_bytes)


def _older_hashes(shard: Shard, job: TokeniseJob) -> Iterator[tuple[bytes, tuple[int, Place]]]:
    for content, _ in _hashes(shard, dataclasses.replace(job, sources=job.older)):
        yield content, (_OLDER, Place(_OLDER, 0))
    for number in {span.source for span in shard.spans}:
        job.older[number].require_unchanged()


def _all_but_first(
    group: tuple[bytes, Iterable[tuple[int, Place]]],
) -> Iterator[tuple[int, Place]]:
    _, places = group
    # Older parts' come first, as their number is the lowest.
    ordered = sorted(places, key=lambda item: (item[1].source, item[1].offset))
    yield from (item for item in ordered[1:] if item[0] != _OLDER)


def _tokenise_grouped(group: tuple[int, dict[str, Iterable]], job: TokeniseJob) -> None:
    _, found = group
    (shard,) = found["shard"]
    tokenise_shard(shard, job, drop=frozenset(found["drop"]))


def tokenise_shard(shard: Shard, job: TokeniseJob, *, drop: frozenset[Place]) -> None:
    """Write a shard's units and, last, its commit. Does nothing if the commit is there."""
    commit = _shard_commit(job, shard.number)
    if commit.exists():
        return
    skipped: list[Skipped] = []

    def refuse(place: Place, problem: str) -> None:
        source = job.sources[place.source]
        if job.corpus.on_error == "fail":
            raise ValueError(
                f'{source.path}: {problem}. Repair it, or set corpus.on_error = "skip".'
            )
        skipped.append(Skipped(source.name, problem))

    documents = read_documents(shard, job.sources, text_field=job.corpus.text_field, refuse=refuse)
    kept = (document for document in documents if document.place not in drop)
    writers = {split: UnitWriter(job, shard.number, split) for split in SPLITS}
    packers = {split: Packer(job.corpus.sequence_length, job.corpus.open_rows) for split in writers}
    for split, segment in _segments(kept, job, refuse=refuse):
        for row in packers[split].add(segment):
            writers[split].add(row)
    for split, writer in writers.items():
        for row in packers[split].finish():
            writer.add(row)
        writer.finish()
    units = [unit for writer in writers.values() for unit in writer.units]
    for number in {span.source for span in shard.spans}:
        job.sources[number].require_unchanged()
    write_json(
        commit,
        {
            "units": [dataclasses.asdict(unit) for unit in units],
            "sample": [(key.hex(), *place) for key, place in sorted(writers["train"].sample)],
            "skipped": [dataclasses.asdict(item) for item in skipped],
            "duplicates": len(drop),
        },
        kind="shard",
    )


def _segments(
    documents: Iterable[Document], job: TokeniseJob, *, refuse: Refuse
) -> Iterator[tuple[Split, Segment]]:
    tokenizer = Tokenizer.from_files(job.tokenizer)
    for batch in _batches(_marked(documents, job, tokenizer, refuse=refuse)):
        for marked, segment in zip(batch, segments(batch, tokenizer), strict=True):
            yield _split(marked.document.content_hash, job.corpus.heldout or 0.0), segment


def _marked(
    documents: Iterable[Document], job: TokeniseJob, tokenizer: Tokenizer, *, refuse: Refuse
) -> Iterator[Marked]:
    chats = any(source.kind == "chat" for source in job.sources)
    template = tokenizer.chat_template(date=job.corpus.chat_date) if chats else None
    for document in documents:
        try:
            yield mark(document, tokenizer, template)
        except ValueError as error:
            place = document.place
            refuse(place, located(str(error), place, job.sources[place.source]))


def _split(content_hash: bytes, heldout: float) -> Split:
    return "heldout" if int.from_bytes(content_hash[:8]) < heldout * 2**64 else "train"


def _batches(documents: Iterable[Marked]) -> Iterator[list[Marked]]:
    batch, characters = [], 0
    for marked in documents:
        batch.append(marked)
        characters += len(marked.text)
        if characters >= _CHARACTERS_A_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class UnitWriter:
    """Gathers rows of one split into units of U and writes each as it fills."""

    def __init__(self, job: TokeniseJob, shard: int, split: Split):
        self._job, self._shard = job, shard
        self._split: Split = split
        self._pending: list[Row] = []
        self.units: list[Unit] = []
        self.sample: list[tuple[bytes, tuple[int, int]]] = []
        """(row key, (unit of this writer, offset)) of the rows with the smallest keys."""

    def add(self, row: Row) -> None:
        """Take a row."""
        self._pending.append(row)
        if len(self._pending) == self._job.unit_rows:
            self._flush()

    def finish(self) -> None:
        """Write the last, short unit."""
        if self._pending:
            self._flush()

    def _flush(self) -> None:
        number = len(self.units)
        path = _staged(self._job, self._shard, self._split, number)
        entry = write_records(path, [encode_row(row) for row in self._pending], kind="rows")
        self.units.append(
            Unit(
                self._split,
                rows=len(self._pending),
                tokens=int(sum((row.segment_ids > 0).sum() for row in self._pending)),
                scored=int(sum(row.loss_mask.sum() for row in self._pending)),
                files={ROWS: entry},
            )
        )
        keys = [(row.key, (number, offset)) for offset, row in enumerate(self._pending)]
        self.sample = heapq.nsmallest(_SAMPLE_ROWS, self.sample + keys)
        self._pending = []


def _shard_commit(job: TokeniseJob, shard: int) -> Path:
    return PartLayout(job.part).work / f"shard-{shard:05d}.json"


def _staged(job: TokeniseJob, shard: int, split: Split, unit: int) -> Path:
    return PartLayout(job.part).work / f"shard-{shard:05d}" / f"{split}-{unit:05d}.array_record"


def _gather(job: TokeniseJob, shards: list[Shard], *, rows_id: str) -> PlannedRows:
    """Give units their numbers and files their final names; each step can be repeated."""
    layout = PartLayout(job.part)
    units: list[Unit] = []
    skipped: list[Skipped] = []
    sample: list[tuple[str, int, int]] = []
    duplicates = 0
    for shard in shards:
        commit = read_json(_shard_commit(job, shard.number))
        first, counts = len(units), dict.fromkeys(SPLITS, 0)
        for unit in map(unit_from_json, commit["units"]):
            staged = _staged(job, shard.number, unit.split, counts[unit.split])
            counts[unit.split] += 1
            final = layout.records(ROWS, len(units))
            if staged.exists():
                final.parent.mkdir(parents=True, exist_ok=True)
                staged.replace(final)
            units.append(unit)
        # A shard's train units come first, so the writer's numbers only need the offset.
        sample += [(key, first + unit, offset) for key, unit, offset in commit["sample"]]
        skipped += [Skipped(**item) for item in commit["skipped"]]
        duplicates += commit["duplicates"]
    if not any(unit.scored for unit in units):
        raise ValueError(
            f"the corpus of {len(job.sources)} files gave no row: no document has a token to "
            "predict"
        )
    return PlannedRows(
        rows_id=rows_id,
        unit_rows=job.unit_rows,
        units=tuple(units),
        sources=tuple(Source(source.name, source.sha256) for source in job.sources),
        skipped=tuple(skipped),
        duplicates=duplicates,
        sample=tuple((unit, offset) for _, unit, offset in sorted(sample)[:_SAMPLE_ROWS]),
    )
