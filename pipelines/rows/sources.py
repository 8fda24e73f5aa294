"""The input files that globs match, in a fixed order, and how they are cut into input shards."""

import dataclasses
import glob
import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decant.pipelines.config import Corpus
from decant.schemas.disk.identity import remembered_sha256s

EMBEDDED = "embedded"
# About 90k tokens, which a laptop's two cores capture in three to four minutes. Files are small,
# so that there are dozens of documents to train on and several to hold out.
_EMBEDDED_BYTES = 300_000
_EMBEDDED_FILE_BYTES = range(2_000, 16_000)
# Tables, tests and other people's packages: not code that anyone reads.
_NOT_EMBEDDED = {"encodings", "test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo"}
_MAGIC = ("*", "?", "[")
_COMPRESSIONS = (".gz", ".zst")

Kind = Literal["text", "chat", "completion"]
"""What a file's documents are: texts, chats (lists of messages), or prompts with completions."""


@dataclass(frozen=True)
class SourceFile:
    """An input file and its hash."""

    name: str
    """Path below the directory before the glob's first wildcard. It goes into identities, so moving
    the whole corpus changes none."""
    path: str
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
        return next((suffix for suffix in _COMPRESSIONS if self.path.endswith(suffix)), "")

    @property
    def is_jsonl(self) -> bool:
        """Whether each line of the file is a document in JSON."""
        return self.path.removesuffix(self.compression).endswith(".jsonl")

    @property
    def is_parquet(self) -> bool:
        """Whether the file is a table, of which each record is a document."""
        return self.path.endswith(".parquet")


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
    patterns: Sequence[str], *, max_bytes: int | None, memory: Path
) -> list[SourceFile]:
    """The files that `patterns` match, hashed and sorted by name, each file once.

    `max_bytes` limits the total as `Corpus.max_bytes` says. The file `memory` keeps hashes between
    runs. FileNotFoundError for a pattern that matches no file; ValueError if all files are empty.
    """
    names: dict[Path, str] = {}
    for pattern in patterns:
        limit = _EMBEDDED_BYTES if pattern == EMBEDDED else None
        for path, name in _limited(_matching_files(pattern), limit):
            names.setdefault(path, name)
    chosen = sorted(_limited(list(names.items()), max_bytes), key=lambda item: (item[1], item[0]))
    if not any(path.stat().st_size for path, _ in chosen):
        raise ValueError(f"corpus.files {list(patterns)}: every matching file is empty")
    stats = [path.stat() for path, _ in chosen]
    digests = remembered_sha256s([path for path, _ in chosen], memory=memory)
    return [
        SourceFile(name, str(path), stat.st_size, sha256, modified=stat.st_mtime_ns)
        for (path, name), stat, sha256 in zip(chosen, stats, digests, strict=True)
    ]


def _matching_files(pattern: str) -> list[tuple[Path, str]]:
    if pattern == EMBEDDED:
        return _standard_library()
    root = _fixed_directory(pattern)
    paths = [Path(path) for path in glob.glob(pattern, recursive=True)]  # noqa: PTH207 - absolute
    files = [path.resolve() for path in paths if path.is_file()]
    if not files:
        raise FileNotFoundError(f"corpus.files: {pattern!r} matches no file (from {Path.cwd()})")
    return [(path, path.relative_to(root).as_posix()) for path in files]


def _standard_library() -> list[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    named = [(path, path.relative_to(root)) for path in root.rglob("*.py")]
    return [
        (path, name.as_posix())
        for path, name in named
        if not _NOT_EMBEDDED & set(name.parts) and path.stat().st_size in _EMBEDDED_FILE_BYTES
    ]


def _fixed_directory(pattern: str) -> Path:
    """The directory before the pattern's first wildcard."""
    parts = Path(pattern).parts
    fixed = []
    for part in parts[:-1]:
        if any(sign in part for sign in _MAGIC):
            break
        fixed.append(part)
    return Path(*fixed).resolve()


def _limited(files: list[tuple[Path, str]], max_bytes: int | None) -> list[tuple[Path, str]]:
    if max_bytes is None:
        return files
    taken, total = [], 0
    for path, name in sorted(files, key=lambda item: hashlib.sha256(item[1].encode()).digest()):
        if total >= max_bytes:
            break
        taken.append((path, name))
        total += path.stat().st_size
    return taken


def resolve_defaults(corpus: Corpus, sources: Sequence[SourceFile]) -> Corpus:
    """`corpus` with unset `shard_bytes` and `heldout` chosen by the total size of `sources`."""
    # A directory of which all files are gone has no sources; `claim` then says which are missing.
    size = sum(source.bytes for source in sources) or 1
    shard_bytes = min(max(size // 16, 1 << 20), 32 << 20)
    heldout = min(max(round((1 << 20) / size, 4), 0.005), 0.1)
    return dataclasses.replace(
        corpus,
        shard_bytes=corpus.shard_bytes or shard_bytes,
        heldout=heldout if corpus.heldout is None else corpus.heldout,
    )


def cut_shards(sources: Sequence[SourceFile], *, shard_bytes: int) -> list[InputShard]:
    """Shards of consecutive sources, each of about `shard_bytes`.

    A longer file is cut only if it is a table or uncompressed JSON lines: others would have to be
    read for that.
    """
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
