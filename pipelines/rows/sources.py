"""The input files that globs match, in a fixed order, and how they are cut into input shards."""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decant.pipelines.config import Corpus
from decant.pipelines.rows.matching import Match, Refuse, fail, matching_files
from decant.schemas.disk.identity import remembered_sha256s

EMBEDDED = "embedded"
# About 90k tokens, which a laptop's two cores capture in three to four minutes. Files are small,
# so that there are dozens of documents to train on and several to hold out.
_EMBEDDED_BYTES = 300_000
_EMBEDDED_FILE_BYTES = range(2_000, 16_000)
# Tables, tests and other people's packages: not code that anyone reads.
_NOT_EMBEDDED = {"encodings", "test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo"}
_COMPRESSIONS = (".gz", ".zst")

Kind = Literal["text", "chat", "completion"]
"""What a file's documents are: texts, chats (lists of messages), or prompts with completions."""


@dataclass(frozen=True)
class SourceFile:
    """An input file and its hash."""

    name: str
    """Path below the directory before the glob's first wildcard. It goes into identities, so moving
    the whole corpus changes none. Links in it are not followed."""
    path: str
    """Absolute path, of which `name` is the end."""
    bytes: int
    sha256: str
    kind: Kind = "text"
    modified: int | None = None
    """Modification time in nanoseconds, taken before the file was hashed. None: unknown."""

    def require_unchanged(self) -> None:
        """ValueError if the file's size or modification time differs from when it was hashed."""
        stat = Path(self.path).stat()
        if self.modified is not None and (stat.st_size, stat.st_mtime_ns) != (
            self.bytes,
            self.modified,
        ):
            raise ValueError(
                f"{self.path}: changed while this run read it. Restore the old file and run again, "
                "or capture the new one into another output"
            )

    @property
    def compression(self) -> str:
        """`.gz` or `.zst` if the whole file is compressed, else an empty string."""
        lower = self.path.lower()
        return next((suffix for suffix in _COMPRESSIONS if lower.endswith(suffix)), "")

    @property
    def is_jsonl(self) -> bool:
        """Whether each line of the file is a document in JSON."""
        return self.path.lower().removesuffix(self.compression).endswith(".jsonl")

    @property
    def is_parquet(self) -> bool:
        """Whether the file is a table, of which each record is a document."""
        return self.path.lower().endswith(".parquet")


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of source number `source`.

    A line, or a row group of a table, belongs to the span in which it begins.
    """

    source: int
    start: int
    end: int


@dataclass(frozen=True)
class InputShard:
    """The input that a worker tokenises at once. The driver cuts shards by file sizes alone."""

    number: int
    spans: tuple[Span, ...]


def find_sources(
    patterns: Sequence[str], *, max_bytes: int | None, memory: Path, refuse: Refuse = fail
) -> list[SourceFile]:
    """The files that `patterns` match, hashed and sorted by name, each file once.

    `max_bytes` limits the total as `Corpus.max_bytes` says. The file `memory` keeps hashes between
    runs. `refuse` gets the paths that cannot be read. FileNotFoundError for a pattern that matches
    no file; ValueError if all files are empty.
    """
    matches: dict[Path, Match] = {}
    for pattern in patterns:
        limit = _EMBEDDED_BYTES if pattern == EMBEDDED else None
        for match in _limited(_matches(pattern, refuse), limit):
            matches.setdefault(match.real, match)
    chosen = _limited(list(matches.values()), max_bytes)
    chosen.sort(key=lambda match: (match.name, match.path))
    stats = [match.path.stat() for match in chosen]
    if not any(stat.st_size for stat in stats):
        raise ValueError(f"corpus.files {list(patterns)}: every matching file is empty")
    digests = remembered_sha256s([match.path for match in chosen], memory=memory)
    return [
        SourceFile(match.name, str(match.path), stat.st_size, sha256, modified=stat.st_mtime_ns)
        for match, stat, sha256 in zip(chosen, stats, digests, strict=True)
    ]


def _matches(pattern: str, refuse: Refuse) -> list[Match]:
    if pattern == EMBEDDED:
        return _standard_library()
    matches = matching_files(pattern, refuse=refuse)
    if not matches:
        raise FileNotFoundError(f"corpus.files: {pattern!r} matches no file (from {Path.cwd()})")
    return matches


def _standard_library() -> list[Match]:
    root = Path(sysconfig.get_path("stdlib"))
    named = [(path, path.relative_to(root)) for path in root.rglob("*.py")]
    return [
        Match(name.as_posix(), path, path)
        for path, name in named
        if not _NOT_EMBEDDED & set(name.parts) and path.stat().st_size in _EMBEDDED_FILE_BYTES
    ]


def _limited(matches: list[Match], max_bytes: int | None) -> list[Match]:
    if max_bytes is None:
        return matches
    taken, total = [], 0
    for match in sorted(matches, key=lambda m: hashlib.sha256(m.name.encode()).digest()):
        if total >= max_bytes:
            break
        taken.append(match)
        total += match.path.stat().st_size
    return taken


def resolve_defaults(corpus: Corpus, sources: Sequence[SourceFile]) -> Corpus:
    """`corpus` with unset `shard_bytes` and `heldout` chosen by the total size of `sources`."""
    # A directory of which all files are gone has no sources; `claim` then says which are missing.
    size = sum(source.bytes for source in sources) or 1
    shard_bytes = min(max(size // 16, 1 << 20), 32 << 20)
    heldout = min(max(round((1 << 20) / size, 4), 0.005), 0.1)
    return dataclasses.replace(
        corpus,
        shard_bytes=shard_bytes if corpus.shard_bytes is None else corpus.shard_bytes,
        heldout=heldout if corpus.heldout is None else corpus.heldout,
    )


def cut_shards(sources: Sequence[SourceFile], *, shard_bytes: int) -> list[InputShard]:
    """Shards of consecutive sources, each of about `shard_bytes`.

    A longer file is cut only if it is a table or uncompressed JSON lines: others would have to be
    read for that. ValueError unless `shard_bytes` is above 0: no shard would hold a document.
    """
    if shard_bytes < 1:
        raise ValueError(f"corpus.shard_bytes is {shard_bytes}; expected 1 or more")
    shards: list[list[Span]] = [[]]
    filled = 0
    for number, source in enumerate(sources):
        for span in _spans(number, source, shard_bytes):
            if filled and filled + span.end - span.start > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(span)
            filled += span.end - span.start
    return [InputShard(i, tuple(spans)) for i, spans in enumerate(shards)]


def _spans(number: int, source: SourceFile, shard_bytes: int) -> list[Span]:
    if not (source.is_parquet or (source.is_jsonl and not source.compression)):
        return [Span(number, 0, source.bytes)]
    starts = range(0, max(source.bytes, 1), shard_bytes)
    return [Span(number, start, min(start + shard_bytes, source.bytes)) for start in starts]
