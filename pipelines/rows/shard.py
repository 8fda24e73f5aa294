"""Tokenises one input shard: documents to rows, rows to files of units, and last a commit."""

import dataclasses
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.config import Corpus
from decant.pipelines.rows.documents import Chat, Document, Refuse, read_documents
from decant.pipelines.rows.heldout_pieces import split_of, stretches
from decant.pipelines.rows.long_text import LongSegment, LongText
from decant.pipelines.rows.marking import Marked, long_segment, mark, segments
from decant.pipelines.rows.packing import Packer
from decant.pipelines.rows.records import Place
from decant.pipelines.rows.rollouts import Rollout
from decant.pipelines.rows.sources import InputShard, SourceFile
from decant.pipelines.rows.unwritten import Unwritten, unwritten
from decant.schemas.disk.array_record import as_json, write_records
from decant.schemas.disk.atomic import write_json
from decant.schemas.disk.layout import ROWS, PartLayout
from decant.schemas.disk.stand_in import Travels, by_address, exists
from decant.schemas.manifest.manifest import SPLITS, Skipped, Split, Unit
from decant.schemas.manifest.tokenizer_files import tokenizer_folder
from decant.schemas.records.rows import Row, Segment, encode_row

_CHARACTERS_A_BATCH = 1 << 20
SAMPLE_ROWS = 4096
"""Number of train rows, those with the smallest keys, that a shard offers to calibration."""
_BEFORE_ALL = Place(-1, 0)
"""Sorts before the place of any document of this part."""


@dataclass(frozen=True)
class TokeniseJob(Travels):
    """Everything that a worker needs to tokenise a shard of a part."""

    part: Path
    """The part's directory, absolute."""
    tokenizer: Path
    """The directory of the tokenizer's files, absolute."""
    sources: tuple[SourceFile, ...]
    corpus: Corpus
    """The settings, as `resolve_defaults` returns them."""
    unit_rows: int
    """U, rows per unit."""
    vocabulary: int
    """Number of ids that the teacher predicts. A document that has a larger id is refused."""
    pieces: bool = False
    """Whether pieces of texts are held out, as `needs_pieces` says, in place of documents."""
    by_prompt: bool = True
    """Whether the prompt of a rollout decides if it is held out, not the whole rollout."""
    older: tuple[SourceFile, ...] = ()
    """Files of the older parts. Documents that occur in them are left out of this part."""

    @property
    def shard_bytes(self) -> int:
        """Bytes of input per shard."""
        assert self.corpus.shard_bytes, "resolve_defaults sets it"
        return self.corpus.shard_bytes

    def template(self, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that renders chats; None if no file holds chats."""
        chats = any(source.kind == "chat" for source in self.sources)
        asked = {"date": self.corpus.chat_date, "variables": self.corpus.chat_variables}
        return tokenizer.chat_template(**asked) if chats else None


DocumentHash = tuple[bytes, tuple[int | None, Place]]
"""First 16 bytes of the content's hash; number of the document's shard and its place. A document of
an older part has no shard, and a place that sorts before all others."""


def document_hashes(shard: InputShard, job: TokeniseJob) -> Iterator[DocumentHash]:
    """The hash of each document of `shard`."""
    for content, place in _hashes(shard, job, job.sources):
        yield content, (shard.number, place)


def older_document_hashes(shard: InputShard, job: TokeniseJob) -> Iterator[DocumentHash]:
    """The hash of each document of a shard of `job.older`.

    After the last one, ValueError if a file changed while it was read.
    """
    for content, _ in _hashes(shard, job, job.older):
        yield content, (None, _BEFORE_ALL)
    for number in {span.source for span in shard.spans}:
        job.older[number].require_unchanged()


def _hashes(
    shard: InputShard, job: TokeniseJob, sources: Sequence[SourceFile]
) -> Iterator[tuple[bytes, Place]]:
    for document in read_documents(
        shard, sources, text_field=job.corpus.text_field, refuse=lambda place, why: None
    ):
        yield document.content_hash[:16], document.place


def tokenise_shard(shard: InputShard, repeated: frozenset[Place], job: TokeniseJob) -> None:
    """Write a shard's units and, last, its commit. Does nothing if the commit exists.

    Documents at the places `repeated` are duplicates and left out. ValueError if a document cannot
    be read and `on_error` is "fail", or if a file changed while it was read.
    """
    commit = shard_commit(job, shard.number)
    with by_address(job.part):  # here: who hears the error may be on another machine
        if not exists(commit):
            _tokenise_shard(shard, repeated, job, commit)


def _tokenise_shard(
    shard: InputShard, repeated: frozenset[Place], job: TokeniseJob, commit: Path
) -> None:
    skipped: list[Skipped] = []

    def refuse(place: Place, problem: str) -> None:
        source = job.sources[place.source]
        # A field's name may hold half of a surrogate pair, which no file and no terminal takes.
        problem = problem.encode(errors="backslashreplace").decode()
        if job.corpus.on_error == "fail":
            raise ValueError(
                f'{source.path}: {problem}. Repair it, or set corpus.on_error = "skip".'
            )
        skipped.append(Skipped(source.name, problem))

    documents = read_documents(shard, job.sources, text_field=job.corpus.text_field, refuse=refuse)
    kept = (document for document in documents if document.place not in repeated)
    writers = {split: UnitWriter(job, shard.number, split) for split in SPLITS}
    packers = {split: Packer(job.corpus.sequence_length, job.corpus.open_rows) for split in writers}
    lost: dict[str, Unwritten] = {}
    written_by: Counter[str] = Counter()
    for split, segment in _segments(kept, job, refuse=refuse, lost=lost, written_by=written_by):
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
            "units": [as_json(unit) for unit in units],
            "sample": [(key.hex(), *place) for key, place in sorted(writers["train"].sample)],
            "skipped": [dataclasses.asdict(item) for item in skipped],
            "duplicates": len(repeated),
            "unwritten": {name: [item.count, item.first] for name, item in lost.items()},
            "writers": dict(sorted(written_by.items())),
        },
        kind="shard",
        first=True,
    )


def _segments(
    documents: Iterable[Document],
    job: TokeniseJob,
    *,
    refuse: Refuse,
    lost: dict[str, Unwritten],
    written_by: Counter[str],
) -> Iterator[tuple[Split, Segment | LongSegment]]:
    tokenizer = Tokenizer.from_files(tokenizer_folder(job.tokenizer.parent))

    def refuse_document(document: Document, problem: str) -> None:
        refuse(document.place, document.located(problem))

    def tokenised(batch: Sequence[Marked]) -> Iterator[tuple[Marked, Segment | LongSegment]]:
        try:
            is_long = len(batch) == 1 and batch[0].is_long
            made = [long_segment(batch[0], tokenizer)] if is_long else segments(batch, tokenizer)
        except ValueError as error:
            if len(batch) == 1:
                refuse_document(batch[0].document, str(error))
                return
            for marked in batch:  # to find the document
                yield from tokenised([marked])
            return
        for marked, segment in zip(batch, made, strict=True):
            if problem := _unpredictable(segment, tokenizer, vocabulary=job.vocabulary):
                refuse_document(marked.document, problem)
            else:
                yield marked, segment

    for batch in _batches(_mark_all(documents, job, tokenizer, refuse=refuse, lost=lost)):
        for marked, segment in tokenised(batch):
            document, share = marked.document, job.corpus.heldout or 0.0
            content = document.content
            digest = document.split_hash if job.by_prompt else document.content_hash
            if isinstance(content, Rollout):
                written_by[content.writer] += 1
            if job.pieces and isinstance(content, str | LongText):
                length = job.corpus.sequence_length
                yield from stretches(segment, digest, share, length=length)
            else:
                yield split_of(digest, share), segment


def _unpredictable(
    segment: Segment | LongSegment, tokenizer: Tokenizer, *, vocabulary: int
) -> str | None:
    """The problem, if the segment has an id that the teacher does not know."""
    largest = int(segment.tokens.max(initial=0))
    if largest < vocabulary:
        return None
    return (
        f"holds {tokenizer.decode([largest])!r}, token {largest}, but the teacher has embeddings "
        f"for ids below {vocabulary} only"
    )


def _mark_all(
    documents: Iterable[Document],
    job: TokeniseJob,
    tokenizer: Tokenizer,
    *,
    refuse: Refuse,
    lost: dict[str, Unwritten],
) -> Iterator[Marked]:
    template = job.template(tokenizer)
    for document in documents:
        try:
            marked = mark(document, tokenizer, template)
        except (ValueError, RecursionError) as error:
            refuse(document.place, document.located(str(error)))
            continue
        if template and isinstance(document.content, Chat):
            source = job.sources[document.place.source].name
            for name in unwritten(document.content, template, str(marked.text)):
                place = f"the first is in {source}: {document.located('')}".rstrip(": ")
                lost.setdefault(name, Unwritten(first=place)).count += 1
        yield marked


def _batches(documents: Iterable[Marked]) -> Iterator[list[Marked]]:
    """Lists of about `_CHARACTERS_A_BATCH`, so that the tokenizer's memory is bounded; a long
    document is alone in its list."""
    batch, characters = [], 0
    for marked in documents:
        text = marked.text
        if marked.is_long or isinstance(text, LongText):
            if batch:
                yield batch
            yield [marked]
            batch, characters = [], 0
            continue
        batch.append(marked)
        characters += len(text)
        if characters >= _CHARACTERS_A_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class UnitWriter:
    """Collects the rows of one split of a shard, and writes a unit whenever it has U of them."""

    def __init__(self, job: TokeniseJob, shard: int, split: Split):
        self._job, self._shard = job, shard
        self._split: Split = split
        self._pending: list[Row] = []
        self.units: list[Unit] = []
        self.sample: list[tuple[bytes, tuple[int, int]]] = []
        """(row key, (number of the unit in this writer, offset)) of rows with the smallest keys."""

    def add(self, row: Row) -> None:
        """Add a row; may write a unit."""
        self._pending.append(row)
        if len(self._pending) == self._job.unit_rows:
            self._flush()

    def finish(self) -> None:
        """Write the rows that are left as the last, shorter unit."""
        if self._pending:
            self._flush()

    def _flush(self) -> None:
        number = len(self.units)
        path = staged_unit(self._job, self._shard, self._split, number)
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
        self.sample = heapq.nsmallest(SAMPLE_ROWS, self.sample + keys)
        self._pending = []


def shard_commit(job: TokeniseJob, shard: int) -> Path:
    """Path of a shard's commit, which exists once the shard is finished."""
    return PartLayout(job.part).work / f"shard-{shard:05d}.json"


def staged_unit(job: TokeniseJob, shard: int, split: Split, unit: int) -> Path:
    """Path of a shard's unit of rows before it gets its final name."""
    return PartLayout(job.part).work / f"shard-{shard:05d}" / f"{split}-{unit:05d}.array_record"
