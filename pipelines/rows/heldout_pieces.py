"""Holds out pieces of texts where whole documents cannot be: in a corpus of too few documents.

A document's content hash decides whether it is held out. Of one book, none or all would be.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from decant.pipelines.config import Corpus
from decant.pipelines.rows.documents import read_documents
from decant.pipelines.rows.long_text import LongSegment
from decant.pipelines.rows.sources import InputShard, SourceFile, Span
from decant.schemas.manifest.manifest import Split
from decant.schemas.records.rows import Segment

VERSION = 1
"""Part of the rows_id of corpora of which pieces are held out. Raise it if their rows change."""
_MANY = 10
"""Held-out documents to expect of a corpus that has enough of them: none in 1 of 20,000."""
_MOST_READ = 10_000
"""Documents that the driver reads at most; a corpus of more has enough."""
_LEAST = 64
"""Transitions of the shortest piece. A shorter text is held out as a whole."""


def split_of(split_hash: bytes, heldout: float) -> Split:
    """The split of a whole document."""
    return "heldout" if int.from_bytes(split_hash[:8]) < heldout * 2**64 else "train"


def needs_pieces(sources: Sequence[SourceFile], corpus: Corpus) -> bool:
    """Whether pieces of texts are held out in place of documents. `corpus` is decided.

    They are if whole documents would leave less than a tenth of the share asked for held out, or
    more held out than to train on, counted in bytes. A corpus of chats has no pieces: a piece
    would begin in the middle of a talk.
    """
    share = corpus.heldout or 0.0
    if not share or all(source.kind != "text" for source in sources):
        return False
    most = min(math.ceil(_MANY / share), _MOST_READ)
    documents = list(itertools.islice(_documents(sources, corpus.text_field), most + 1))
    total = sum(size for _, size in documents)
    held = sum(size for digest, size in documents if split_of(digest, share) == "heldout")
    if len(documents) > most:
        # Enough of them, unless one file that is held out outweighs all others.
        total = sum(source.bytes for source in sources)
        held = max((s.bytes for s in sources if _is_held_out_whole(s, share)), default=0)
        return share <= 0.5 and held > total / 2
    return held < share * total / 10 or (share <= 0.5 and held > total / 2)


def stretches(
    document: Segment | LongSegment, content_hash: bytes, share: float, *, length: int
) -> Iterator[tuple[Split, Segment]]:
    """The document cut into stretches that are trained on and held out in turn.

    Each repeats the last token of the stretch before, so that every transition is scored once, in
    one split. A piece is a row of `length` tokens, or in a document of fewer than 1 / `share` rows
    the share itself. Every 1 / `share`-th piece is held out; the content decides which is first.
    """
    transitions = len(document.tokens) - 1
    size = max(1, min(max(int(share * transitions), _LEAST), length - 1, transitions))
    count = -(-transitions // size)
    begin = Fraction(int.from_bytes(content_hash[8:16]), 2**64)
    passed = (math.floor(piece * Fraction(share) + begin) for piece in range(count + 1))
    # One after the other: a long text has millions of pieces.
    splits: Iterator[Split] = (
        "heldout" if after > before else "train" for before, after in itertools.pairwise(passed)
    )
    start = 0
    for split, run in itertools.groupby(splits):
        end = start + size * len(list(run))
        part = slice(start, min(end, transitions) + 1)
        yield (
            split,
            Segment(
                document.tokens[part],
                document.counted[part],
                document.source,
                document.document,
                document.start + start,
            ),
        )
        start = end


def _documents(sources: Sequence[SourceFile], text_field: str) -> Iterator[tuple[bytes, int]]:
    """(split hash, bytes) of each document. A file that is one document is not read."""
    for number, source in enumerate(sources):
        if source.forgotten:
            continue
        if _is_plain_text(source):
            yield bytes.fromhex(source.sha256), source.bytes
            continue
        shard = InputShard(0, (Span(number, 0, source.bytes),))
        for document in read_documents(
            shard, sources, text_field=text_field, refuse=lambda place, problem: None
        ):
            yield document.split_hash, document.size


def _is_plain_text(source: SourceFile) -> bool:
    """Whether the file's bytes are the document's, apart from a byte order mark."""
    return source.format == "text" and not source.compression


def _is_held_out_whole(source: SourceFile, share: float) -> bool:
    return _is_plain_text(source) and split_of(bytes.fromhex(source.sha256), share) == "heldout"
