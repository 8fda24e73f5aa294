"""What `plan` shows of a corpus: its documents by kind, and of each kind one as students see it."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.rows.documents import read_documents
from decant.pipelines.rows.marking import Marked, mark, segments
from decant.pipelines.rows.shard import TokeniseJob
from decant.pipelines.rows.sources import InputShard, Kind
from decant.schemas.records.rows import Segment

_COUNTED = 1 << 20
"""Bytes of each kind that are tokenised to count tokens."""
_LONGEST_RUN = 160
"""Characters of a stretch of a sample that are shown; half of them from its end."""
_LONGEST_SAMPLE = 800


@dataclass
class DocumentKind:
    """The documents of one kind."""

    documents: int = 0
    bytes: int = 0
    """Of the documents as UTF-8 or JSON; those of chats are not rendered."""
    tokens: int = 0
    learned: int = 0
    """Tokens that are learned from."""
    sample: str = ""
    """The beginning of one document as text. What is learned from is in «guillemets»."""


def documents_by_kind(
    job: TokeniseJob, shards: Sequence[InputShard], *, scale: float
) -> dict[Kind, DocumentKind]:
    """The documents of `shards` by kind, with counts scaled up by `scale`.

    Documents that cannot be read are left out, and so is the tail of long documents: of each kind
    only the first megabyte is tokenised.
    """
    tokenizer = Tokenizer.from_files(job.tokenizer)
    template = job.template(tokenizer)
    kinds: dict[Kind, DocumentKind] = {}
    counted: dict[Kind, int] = {}
    for shard in shards:
        documents = read_documents(
            shard, job.sources, text_field=job.corpus.text_field, refuse=lambda place, why: None
        )
        for document in documents:
            kind = job.sources[document.place.source].kind
            known, size = kinds.setdefault(kind, DocumentKind()), document.size
            known.documents, known.bytes = known.documents + 1, known.bytes + size
            if counted.setdefault(kind, 0) >= _COUNTED:
                continue
            try:
                marked = _beginning(mark(document, tokenizer, template))
                (segment,) = segments([marked], tokenizer)
            except (ValueError, RecursionError):
                continue  # the capture tells it, with the document's place
            share = min(1.0, _COUNTED / max(size, 1)) if marked.learned is None else 1.0
            counted[kind] += round(size * share)
            known.tokens += len(segment.tokens)
            known.learned += int(segment.counted[1:].sum())
            known.sample = known.sample or shown(segment, tokenizer)
    for kind, known in kinds.items():
        whole = known.bytes / max(counted[kind], 1)
        known.tokens = round(known.tokens * whole * scale)
        known.learned = round(known.learned * whole * scale)
        known.documents = round(known.documents * scale)
        known.bytes = round(known.bytes * scale)
    return kinds


def shown(segment: Segment, tokenizer: Tokenizer) -> str:
    """A document as its tokens say it, long stretches shortened; «…» is learned from."""
    parts, length = [], 0
    whole_text = bool(segment.counted.all())
    for learned, text in _runs(segment, tokenizer):
        if length > _LONGEST_SAMPLE:
            parts.append("…")
            break
        limit = _LONGEST_SAMPLE if whole_text else _LONGEST_RUN
        if len(text) > limit:
            text = f"{text[: limit // 2]} … {text[-(limit // 2) :]}"
        length += len(text)
        parts.append(f"«{text}»" if learned else text)
    return "".join(parts)


def _runs(segment: Segment, tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    at = 0
    for learned, run in itertools.groupby(segment.counted.tolist()):
        end = at + len(list(run))
        yield learned, tokenizer.decode(segment.tokens[at:end].tolist())
        at = end


def _beginning(marked: Marked) -> Marked:
    """A text cut to what is counted at most; others as they are."""
    if marked.learned is not None:
        return marked
    return Marked(marked.document, "".join(itertools.islice(marked.chunks(), 16))[:_COUNTED])
