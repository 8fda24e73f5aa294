"""Looks at a teacher and a corpus: shapes from a config, lengths from a sample of the documents.

No weight is read and no file is hashed, so that a large corpus takes seconds.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from decant.models import open_checkpoint
from decant.pipelines.config import Corpus
from decant.pipelines.init.model_facts import number_formats, parameter_count
from decant.pipelines.rows.documents import Chat, Content, read_documents, with_kinds
from decant.pipelines.rows.formats import unreadable
from decant.pipelines.rows.long_text import LongText
from decant.pipelines.rows.matching import Refuse, fail
from decant.pipelines.rows.sources import InputShard, SourceFile, Span, listed

_FILES = 64
"""Files of which documents are read, spread evenly over all."""
_DOCUMENTS = 16
"""Documents read of each file."""
_SPAN_BYTES = 1 << 20
_CHARACTERS = 1 << 16
"""Of a longer document the beginning is tokenised; its length is scaled up."""


@dataclass(frozen=True)
class TeacherFacts:
    """A teacher as its config describes it."""

    name: str
    """As the config file should name it."""
    title: str
    family: str
    parameters: int
    weight_bytes: int
    kinds: tuple[str, ...]
    """Number formats of the weights, the commonest first."""
    layers: int
    width: int
    vocabulary: int
    positions: int
    """Its context length."""
    chats: bool
    """Whether its tokenizer has a chat template."""


@dataclass(frozen=True)
class CorpusFacts:
    """A corpus as a sample of its documents shows it."""

    patterns: tuple[str, ...]
    """Files, folders and globs for `corpus.files`."""
    left_out: dict[str, int]
    """Files in the folders that are not read, by what they are."""
    files: int
    bytes: int
    kinds: dict[str, int]
    """Sampled documents by kind: text, chat or completion."""
    lengths: tuple[int, ...]
    """Tokens of each sampled document, sorted."""
    tokens: int
    """Estimate for the whole corpus."""
    documents: int
    """Estimate for the whole corpus."""

    def length_at(self, share: float) -> int:
        """The length that this share of the sampled documents does not exceed."""
        return self.lengths[min(len(self.lengths) - 1, math.ceil(share * len(self.lengths)) - 1)]


def look_at_teacher(name: str) -> TeacherFacts:
    """The facts of a Hugging Face directory, a GGUF file, a hub id or `embedded`.

    FileNotFoundError or ValueError if it is none, or a model that we do not support.
    """
    checkpoint = open_checkpoint(name)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    return TeacherFacts(
        name=name,
        title=checkpoint.title,
        family=config.family,
        parameters=parameter_count(checkpoint),
        weight_bytes=checkpoint.files.weight_bytes,
        kinds=number_formats(checkpoint),
        layers=config.num_layers,
        width=config.hidden_size,
        vocabulary=min(tokenizer.size, config.vocab_size),
        positions=config.longest_row,
        chats="chat_template.jinja" in tokenizer.files()
        or b'"chat_template"' in tokenizer.files().get("tokenizer_config.json", b""),
    )


def look_at_corpus(given: Sequence[str], teacher: TeacherFacts) -> CorpusFacts:
    """The facts of the files, globs and directories in `given`, by the teacher's tokenizer.

    FileNotFoundError if something matches no file, ValueError if no document can be read.
    """
    left_out: Counter[str] = Counter()

    def passed_over(path: str, why: str) -> None:
        left_out[why.partition(";")[0]] += 1

    sources = _unhashed(given, passed_over)
    step = max(1, len(sources) // _FILES)
    sampled = with_kinds(sources[::step][:_FILES], text_field=Corpus().text_field)
    tokenizer = open_checkpoint(teacher.name).tokenizer()
    kinds: Counter[str] = Counter()
    lengths: list[int] = []
    read_bytes = tokens_in_read = documents_in_read = 0
    for number, source in enumerate(sampled):
        contents = list(itertools.islice(_documents(sampled, number), _DOCUMENTS))
        kinds[source.kind] += len(contents)
        texts = [_beginning(content) for content in contents]
        counted = [len(ids) for ids in tokenizer.encode_batch([text for text, _ in texts])]
        whole = [round(n * scale) for n, (_, scale) in zip(counted, texts, strict=True)]
        lengths += whole
        size = sum(len(text.encode()) * scale for text, scale in texts)
        # Of a text file the only document was read, of other files a few records.
        read_bytes += source.bytes if source.kind == "text" and len(whole) == 1 else size
        tokens_in_read += sum(whole)
        documents_in_read += len(whole)
    if not lengths:
        raise ValueError(f"{', '.join(given)}: no document in the first {len(sampled)} files")
    total = sum(source.bytes for source in sources)
    scale = total / max(read_bytes, 1)
    is_all = len(sampled) == len(sources) and read_bytes >= total
    return CorpusFacts(
        patterns=tuple(given),
        left_out=dict(left_out),
        files=len(sources),
        bytes=total,
        kinds=dict(kinds),
        lengths=tuple(sorted(lengths)),
        tokens=round(tokens_in_read * scale),
        documents=documents_in_read if is_all else max(1, round(documents_in_read * scale)),
    )


def _unhashed(patterns: Sequence[str], passed_over: Refuse) -> list[SourceFile]:
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        for match in listed(pattern, fail, passed_over):
            if why := unreadable(match.name):
                fail(match.path, why)
            source = SourceFile(
                match.name, match.path, match.bytes, sha256="", version=match.version
            )
            found.setdefault(match.real, source)
    return sorted(found.values(), key=lambda source: source.name)


def _documents(sources: Sequence[SourceFile], number: int) -> Iterator[Content]:
    span = Span(number, 0, min(sources[number].bytes, _SPAN_BYTES))
    if sources[number].format not in ("jsonl", "parquet"):
        span = Span(number, 0, sources[number].bytes)
    shard = InputShard(0, (span,))
    documents = read_documents(
        shard, sources, text_field=Corpus().text_field, refuse=lambda place, why: None
    )
    return (document.content for document in documents)


def _beginning(content: Content) -> tuple[str, float]:
    """The beginning of a document's text, and how much longer the whole text is."""
    if isinstance(content, LongText):
        text, length = "", 0
        for chunk in content.chunks():
            text += chunk[: _CHARACTERS - len(text)]
            length += len(chunk)
        return text, length / max(len(text), 1)
    if isinstance(content, Chat):
        content = "\n".join(str(message.get("content") or "") for message in content.messages)
    elif not isinstance(content, str):
        content = content.prompt + content.completion
    text = content[:_CHARACTERS]
    return text, len(content) / max(len(text), 1)
