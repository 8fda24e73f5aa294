"""`manifest.json`: the only thing that readers open, and the only place that knows a cache.

Replacing it is a compare-and-swap on the checksum that the writer had read.
"""

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from schemas.files import FileEntry, read_json, write_json
from schemas.identity import digest
from schemas.layout import MANIFEST
from schemas.signals import LogitsSignal, Signal, signal_from_json

FORMAT = "decant-cache"
VERSION = 1
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclass(frozen=True)
class Unit:
    """A committed range of rows. `tokens` excludes padding; `scored` counts targets."""

    split: Split
    rows: int
    tokens: int
    scored: int
    files: dict[str, FileEntry]
    """What holds it, by signal; `rows` is one of them."""
    skipped_rows: tuple[int, ...] = ()
    """Offsets of rows in which the teacher produced NaN: kept in place, never scored."""


@dataclass(frozen=True)
class Source:
    """One input file: its name below the corpus root and its sha256."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Skipped:
    """A document that `on_error = "skip"` left out: where it was and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Part:
    """An immutable set of rows with its signals and statistics."""

    path: str
    rows_id: str
    unit_rows: int
    units: tuple[Unit, ...]
    signals: dict[str, Signal]
    statistics: dict[str, str]
    """sha256 of each file under `statistics/`."""
    sources: tuple[Source, ...]
    skipped: tuple[Skipped, ...] = ()
    duplicates: int = 0
    """Documents left out because an earlier one had the same content."""


@dataclass(frozen=True)
class Manifest:
    """What a sealed cache holds."""

    sequence_length: int
    vocabulary_size: int
    tokenizer: str
    """Digest of the tokenizer; its files are in `tokenizer/`."""
    parts: tuple[Part, ...]
    format: str = FORMAT
    version: int = VERSION
    cache_id: str = field(default="", compare=False)
    """Hash of the canonical manifest; for people and audits."""

    @property
    def rows_ids(self) -> tuple[str, ...]:
        """Identity of each part's rows, in order."""
        return tuple(part.rows_id for part in self.parts)

    @property
    def rows_id(self) -> str:
        """One name for all rows: the part's own when there is one."""
        return self.rows_ids[0] if len(self.parts) == 1 else digest(list(self.rows_ids))

    @property
    def signals(self) -> dict[str, Signal]:
        """Signals that every part holds, as the first part describes them."""
        first, *others = self.parts
        return {
            name: signal
            for name, signal in first.signals.items()
            if all(name in part.signals for part in others)
        }

    @property
    def betas(self) -> tuple[float, ...]:
        """Inverse temperatures of the nodes of `tail_logmass`; β = 0 included."""
        return self.logits.betas

    @property
    def logits(self) -> LogitsSignal:
        """The one signal that every cache holds."""
        signal = self.signals["logits"]
        assert isinstance(signal, LogitsSignal)
        return signal


def write_manifest(cache: Path, manifest: Manifest, *, replaces: str | None) -> Manifest:
    """Seal `cache`: write the manifest if the present one has id `replaces` (None: there is none).

    RuntimeError when someone else sealed in between. Returns the manifest with its `cache_id`.
    """
    value = _as_json(manifest)
    cache_id = digest(value)
    with _sealing(cache):
        present = read_manifest(cache).cache_id if (cache / MANIFEST).exists() else None
        if present != replaces:
            raise RuntimeError(
                f"{cache}: another process sealed this cache meanwhile (expected "
                f"{_short(replaces)}, found {_short(present)}); run again to build on its result"
            )
        write_json(cache / MANIFEST, {**value, "cache_id": cache_id})
    return dataclasses.replace(manifest, cache_id=cache_id)


def read_manifest(cache: Path) -> Manifest:
    """The manifest of `cache`. ValueError if the cache is unsealed, foreign or damaged."""
    path = cache / MANIFEST
    if not cache.is_dir():
        raise ValueError(f"{cache}: no such cache directory (from {Path.cwd()})")
    if not path.exists():
        started = (cache / "parts").is_dir()
        raise ValueError(
            f"{cache}: not sealed, its capture has not finished; run the same `precompute` again "
            "and it goes on where it stopped"
            if started
            else f"{cache}: not a cache, there is no {MANIFEST} in it"
        )
    value = read_json(path)
    if value.get("format") != FORMAT:
        raise ValueError(f"{path}: format {value.get('format')!r}, expected {FORMAT!r}")
    if value.get("version") != VERSION:
        raise ValueError(
            f"{path}: cache format version {value.get('version')}, this release reads {VERSION}; "
            "use the release that wrote it or a newer one"
        )
    try:
        return _from_json(value)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of version {VERSION}: {error}") from error


def _short(cache_id: str | None) -> str:
    return cache_id[:12] if cache_id else "no manifest"


@contextlib.contextmanager
def _sealing(cache: Path) -> Iterator[None]:
    # Two sealers on one file system take turns; the id then tells the second that it lost.
    with (cache / ".seal.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _as_json(manifest: Manifest) -> dict[str, Any]:
    value = dataclasses.asdict(manifest)
    del value["cache_id"]
    return value


def unit_from_json(value: dict[str, Any]) -> Unit:
    """The unit that `dataclasses.asdict` turned into JSON."""
    files = {name: FileEntry(**entry) for name, entry in value["files"].items()}
    return Unit(**{**value, "files": files, "skipped_rows": tuple(value["skipped_rows"])})


def _part_from_json(value: dict[str, Any]) -> Part:
    signals = {name: signal_from_json(name, signal) for name, signal in value["signals"].items()}
    return Part(
        **{
            **value,
            "units": tuple(unit_from_json(unit) for unit in value["units"]),
            "signals": signals,
            "sources": tuple(Source(**source) for source in value["sources"]),
            "skipped": tuple(Skipped(**skipped) for skipped in value["skipped"]),
        }
    )


def _from_json(value: dict[str, Any]) -> Manifest:
    return Manifest(**{**value, "parts": tuple(_part_from_json(p) for p in value["parts"])})
