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
from decant.schemas.disk.atomic import write_bytes
from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import MANIFEST, ROWS, TOKENIZER, PartLayout
from decant.schemas.disk.locks import changing
from decant.schemas.manifest.manifest import Manifest, Part, read_manifest, write_manifest
from decant.schemas.manifest.tokenizer_files import tokenizer_hashes
from decant.schemas.signals import Signal

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

    ValueError that names both sides if the caches differ in tokenizer, row length, teacher or a
    signal's settings, or if two parts share some, but not all, of their rows.
    """
    _replaced_id(output, caches)
    opened = [open_cache(path) for path in caches]
    for cache in opened:
        if not cache.manifest.signals:
            raise ValueError(f"{cache.path}: holds rows without a teacher's targets; leave it out")
        _require_alike(opened[0], cache)
    parts: list[Part] = []
    left_out: list[str] = []
    rows: dict[str, str] = {}
    for cache in opened:
        for part in cache.manifest.parts:
            place = (cache.path / part.path).resolve()
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
                    path=os.path.relpath(place, output.resolve()),
                    plan_sha256=file_sha256(PartLayout(place).plan),
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
    output.mkdir(parents=True, exist_ok=True)
    with changing(output):
        replaces = _replaced_id(output, caches)
        for name, data in tokenizer.items():
            write_bytes(output / TOKENIZER / name, data, within=output)
        manifest = write_manifest(output, manifest, replaces=replaces)
    return Merged(manifest, tuple(left_out), lost)


def _lost_signals(caches: Sequence[Cache]) -> dict[str, str]:
    """Signals that not every cache has in the same form, each with the reason."""
    held = [cache.manifest.signals for cache in caches]
    lost: dict[str, str] = {}
    for name in sorted({name for signals in held for name in signals}):
        if missing := [
            c.path for c, signals in zip(caches, held, strict=True) if name not in signals
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


def _replaced_id(output: Path, caches: Sequence[Path]) -> str | None:
    """cache_id of the manifest at `output`, if there is one.

    It may be replaced only if all its parts lie in other caches; otherwise ValueError.
    """
    if any(output.resolve() == path.resolve() for path in caches):
        raise ValueError(f"{output}: is one of the caches to merge; choose another output")
    if not (output / MANIFEST).exists():
        if (output / "parts").exists():
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
            f"{first.path} and {other.path} cannot be one cache:\n"
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
