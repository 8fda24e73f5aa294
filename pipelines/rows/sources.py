"""The input files that globs match, in a fixed order, and how they are cut into input shards."""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decant.pipelines.config import Corpus, SourceGroup
from decant.pipelines.rows.formats import Format, compression_of, format_of, unreadable
from decant.pipelines.rows.matching import (
    Match,
    Refuse,
    fail,
    files_below,
    ignore,
    local_match,
    matching_files,
)
from decant.pipelines.rows.remote_digests import remote_sha256s
from decant.pipelines.rows.remote_file import RemoteFile
from decant.pipelines.rows.remote_files import matching_remote, require_same
from decant.schemas.disk.identity import remembered_sha256s
from decant.store import is_url

EMBEDDED = "embedded"
# About 90k tokens, which a laptop's two cores capture in three to four minutes. Files are small,
# so that there are dozens of documents to train on and several to hold out.
_EMBEDDED_BYTES = 300_000
_EMBEDDED_FILE_BYTES = range(2_000, 16_000)
# Tables, tests and other people's packages: not code that anyone reads.
_NOT_EMBEDDED = {"encodings", "test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo"}

Kind = Literal["text", "chat", "completion", "rollout"]
"""What a file's documents are: texts, chats (lists of messages), prompts with completions, or those
with the log-probabilities of the model that wrote them."""


@dataclass(frozen=True)
class SourceFile:
    """An input file and its hash."""

    name: str
    """Path below the directory before the glob's first wildcard. It goes into identities, so moving
    the whole corpus changes none. Links in it are not followed."""
    path: str
    """Absolute path or address, of which `name` is the end."""
    bytes: int
    sha256: str
    kind: Kind = "text"
    asked_format: Format | None = None
    """The format that the settings name; None: that of the file's suffix."""
    text_field: str | None = None
    """The field of a record that holds the document; None: that of the corpus."""
    group: int = 0
    """Number of the source group in the settings."""
    forgotten: bool = False
    """Whether the cache has forgotten the file, which is not there any more: never read it."""
    modified: int | None = None
    """Modification time in nanoseconds, taken before the file was hashed. None: unknown."""
    version: str = ""
    """Of a file at an address: what changes with its content, such as an ETag."""

    @property
    def remote(self) -> RemoteFile | None:
        """The file at its address; None for a file of this machine."""
        if not is_url(self.path):
            return None
        return RemoteFile(self.path, self.bytes, self.version, self.sha256)

    def require_unchanged(self) -> None:
        """ValueError if the file differs from when it was hashed: in size, or in its modification
        time or version."""
        if self.remote:
            return require_same(self.remote)
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
        return compression_of(self.path)

    @property
    def format(self) -> Format:
        """How documents lie in the file."""
        return self.asked_format or format_of(self.path)


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
    groups: Sequence[str | SourceGroup],
    *,
    max_bytes: int | None,
    memory: Path,
    known: Mapping[str, str] | None = None,
    refuse: Refuse = fail,
    passed_over: Refuse = ignore,
    tell: Callable[[str], None] = lambda _: None,
) -> list[SourceFile]:
    """The files of `groups`, hashed and sorted by group and name, each file once.

    A text among `groups` is a group of the files that it matches. `max_bytes` limits the total as
    `Corpus.max_bytes` says. The file `memory` keeps hashes between runs; `known` are the hashes
    of files at addresses that the capture's directory keeps. `refuse` gets the paths that cannot be
    read, and `passed_over` those below a folder that are not read. `tell` gets a line if files at
    addresses must be read to hash them.
    FileNotFoundError for a pattern that matches no file; ValueError if all files are empty.
    """
    matches: dict[str, tuple[Match, int]] = {}
    all_groups = [SourceGroup(files=(g,)) if isinstance(g, str) else g for g in groups]
    for number, group in enumerate(all_groups):
        found = [
            match
            for pattern in group.files
            for match in _limited(
                listed(pattern, refuse, passed_over),
                _EMBEDDED_BYTES if pattern == EMBEDDED else None,
            )
            if _is_readable(match, group, refuse)
        ]
        for match in _limited(found, group.max_bytes):
            matches.setdefault(match.real, (match, number))
    taken = _limited([match for match, _ in matches.values()], max_bytes)
    chosen = [(matches[match.real][1], match) for match in taken]
    chosen.sort(key=lambda pair: (pair[0], pair[1].name, pair[1].path))
    if not any(match.bytes for _, match in chosen):
        patterns = [pattern for group in all_groups for pattern in group.files]
        raise ValueError(f"corpus.files {patterns}: every matching file is empty")
    local = [Path(match.path) for _, match in chosen if not is_url(match.path)]
    remote = [
        RemoteFile(match.path, match.bytes, match.version, match.sha256)
        for _, match in chosen
        if is_url(match.path)
    ]
    digests = dict(zip(map(str, local), remembered_sha256s(local, memory=memory), strict=True))
    digests |= remote_sha256s(remote, memory=memory, known=known or {}, tell=tell)
    return [
        SourceFile(
            match.name,
            match.path,
            match.bytes,
            digests[match.path],
            asked_format=_asked_format(all_groups[number]),
            text_field=all_groups[number].text_field,
            group=number,
            modified=match.modified,
            version=match.version,
        )
        for number, match in chosen
    ]


def weights_by_name(corpus: Corpus) -> dict[str, float]:
    """The weight of each group of `corpus.sources` by its name, in order; 1 if it is unset.

    ValueError for two groups of one name.
    """
    weights: dict[str, float] = {}
    for number, group in enumerate(corpus.sources):
        name = str(number) if group.name is None else group.name
        if not name or name in weights:
            why = "the name of another group" if name else "empty"
            raise ValueError(f"corpus.sources[{number}].name: {name!r} is {why}; choose another")
        weights[name] = 1.0 if group.weight is None else float(group.weight)
    return weights


def listed(pattern: str, refuse: Refuse, passed_over: Refuse) -> list[Match]:
    """The files that `pattern` matches: a glob, a folder, an address of one, or `embedded`.

    `refuse` gets the paths that cannot be read, and `passed_over` those below a folder that are not
    read. FileNotFoundError if there is none.
    """
    if pattern == EMBEDDED:
        return _standard_library()
    if is_url(pattern):
        matches, is_folder = matching_remote(pattern, passed_over=passed_over)
    elif is_folder := Path(pattern).is_dir():
        matches = files_below(Path(pattern), refuse=refuse, passed_over=passed_over)
    else:
        matches = matching_files(pattern, refuse=refuse)
    if is_folder:
        for match in matches:
            if why := unreadable(match.name):
                passed_over(match.name, why)
        matches = [match for match in matches if not unreadable(match.name)]
    if not matches:
        where = "matches no file"
        if not is_url(pattern):
            where = f"matches no file (from {Path.cwd()})"
        raise FileNotFoundError(f"corpus.files: {pattern!r} {where}")
    return matches


def _asked_format(group: SourceGroup) -> Format | None:
    return None if group.kind == "auto" else group.kind


def _is_readable(match: Match, group: SourceGroup, refuse: Refuse) -> bool:
    """Whether the file's suffix is that of a format that is read; refuses the others."""
    why = unreadable(match.name) if group.kind == "auto" else ""
    if why:
        refuse(match.path, f'{why}, or read it as it is with kind = "text" in corpus.sources')
    return not why


def _standard_library() -> list[Match]:
    root = Path(sysconfig.get_path("stdlib"))
    named = [(path, path.relative_to(root)) for path in root.rglob("*.py")]
    return [
        local_match(name.as_posix(), path, real=path)
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
        total += match.bytes
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
    """Shards of consecutive sources of one group, each of about `shard_bytes`.

    A longer file is cut only if it is a table or uncompressed JSON lines: others would have to be
    read for that. ValueError unless `shard_bytes` is above 0: no shard would hold a document.
    """
    if shard_bytes < 1:
        raise ValueError(f"corpus.shard_bytes is {shard_bytes}; expected 1 or more")
    shards: list[list[Span]] = [[]]
    filled = 0
    for number, source in enumerate(sources):
        other_group = number > 0 and source.group != sources[number - 1].group
        for span in _spans(number, source, shard_bytes):
            if filled and (other_group or filled + span.end - span.start > shard_bytes):
                shards.append([])
                filled, other_group = 0, False
            shards[-1].append(span)
            filled += span.end - span.start
    return [InputShard(i, tuple(spans)) for i, spans in enumerate(shards)]


def _spans(number: int, source: SourceFile, shard_bytes: int) -> list[Span]:
    if source.format != "parquet" and (source.format != "jsonl" or source.compression):
        return [Span(number, 0, source.bytes)]
    starts = range(0, max(source.bytes, 1), shard_bytes)
    return [Span(number, start, min(start + shard_bytes, source.bytes)) for start in starts]
