"""`manifest.json`: the description of a whole cache, and the first file that a reader opens.

A writer replaces it by compare-and-swap on the `cache_id` that it had read.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from decant.schemas.disk import steps
from decant.schemas.disk.array_record import FileEntry, as_json
from decant.schemas.disk.atomic import json_bytes, parse_json, write_json
from decant.schemas.disk.identity import digest
from decant.schemas.disk.inside import read_regular
from decant.schemas.disk.layout import JOURNAL, LOGITS, MANIFEST, ROWS, part_layout
from decant.schemas.disk.locks import changing
from decant.schemas.disk.names import require_names, require_unit_numbers
from decant.schemas.disk.stand_in import Bucket, bucket_of, exists
from decant.schemas.disk.steps import Step
from decant.schemas.manifest import bounds
from decant.schemas.signals import UNSET_IN_CAPTURES, LogitsSignal, Signal, signal_from_json

Result = TypeVar("Result")
FORMAT = "decant-cache"
VERSION = 2
"""Version 2 added parts with only some units of a plan, parts in another cache, and forgotten
documents. A cache without these is written as version 1, byte for byte, so that older releases read
it. Older releases refuse version 2 instead of reading it wrong."""
WRITERS = 4
"""Version 4 added rows with log-probabilities of the model that wrote them. Only a cache that has
such rows is written as version 4. Older releases refuse it: they would verify its rows wrongly."""
_IN_BUCKET = {1: 3, VERSION: 3, WRITERS: 5}
"""Version of the manifest in a bucket, where objects with data are named by their content
(`stand_in.py`), by its version on a disk. It has the same fields and the same `cache_id`."""
BY_CONTENT = frozenset(_IN_BUCKET.values())
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
    """The entry of each signal's files, by signal name; the rows' own entry is `rows`."""
    skipped_rows: tuple[int, ...] = ()
    """Offsets of rows for which the teacher produced NaN. They keep their place, unscored."""
    group: str = ""
    """Name of the group of files that all rows come from; empty if the corpus has no groups."""


@dataclass(frozen=True)
class Source:
    """One input file: its name relative to the corpus root and its sha256."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Skipped:
    """A document that `on_error = "skip"` left out, and the reason."""

    source: str
    reason: str


@dataclass(frozen=True)
class Forgotten:
    """A document that must never be read again, located as in `records.rows.Segment`."""

    source: int
    """Index into the part's sources."""
    document: int | None = None
    """None: every document of the source."""


@dataclass(frozen=True)
class Aligned:
    """What a part was made from by `decant align`: another cache, of which no teacher ran again."""

    rows_id: str
    cache_id: str
    """Of the other cache, as it was then; not part of any identity."""
    tokenizer: str
    """Digest of the other cache's tokenizer, which is the teacher's."""
    signals: Mapping[str, str]
    """signal_id of each signal that the targets were made from, by name."""
    targets: Literal["projected", "matched"]
    """`projected`: onto the ids of this cache. `matched`: see `LogitsSignal.unmatched`."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens of the teacher, and those of the student that take their places."""
    vocabulary: int = 0
    """Ids of the other cache's tokenizer; 0 if not recorded."""
    left_out: tuple[int, ...] = ()
    """Numbers of the other cache's units, over all its parts, that gave no row. All others gave one
    unit each, in order."""


@dataclass(frozen=True)
class Part:
    """An immutable set of rows with its signals and statistics."""

    path: str
    """Directory relative to the cache; begins with `..` if the part lies in another cache."""
    rows_id: str
    unit_rows: int
    units: tuple[Unit, ...]
    signals: dict[str, Signal]
    statistics: dict[str, str]
    """sha256 of each file under `statistics/`."""
    sources: tuple[Source, ...]
    skipped: tuple[Skipped, ...] = ()
    duplicates: int = 0
    """Documents left out because an earlier document, of this or an older part, was identical."""
    unwritten: Mapping[str, int] = field(default_factory=dict)
    """Number of chats of which the chat template left out their `tools`, or another named thing."""
    writers: Mapping[str, int] = field(default_factory=dict)
    """Number of rollouts in the directory by the name of the model that wrote them; "" if a rollout
    names none. If there are any, rows have `writer_logprobs`."""
    numbers: tuple[int, ...] = ()
    """Numbers of these units in the directory's plan, ascending. Empty: all units of the plan."""
    planned_units: int = 0
    """Number of units in the directory's plan; 0 if this part holds all of them."""
    forgotten: tuple[Forgotten, ...] = ()
    forgotten_rows: tuple[tuple[int, int], ...] = ()
    """(unit number, offset) of rows that hold only forgotten documents."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """How often an epoch takes each row of a group, by the group's name, as the settings said when
    the part was made."""
    plan_sha256: str = ""
    """For a part in another cache: sha256 of its `plan.json`, which identifies it. Else empty."""
    aligned: Aligned | None = None
    """What the part was made from; None if a teacher read its rows. Positions of an aligned part
    may be scored and have no target: they are learned from their label alone."""

    @property
    def unit_numbers(self) -> Sequence[int]:
        """Number of each unit in the directory's plan. Names of the unit's files use it."""
        return self.numbers or range(len(self.units))

    @property
    def numbered_units(self) -> Iterator[tuple[int, Unit]]:
        """Pairs of unit number and unit."""
        return zip(self.unit_numbers, self.units, strict=True)

    @property
    def slots(self) -> int:
        """Length of the leading axis of the directory's arrays."""
        return (self.planned_units or len(self.units)) * self.unit_rows

    @property
    def logits(self) -> LogitsSignal:
        """Description of the signal `logits`. KeyError if the part holds only rows."""
        signal = self.signals[LOGITS]
        assert isinstance(signal, LogitsSignal)
        return signal

    @property
    def in_other_cache(self) -> bool:
        """Whether the part's directory lies in another cache."""
        return bool(self.plan_sha256)


@dataclass(frozen=True)
class Manifest:
    """The contents of a sealed cache."""

    sequence_length: int
    vocabulary_size: int
    tokenizer: str
    """Digest of the tokenizer, whose files are in `tokenizer/`."""
    parts: tuple[Part, ...]
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each file in `tokenizer/`, by name; empty in caches that releases before 0.8 began.
    `tokenizer` covers only what decides ids."""
    format: str = FORMAT
    cache_id: str = field(default="", compare=False)
    """Hash of the canonical manifest, for people and audits."""
    by_content: bool = field(default=False, compare=False)
    """Whether objects with data are named by their content: in a bucket, since version 3."""

    @property
    def rows_ids(self) -> tuple[str, ...]:
        """The rows_id of each part, in order."""
        return tuple(part.rows_id for part in self.parts)

    @property
    def rows_id(self) -> str:
        """Identity of all rows: the only part's rows_id, or a hash of several."""
        return self.rows_ids[0] if len(self.parts) == 1 else digest(list(self.rows_ids))

    @property
    def forgotten_id(self) -> str:
        """Identity of all forgotten documents; empty if there are none."""
        forgotten = [[dataclasses.asdict(f) for f in part.forgotten] for part in self.parts]
        return digest(forgotten) if any(forgotten) else ""

    @property
    def signals(self) -> dict[str, Signal]:
        """Signals that every part holds, with the first part's descriptions."""
        first, *others = self.parts
        return {
            name: signal
            for name, signal in first.signals.items()
            if all(name in part.signals for part in others)
        }

    @property
    def writers(self) -> dict[str, int]:
        """Number of rollouts by the name of the model that wrote them, most first.

        Empty if the cache has no rollouts; else `Cache.read` gives `writer_logprobs`.
        """
        counts: Counter[str] = Counter()
        for writers in {part.path: part.writers for part in self.parts}.values():
            counts.update(writers)
        return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))

    @property
    def source_weights(self) -> dict[str, float]:
        """How often an epoch takes each row of a group, by the name of each group that has rows.

        The newest part that knows the group decides.
        """
        weights: dict[str, float] = {}
        for part in self.parts:
            weights |= part.weights
        names = dict.fromkeys(u.group for part in self.parts for u in part.units if u.group)
        return {name: weights.get(name, 1.0) for name in names}

    @property
    def betas(self) -> tuple[float, ...]:
        """β of each node of `tail_logmass`, β = 0 included."""
        return self.logits.betas

    @property
    def logits(self) -> LogitsSignal:
        """Description of the signal `logits`, with labels if any part has them.

        KeyError if the cache holds only rows.
        """
        signal = self.signals[LOGITS]
        assert isinstance(signal, LogitsSignal)
        return dataclasses.replace(signal, labels=any(part.logits.labels for part in self.parts))


def write_manifest(
    cache: Path,
    manifest: Manifest,
    *,
    replaces: str | None,
) -> Manifest:
    """Seal `cache`: replace the manifest whose `cache_id` is `replaces` (None: no manifest yet).

    Returns the manifest with its `cache_id`. ManifestChangedError if another process sealed the
    cache in between.
    """
    value = manifest_to_json(manifest)
    value["cache_id"] = digest(value)
    with changing(cache):
        if bucket := bucket_of(cache):
            version = _IN_BUCKET[value["version"]]
            _swap_manifest(bucket, cache, {**value, "version": version}, replaces=replaces)
        else:
            path = cache / MANIFEST
            present = _read(path).cache_id if path.exists() else None
            _require_unchanged(cache, present, replaces)
            steps.reached(Step.MANIFEST_LOCKED)
            write_json(path, value, kind="manifest")
    by_content = bucket is not None
    return dataclasses.replace(manifest, cache_id=value["cache_id"], by_content=by_content)


def _swap_manifest(
    bucket: Bucket, cache: Path, value: dict[str, Any], *, replaces: str | None
) -> None:
    """The version is asked for before the manifest is read, so a later one cannot be replaced."""
    head = bucket.store.head(MANIFEST)
    _require_unchanged(cache, _read(cache / MANIFEST).cache_id if head else None, replaces)
    steps.reached(Step.MANIFEST_LOCKED)
    steps.file_reached("manifest", "written")
    data = json_bytes(value)
    done = (
        bucket.store.swap(MANIFEST, data, head.version)
        if head
        else bucket.store.create(MANIFEST, data)
    )
    if not done:
        _require_unchanged(cache, _read(cache / MANIFEST).cache_id, replaces)
        raise ManifestChangedError(f"{cache}: another process is sealing this cache; run again")
    steps.file_reached("manifest", "flushed")
    steps.file_reached("manifest", "named")


def _require_unchanged(cache: Path, present: str | None, replaces: str | None) -> None:
    if present != replaces:
        raise ManifestChangedError(
            f"{cache}: another process sealed this cache meanwhile (expected "
            f"{_short(replaces)}, found {_short(present)}); run again to build on its result"
        )


class ManifestChangedError(RuntimeError):
    """The manifest is another one than a change was made for."""


def until_agreed(cache: Path, change: Callable[[], Result]) -> Result:
    """What `change` returns. A bucket has no lock: there it is called again, to read the manifest
    again, if another process wrote that first."""
    while True:
        try:
            return change()
        except ManifestChangedError:
            if bucket_of(cache) is None:
                raise


@contextlib.contextmanager
def changing_manifest(cache: Path) -> Iterator[Manifest]:
    """The manifest of a sealed cache, which no other process changes meanwhile.

    Waits for a command that is changing the cache. ValueError as for `read_manifest`.
    """
    read_manifest(cache, during_gc=True)  # so that a directory that is no cache gets no lock file
    with changing(cache):
        yield read_manifest(cache)


def read_manifest(cache: Path, *, during_gc: bool = False, by_content: bool = False) -> Manifest:
    """The manifest of the cache directory `cache`.

    ValueError if `cache` is unsealed, not a cache, or damaged. ValueError also if a `gc` has begun
    to replace files, unless `during_gc`; or if it is a directory with the names of a bucket, unless
    `by_content`.
    """
    path = cache / MANIFEST
    if bucket_of(cache):
        return _read_in_bucket(path)
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
    if (cache / JOURNAL).exists() and not during_gc:
        raise ValueError(
            f"{cache}: `gc` is overwriting what was forgotten. Wait for it, or if it was stopped "
            f"run `decant gc {cache}` again: it goes on where it was"
        )
    manifest = _read(path)
    if manifest.by_content and not by_content:
        raise ValueError(
            f"{cache}: its files are named as in a bucket. `decant copy` it to another directory, "
            "and use that"
        )
    return manifest


def _read_in_bucket(path: Path) -> Manifest:
    cache = path.parent
    try:
        manifest = _read(path)
    except FileNotFoundError:
        started = exists(part_layout(cache, 0).request)
        raise ValueError(
            f"{cache}: not sealed, its capture has not finished; run the same `precompute` again "
            "and it goes on where it stopped"
            if started
            else f"{cache}: not a cache, there is no {MANIFEST} in it"
        ) from None
    if not manifest.by_content:
        raise ValueError(
            f"{cache}: a release before 0.12 copied this cache there, with the names of a disk, "
            "so that it can only be read. `decant copy` it to this machine and change it there"
        )
    return manifest


def _read(path: Path) -> Manifest:
    return parse_manifest(read_regular(path), where=path)


def parse_manifest(data: bytes, *, where: Path | str) -> Manifest:
    """The manifest in the bytes of a `manifest.json`, which errors call `where`. ValueError."""
    value = parse_json(data, where=where)
    if value.get("format") != FORMAT:
        raise ValueError(f"{where}: format {value.get('format')!r}, expected {FORMAT!r}")
    version = value.pop("version", None)
    if version not in (*_IN_BUCKET, *BY_CONTENT):
        raise ValueError(
            f"{where}: cache format version {version}, this release reads 1 to {max(BY_CONTENT)}; "
            "use the release that wrote it or a newer one"
        )
    try:
        manifest = manifest_from_json(value)
        return dataclasses.replace(manifest, by_content=version in BY_CONTENT)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: not a manifest of version {version}: {error}") from error


def manifest_id(data: bytes) -> str:
    """The `cache_id` that the manifest in these bytes should have."""
    value = parse_json(manifest_named(data, by_content=False), where=MANIFEST)
    return digest({name: field for name, field in value.items() if name != "cache_id"})


def manifest_named(data: bytes, *, by_content: bool) -> bytes:
    """The bytes of a manifest for a place where objects are named by their content, or not.

    There and back they are the same.
    """
    value = parse_json(data, where=MANIFEST)
    version = _version_on_disk(value)
    return json_bytes({**value, "version": _IN_BUCKET[version] if by_content else version})


def _short(cache_id: str | None) -> str:
    return cache_id[:12] if cache_id else "no manifest"


_SINCE_2 = ("numbers", "planned_units", "forgotten", "forgotten_rows", "plan_sha256")
"""Fields of a part that version 2 added. An empty one is not written."""
_SINCE_4 = ("writers",)


def _version_on_disk(value: Mapping[str, Any]) -> int:
    """The lowest version that has the fields of a manifest's JSON."""

    def has(names: Sequence[str]) -> bool:
        return any(part.get(name) for part in value["parts"] for name in names)

    return WRITERS if has(_SINCE_4) else VERSION if has(_SINCE_2) else 1


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON, without its `cache_id`."""
    value = as_json(manifest)
    del value["cache_id"], value["by_content"]
    if not value["tokenizer_files"]:
        del value["tokenizer_files"]
    for part in value["parts"]:
        if part["aligned"] is None:
            del part["aligned"]
        for signal in part["signals"].values():
            for name in UNSET_IN_CAPTURES:
                if not signal.get(name, True):
                    del signal[name]
        for name in _SINCE_2:
            if not part[name]:
                del part[name]
    return {**value, "version": _version_on_disk(value)}


def unit_from_json(value: dict[str, Any]) -> Unit:
    """The unit from the JSON form of its `as_json`. ValueError for a signal of another name."""
    require_names("signal", value["files"].keys() - {ROWS})
    files = {name: FileEntry(**entry) for name, entry in value["files"].items()}
    return Unit(**{**value, "files": files, "skipped_rows": tuple(value["skipped_rows"])})


def _part_from_json(value: dict[str, Any]) -> Part:
    """The part from its JSON. ValueError for a name that could lead out of the cache."""
    signals = {name: signal_from_json(name, signal) for name, signal in value["signals"].items()}
    elsewhere = bool(value.get("plan_sha256"))
    require_names("part of another cache" if elsewhere else "part", [value["path"]])
    require_names("statistic", value["statistics"])
    require_unit_numbers(value.get("numbers", ()))
    return Part(
        **{
            **value,
            "units": tuple(unit_from_json(unit) for unit in value["units"]),
            "signals": signals,
            "sources": tuple(Source(**source) for source in value["sources"]),
            "skipped": tuple(Skipped(**skipped) for skipped in value["skipped"]),
            "numbers": tuple(value.get("numbers", ())),
            "forgotten": tuple(Forgotten(**place) for place in value.get("forgotten", ())),
            "forgotten_rows": tuple((n, at) for n, at in value.get("forgotten_rows", ())),
            "aligned": aligned_from_json(value.get("aligned")),
        }
    )


def aligned_from_json(value: dict[str, Any] | None) -> Aligned | None:
    """The facts from the JSON form of their `as_json`. ValueError if they cannot be right."""
    if value is None:
        return None
    aligned = Aligned(**{**value, "left_out": tuple(value["left_out"])})
    for name in ("rows_id", "cache_id", "tokenizer"):
        bounds.require_sha256(f"{name} of the other cache", getattr(aligned, name))
    bounds.require_number("vocabulary of the other cache", aligned.vocabulary, 0, bounds.POSITIONS)
    bounds.require_one_of("targets", aligned.targets, ("projected", "matched"))
    bounds.require_hashes("signals of the other cache", aligned.signals)
    bounds.require_offsets("left_out", aligned.left_out, bounds.UNITS)
    for pair in aligned.special_tokens.items():
        for text in pair:
            bounds.require_text("a special token", text)
    return aligned


def manifest_from_json(value: dict[str, Any]) -> Manifest:
    """The manifest from the result of `manifest_to_json`, without its version.

    ValueError, KeyError, TypeError or AttributeError if it is not one.
    """
    parts = tuple(_part_from_json(part) for part in value["parts"])
    manifest = Manifest(**{**value, "parts": parts, "by_content": False})
    length, vocabulary = manifest.sequence_length, manifest.vocabulary_size
    bounds.require_number("sequence_length", length, 1, bounds.POSITIONS)
    bounds.require_number("vocabulary_size", vocabulary, 1, bounds.POSITIONS)
    bounds.require_sha256("tokenizer", manifest.tokenizer)
    bounds.require_hashes("tokenizer_files", manifest.tokenizer_files)
    if manifest.cache_id != "":
        bounds.require_sha256("cache_id", manifest.cache_id)
    for part in manifest.parts:
        _require_part(part, length=length, vocabulary=vocabulary)
    return manifest


def _require_part(part: Part, *, length: int, vocabulary: int) -> None:
    bounds.require_sha256("rows_id", part.rows_id)
    if part.plan_sha256 != "":
        bounds.require_sha256("plan_sha256", part.plan_sha256)
    bounds.require_number("unit_rows", part.unit_rows, 1, bounds.ROWS)
    bounds.require_number("duplicates", part.duplicates, 0, bounds.BYTES)
    for name, count in part.unwritten.items():
        bounds.require_number(f"chats without their {name}", count, 0, bounds.BYTES)
    for name, count in part.writers.items():
        bounds.require_number(f"rollouts of writer {name!r}", count, 1, bounds.BYTES)
    for name, weight in part.weights.items():
        bounds.require_weight(f"weight of {name!r}", weight)
    bounds.require_number("planned_units", part.planned_units, 0, bounds.UNITS)
    for name, signal in part.signals.items():
        bounds.require_signal(name, signal, vocabulary=vocabulary)
    bounds.require_hashes("statistics", part.statistics)
    require_sources(part.sources)
    if len(part.unit_numbers) != len(part.units):
        raise ValueError(f"{len(part.numbers)} numbers of {len(part.units)} units")
    if part.planned_units and max(part.unit_numbers, default=0) >= part.planned_units:
        raise ValueError(f"a unit has a number beyond the {part.planned_units} of its plan")
    for unit in part.units:
        require_unit(unit, signals=part.signals, most=part.unit_rows, length=length)
    for place in part.forgotten:
        bounds.require_number("forgotten source", place.source, 0, len(part.sources) - 1)
        if place.document is not None:
            bounds.require_number("forgotten document", place.document, 0, bounds.BYTES)
    rows = {number: unit.rows for number, unit in part.numbered_units}
    for number, offset in part.forgotten_rows:
        bounds.require_one_of("unit of a forgotten row", number, rows)
        bounds.require_number("offset of a forgotten row", offset, 0, rows[number] - 1)


def require_sources(sources: Sequence[Source]) -> None:
    """ValueError unless sources have names and hashes."""
    for source in sources:
        bounds.require_text("name of a source", source.name)
        bounds.require_sha256("sha256 of a source", source.sha256)


def require_unit(unit: Unit, *, signals: Iterable[str], most: int, length: int) -> None:
    """ValueError unless a unit of at most `most` rows of `length` positions can be as it says.

    It must have files of `signals` and of its rows.
    """
    bounds.require_one_of("split", unit.split, SPLITS)
    bounds.require_number("rows of a unit", unit.rows, 1, most)
    bounds.require_number("tokens of a unit", unit.tokens, 0, unit.rows * length)
    bounds.require_number("scored of a unit", unit.scored, 0, unit.tokens)
    if unit.group != "":
        bounds.require_text("group of a unit", unit.group)
    bounds.require_offsets("skipped_rows", unit.skipped_rows, unit.rows)
    if missing := {ROWS, *signals} - unit.files.keys():
        raise ValueError(f"a unit has no files of {min(missing)}")
    for name, entry in unit.files.items():
        bounds.require_entry(name, entry)
