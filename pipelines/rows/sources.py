"""From globs to a fixed, ordered list of input files, and from that to tokenise shards."""

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
# About 90k tokens, which a laptop's two cores capture in three to four minutes, in files small
# enough that there are dozens of documents to train on and several to hold out.
_EMBEDDED_BYTES = 300_000
_EMBEDDED_FILE_BYTES = range(2_000, 16_000)
# Not prose or code that anyone reads: tables, tests, other people's packages.
_NOT_EMBEDDED = {"encodings", "test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo"}
_MAGIC = ("*", "?", "[")
_COMPRESSIONS = (".gz", ".zst")

Kind = Literal["text", "chat", "completion"]
"""What a file's documents are: texts, messages of a chat, or prompts with what follows them."""


@dataclass(frozen=True)
class SourceFile:
    """An input file. `name` is its path below its glob's fixed directory: moving a corpus as a
    whole changes no identity."""

    name: str
    path: str
    bytes: int
    sha256: str
    kind: Kind = "text"
    modified: int | None = None
    """mtime in nanoseconds, from before it was hashed."""

    def require_unchanged(self) -> None:
        """ValueError if it is not the file that was hashed, as far as size and time can tell."""
        stat = Path(self.path).stat()
        if self.modified is not None and (stat.st_size, stat.st_mtime_ns) != (
            self.bytes,
            self.modified,
        ):
            raise ValueError(
                f"{self.path}: changed while this run read it; bring back what it was and run "
                "again, or capture what it is now into another output"
            )

    @property
    def compression(self) -> str:
        """Suffix that says how the whole file is compressed; empty if it is not."""
        return next((suffix for suffix in _COMPRESSIONS if self.path.endswith(suffix)), "")

    @property
    def is_jsonl(self) -> bool:
        """One document a line rather than one a file."""
        return self.path.removesuffix(self.compression).endswith(".jsonl")

    @property
    def is_parquet(self) -> bool:
        """One document a record of a table."""
        return self.path.endswith(".parquet")


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of source number `source`; a line, or a row group of a table, belongs
    where it begins."""

    source: int
    start: int
    end: int


@dataclass(frozen=True)
class InputShard:
    """What one tokenise worker reads. Cut on the driver, from the sizes of files alone."""

    number: int
    spans: tuple[Span, ...]


def find_sources(
    patterns: Sequence[str], *, max_bytes: int | None, memory: Path
) -> list[SourceFile]:
    """The files that `patterns` match, by name, each once, hashed.

    `memory` remembers hashes between runs. FileNotFoundError for a pattern that matches nothing,
    ValueError when all files are empty.
    """
    found: dict[Path, str] = {}
    for pattern in patterns:
        limit = _EMBEDDED_BYTES if pattern == EMBEDDED else None
        for path, name in _limited(_match(pattern), limit):
            found.setdefault(path, name)
    chosen = sorted(_limited(list(found.items()), max_bytes), key=lambda item: (item[1], item[0]))
    if not any(path.stat().st_size for path, _ in chosen):
        raise ValueError(f"corpus.files {list(patterns)}: every matching file is empty")
    stats = [path.stat() for path, _ in chosen]
    digests = remembered_sha256s([path for path, _ in chosen], memory=memory)
    return [
        SourceFile(name, str(path), stat.st_size, sha256, modified=stat.st_mtime_ns)
        for (path, name), stat, sha256 in zip(chosen, stats, digests, strict=True)
    ]


def _match(pattern: str) -> list[tuple[Path, str]]:
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
    """The settings with everything decided that was left to depend on the corpus."""
    size = sum(source.bytes for source in sources)
    shard_bytes = min(max(size // 16, 1 << 20), 32 << 20)
    heldout = min(max(round((1 << 20) / size, 4), 0.005), 0.1)
    return dataclasses.replace(
        corpus,
        shard_bytes=corpus.shard_bytes or shard_bytes,
        heldout=heldout if corpus.heldout is None else corpus.heldout,
    )


def cut_shards(sources: Sequence[SourceFile], *, shard_bytes: int) -> list[InputShard]:
    """Consecutive sources gathered to about `shard_bytes`; long files are cut where that can be
    done without reading them: JSON lines that are not compressed, and tables."""
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
