"""`forget`: lists documents in a sealed cache's manifest, so that no reader returns them again.

Their bytes stay on disk until `gc` overwrites them (`overwrite.py`).
"""

import bisect
import dataclasses
import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from decant.schemas.disk.stand_in import address_of
from decant.schemas.manifest.manifest import (
    Forgotten,
    Manifest,
    Part,
    Source,
    changing_manifest,
    until_agreed,
    write_manifest,
)
from decant.schemas.reading.forgetting import ForgottenDocuments, is_wholly_forgotten
from decant.schemas.reading.merged_parts import place_of
from decant.schemas.reading.units import read_unit_rows

_SHORTEST_SHA256 = 12
"""Characters of a sha256 that are enough to name a source."""
_COMPARED = 100
"""Names before and after a misspelt one, in alphabetic order, that it is compared with."""
_NAMED = 5
"""Documents that an error names."""


@dataclass
class Forgot:
    """What one `forget` found; everything but `documents` leaves out what was forgotten before."""

    documents: set[int] = field(default_factory=set)
    tokens: int = 0
    rows: int = 0
    """Rows that hold tokens of these documents."""
    empty_rows: int = 0
    """Rows that hold only forgotten documents; `Cache.rows` leaves them out."""


def forget(cache: Path, *, source: str, documents: Sequence[int] = ()) -> tuple[Manifest, Forgot]:
    """Replace the manifest by one that forgets documents of a source, or the whole source.

    `source` is the file's name in the manifest, or the first characters of its sha256. A document
    is given by the byte offset of its line, or by its number from 0 in a table; without `documents`
    the whole source is forgotten. Returns the new manifest and what was found. ValueError if the
    cache does not hold the source or a document.
    """

    def change() -> tuple[Manifest, Forgot]:
        with changing_manifest(cache) as manifest:
            sha256 = _sha256_of(source, manifest, cache=cache)
            files = {one for part in manifest.parts for one in part.sources if one.sha256 == sha256}
            return _forget(cache, manifest, files, source, documents)

    return until_agreed(cache, change)


def forget_files(cache: Path, files: Collection[Source]) -> tuple[Manifest, Forgot]:
    """As `forget` of each of these files, wholly, but in one pass over the rows."""

    def change() -> tuple[Manifest, Forgot]:
        with changing_manifest(cache) as manifest:
            return _forget(cache, manifest, set(files), f"one of {len(files):,} files", ())

    return until_agreed(cache, change)


def _forget(
    cache: Path,
    manifest: Manifest,
    files: Collection[Source],
    called: str,
    documents: Sequence[int],
) -> tuple[Manifest, Forgot]:
    forgot, parts, length = Forgot(), [], manifest.sequence_length
    for part in manifest.parts:
        numbers = [n for n, one in enumerate(part.sources) if one in files]
        if numbers and part.in_other_cache:
            home = place_of(address_of(cache), part.path)
            raise ValueError(
                f"{cache}: {called} is in a part of another cache, {home}; forget it there, and "
                "every cache that refers to it forgets it too"
            )
        if numbers:
            part = _forget_in(cache, part, numbers, documents, forgot, length=length)
        parts.append(part)
    if missing := sorted(set(documents) - forgot.documents):
        present = ", ".join(map(str, sorted(forgot.documents)[:_NAMED]))
        raise ValueError(
            f"{cache}: holds no document at {missing[0]} of {called}; `inspect --row` shows where "
            f"each begins{f' (found: {present})' if present else ''}. If this document is a copy "
            "of an earlier one, it was not captured: forget the earlier one"
        )
    new = dataclasses.replace(manifest, parts=tuple(parts))
    if new == manifest:
        return manifest, forgot
    return write_manifest(cache, new, replaces=manifest.cache_id), forgot


def _sha256_of(source: str, manifest: Manifest, *, cache: Path) -> str:
    sources = [one for part in manifest.parts for one in part.sources]
    matches = {one.sha256 for one in sources if one.name == source}
    if not matches and len(source) >= _SHORTEST_SHA256:
        matches = {one.sha256 for one in sources if one.sha256.startswith(source)}
    if len(matches) == 1:
        return matches.pop()
    if matches:
        raise ValueError(
            f"{cache}: {len(matches)} sources are called {source}; name one by its sha256: "
            + ", ".join(sorted(matches))
        )
    near = difflib.get_close_matches(source, _neighbours(source, {s.name for s in sources}), n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {len(sources)}, see its manifest.json"
    raise ValueError(f"{cache}: no source is called {source}; {hint}")


def _neighbours(name: str, names: Collection[str]) -> set[str]:
    """The names that begin, or end, most like `name`: difflib needs minutes for a million names."""
    forwards, backwards = sorted(names), sorted(one[::-1] for one in names)
    at, end = bisect.bisect(forwards, name), bisect.bisect(backwards, name[::-1])
    before, after = max(0, at - _COMPARED), max(0, end - _COMPARED)
    alike = {one[::-1] for one in backwards[after : end + _COMPARED]}
    return alike | set(forwards[before : at + _COMPARED])


def _forget_in(
    cache: Path,
    part: Part,
    numbers: Sequence[int],
    documents: Sequence[int],
    forgot: Forgot,
    *,
    length: int,
) -> Part:
    """The part with these documents of the sources numbered `numbers` forgotten.

    Adds to `forgot`. No documents means the whole sources. Rows have `length` positions.
    """
    places: list[int | None] = [*documents] or [None]
    before = ForgottenDocuments(part)
    new = {Forgotten(number, document) for number in numbers for document in places}
    now = dataclasses.replace(part, forgotten=tuple(sorted({*part.forgotten, *new}, key=_order)))
    forgetting, empty = ForgottenDocuments(now), set(part.forgotten_rows)
    for number, unit in part.numbered_units:
        for offset, row in enumerate(
            read_unit_rows(cache / part.path, number, unit, length=length)
        ):
            gone = forgetting.segments(row.origins)
            ours = gone & np.isin(row.origins[:, 0], numbers)
            if not ours.any():
                continue
            forgot.documents |= set(row.origins[ours, 1].tolist())
            positions, known = forgetting.positions(row), before.positions(row)
            if known.sum() == positions.sum():
                continue
            forgot.tokens += int(positions.sum() - known.sum())
            forgot.rows += 1
            if is_wholly_forgotten(row, positions):
                forgot.empty_rows += 1
                empty.add((number, offset))
    return dataclasses.replace(now, forgotten_rows=tuple(sorted(empty)))


def _order(place: Forgotten) -> tuple[int, int]:
    return place.source, -1 if place.document is None else place.document
