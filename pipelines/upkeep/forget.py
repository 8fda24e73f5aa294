"""Documents taken out of a sealed cache for good: listed in its manifest, never read again.

Nothing of them leaves `Cache.read` from then on. Their bytes stay until `gc` overwrites them.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from decant.schemas.manifest.manifest import (
    Forgotten,
    Manifest,
    Part,
    read_manifest,
    write_manifest,
)
from decant.schemas.reading.forgetting import ForgottenDocuments, is_wholly_forgotten
from decant.schemas.reading.units import read_unit_rows

_SHORTEST_SHA256 = 12
_NAMED = 5


@dataclass
class Forgot:
    """What was found of it, what had been forgotten before aside."""

    documents: set[int] = field(default_factory=set)
    tokens: int = 0
    rows: int = 0
    """Rows that hold some of it."""
    empty_rows: int = 0
    """Rows that hold nothing else, which `Cache.rows` leaves out."""


def forget(cache: Path, *, source: str, documents: Sequence[int] = ()) -> tuple[Manifest, Forgot]:
    """Seal the cache again without these documents of a source, or without all of it.

    `source` is its name as the manifest has it, or the beginning of its sha256; a document is the
    byte offset of its line in the file, or the number of records before it in a table. ValueError
    if the cache does not hold one of them.
    """
    manifest = read_manifest(cache)
    sha256 = _sha256_of(source, manifest, cache=cache)
    forgot, parts = Forgot(), []
    for part in manifest.parts:
        numbers = [n for n, s in enumerate(part.sources) if s.sha256 == sha256]
        if numbers and part.in_other_cache:
            home = (cache / part.path).resolve()
            raise ValueError(
                f"{cache}: {source} is in a part of another cache, {home}; forget it there, and "
                "every cache that refers to it forgets it too"
            )
        parts.append(_without(cache, part, numbers, documents, forgot) if numbers else part)
    if missing := sorted(set(documents) - forgot.documents):
        has = ", ".join(map(str, sorted(forgot.documents)[:_NAMED]))
        raise ValueError(
            f"{cache}: holds no document at {missing[0]} of {source}; `inspect --row` shows where "
            f"each begins{f' (found: {has})' if has else ''}. A copy of an earlier document was "
            "left out when it was captured: forget that one"
        )
    new = dataclasses.replace(manifest, parts=tuple(parts))
    if new == manifest:
        return manifest, forgot
    return write_manifest(cache, new, replaces=manifest.cache_id), forgot


def _sha256_of(source: str, manifest: Manifest, *, cache: Path) -> str:
    sources = [found for part in manifest.parts for found in part.sources]
    named = {found.sha256 for found in sources if found.name == source}
    if not named and len(source) >= _SHORTEST_SHA256:
        named = {found.sha256 for found in sources if found.sha256.startswith(source)}
    if len(named) == 1:
        return named.pop()
    if named:
        raise ValueError(
            f"{cache}: {len(named)} sources are called {source}; name one by its sha256: "
            + ", ".join(sorted(named))
        )
    near = difflib.get_close_matches(source, sorted({found.name for found in sources}), n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {len(sources)}, see its manifest.json"
    raise ValueError(f"{cache}: no source is called {source}; {hint}")


def _without(
    cache: Path, part: Part, numbers: Sequence[int], documents: Sequence[int], forgot: Forgot
) -> Part:
    """The part with these documents of the sources `numbers` forgotten; adds to `forgot`."""
    wanted: list[int | None] = [*documents] or [None]
    before = ForgottenDocuments(part)
    new = {Forgotten(number, document) for number in numbers for document in wanted}
    now = dataclasses.replace(part, forgotten=tuple(sorted({*part.forgotten, *new}, key=_order)))
    forgetting, empty = ForgottenDocuments(now), set(part.forgotten_rows)
    for number, unit in part.numbered_units:
        for offset, row in enumerate(read_unit_rows(cache / part.path, number, unit)):
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
