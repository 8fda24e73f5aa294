"""`merge`: one manifest that refers to the parts of several caches, which stay where they are."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decant.models.text.tokenizer import Tokenizer, tokenizer_of
from decant.pipelines.upkeep.remove import without_signals
from decant.schemas import Cache, open_cache
from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import MANIFEST, PARTS, ROWS, part_layout
from decant.schemas.disk.locks import changing
from decant.schemas.disk.stand_in import by_address, exists, working_folder
from decant.schemas.manifest.manifest import Manifest, Part, read_manifest, write_manifest
from decant.schemas.manifest.tokenizer_files import tokenizer_hashes, write_tokenizer_files
from decant.schemas.reading.merged_parts import place_of
from decant.schemas.signals import Signal
from decant.store.urls import bucket_url, is_url, url_of

_OWN = ("signal_id", "shard_rows", "variance_kept", "directions", "labels")
"""Fields of a signal that may differ between captures."""


@dataclass(frozen=True)
class Merged:
    """The result of `merge`."""

    manifest: Manifest
    left_out: tuple[str, ...]
    """Parts that were left out, because an earlier part has the same rows."""
    lost: dict[str, str]
    """Signals that the merged cache lacks although a cache has them, each with the reason."""


def merge(output: Path, caches: Sequence[Path]) -> Merged:
    """Make `output` a cache of all parts of `caches`, in this order; it refers to their files.

    All are on this machine, or in one bucket. ValueError if they are not; ValueError that names
    both sides if the caches differ in tokenizer, row length, teacher or a signal's settings, or if
    two parts share some, but not all, of their rows. StoreError if the bucket cannot be used.
    """
    _require_one_place(output, caches)
    folder = working_folder(output, writing=True)
    with by_address(folder):
        return _merge(output, folder, caches)


def _require_one_place(output: Path, caches: Sequence[Path]) -> None:
    """ValueError unless relative paths lead from `output` to each cache."""
    there = _bucket(output)
    for path in caches:
        if _bucket(path) != there:
            raise ValueError(
                f"{_shown(path)}: a merged cache refers to its caches by relative paths, so "
                f"{_shown(output)} must be {'in the bucket' if is_url(path) else 'on the machine'} "
                "where they all are. `decant copy` moves caches"
            )
        if place_of(path) == place_of(output):
            raise ValueError(
                f"{_shown(output)}: is one of the caches to merge; choose another output"
            )


def _bucket(path: Path) -> tuple[str, str]:
    return bucket_url(str(path))[:2] if is_url(path) else ("", "")


def _shown(path: Path) -> str:
    return url_of(path) or str(path)


def _merge(output: Path, folder: Path, caches: Sequence[Path]) -> Merged:
    """`folder` is `output`, or stands for it."""
    _replaced_id(folder)
    opened = [open_cache(path) for path in caches]
    for cache in opened:
        if not cache.manifest.signals:
            raise ValueError(
                f"{cache.address}: holds rows without a teacher's targets; leave it out"
            )
        if cache.mirror and not cache.manifest.by_content:
            raise ValueError(
                f"{cache.address}: a release before 0.12 copied this cache there. `decant copy` it "
                "again"
            )
        _require_alike(opened[0], cache)
    parts: list[Part] = []
    left_out: list[str] = []
    rows: dict[str, str] = {}
    for cache in opened:
        for part in cache.manifest.parts:
            place = place_of(cache.address, part.path)
            files = {unit.files[ROWS].sha256 for unit in part.units}
            known = files & rows.keys()
            if known == files:
                left_out.append(f"{place}, which has the rows of {rows[min(known)]}")
                continue
            if known:
                raise ValueError(
                    f"{place}: {len(known)} of its {len(files)} units have the rows of "
                    f"{rows[min(known)]}; students would see them twice. Leave one of the two out"
                )
            rows |= dict.fromkeys(files, str(place))
            parts.append(
                dataclasses.replace(
                    part,
                    path=os.path.relpath(place, place_of(output)),
                    plan_sha256=file_sha256(cache.plan_path(part)),
                )
            )
    lost = _lost_signals(opened)
    parts = [without_signals(part, lost.keys() & part.signals.keys()) for part in parts]
    first, tokenizer = opened[0].manifest, opened[0].tokenizer_files()
    manifest = Manifest(
        sequence_length=first.sequence_length,
        vocabulary_size=first.vocabulary_size,
        tokenizer=first.tokenizer,
        parts=tuple(parts),
        tokenizer_files=tokenizer_hashes(tokenizer),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with changing(folder):
        replaces = _replaced_id(folder)
        write_tokenizer_files(folder, tokenizer)
        manifest = write_manifest(folder, manifest, replaces=replaces)
    return Merged(manifest, tuple(left_out), lost)


def _lost_signals(caches: Sequence[Cache]) -> dict[str, str]:
    """Signals that not every cache has in the same form, each with the reason."""
    held = [cache.manifest.signals for cache in caches]
    lost: dict[str, str] = {}
    for name in sorted({name for signals in held for name in signals}):
        if missing := [
            c.address for c, signals in zip(caches, held, strict=True) if name not in signals
        ]:
            lost[name] = f"{missing[0]} does not hold it"
        elif len({_directions_sha256(cache, name) for cache in caches}) > 1:
            # Each calibration finds its own directions; no student can learn from two projections.
            lost[name] = "it was projected onto other directions in each"
    return lost


def _directions_sha256(cache: Cache, name: str) -> str | None:
    """sha256 of the directions of a projected signal; all parts of a cache have the same."""
    part = cache.manifest.parts[0]
    file = getattr(part.signals[name], "directions", None)
    return part.statistics[file] if file else None


def _replaced_id(output: Path) -> str | None:
    """cache_id of the manifest at `output`, if there is one.

    It may be replaced only if all its parts lie in other caches; otherwise ValueError.
    """
    if not exists(output / MANIFEST):
        if (output / PARTS).exists() or exists(part_layout(output, 0).request):
            raise ValueError(f"{output}: holds a capture that is not sealed; choose another output")
        return None
    present = read_manifest(output)
    if not all(part.in_other_cache for part in present.parts):
        raise ValueError(f"{output}: is a cache with parts of its own; choose another output")
    return present.cache_id


def _require_alike(first: Cache, other: Cache) -> None:
    differences = list(_differences(first, other))
    if differences:
        raise ValueError(
            f"{first.address} and {other.address} cannot be one cache:\n"
            + "\n".join(f"  {what}: {ours}, and {theirs}" for what, ours, theirs in differences)
        )


def _differences(first: Cache, other: Cache) -> Iterator[tuple[str, Any, Any]]:
    a, b = first.manifest, other.manifest
    if a.tokenizer != b.tokenizer:
        yield from _tokenizer_differences(tokenizer_of(first), tokenizer_of(other))
    for what, ours, theirs in (
        ("tokens a row", a.sequence_length, b.sequence_length),
        ("vocabulary", a.vocabulary_size, b.vocabulary_size),
    ):
        if ours != theirs:
            yield what, ours, theirs
    for name in a.signals.keys() & b.signals.keys():
        ours, theirs = (_settings(m, name) for m in (a, b))
        for field in sorted(ours.keys() | theirs.keys()):
            if ours.get(field) != theirs.get(field):
                yield f"{field} of {name}", ours.get(field), theirs.get(field)


def _tokenizer_differences(first: Tokenizer, other: Tokenizer) -> Iterator[tuple[str, Any, Any]]:
    if why := first.difference(other):
        yield f"tokenizer ({why})", first.digest[:12], other.digest[:12]
    for what, ours, theirs in (
        ("first id of a document", first.bos_id, other.bos_id),
        ("last id of a document", first.eos_id, other.eos_id),
    ):
        if ours != theirs:
            yield what, ours, theirs


def _settings(manifest: Manifest, name: str) -> dict[str, Any]:
    part = manifest.parts[0]
    signal: Signal = part.signals[name]
    settings = {k: v for k, v in dataclasses.asdict(signal).items() if k not in _OWN}
    settings["teacher_id"] = settings["teacher_id"][:12]
    return settings
