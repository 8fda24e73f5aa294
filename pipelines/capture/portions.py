"""Which of a corpus's files a cache has, directory by directory, and which make its next part.

A directory keeps the files that it was begun with; files that are in none make the next one. Files
that have changed or are gone are an error: what was captured from them is still in the cache.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from decant.pipelines.rows.sources import SourceFile
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.layout import MANIFEST, PartLayout, part_layout
from decant.schemas.manifest.manifest import Manifest, read_manifest
from decant.schemas.manifest.request import claimed_sources


@dataclass(frozen=True)
class Portion:
    """The files that one directory of parts is made from."""

    number: int
    layout: PartLayout
    sources: tuple[SourceFile, ...]
    older: tuple[SourceFile, ...]
    """Those of the directories before it."""
    begun: bool
    """Whether an earlier run has claimed the directory."""
    complete: bool
    """Whether all of it is sealed."""


def sealed_manifest(cache: Path) -> Manifest | None:
    """The manifest if there is one. ValueError if the cache's parts lie in other caches."""
    if not (cache / MANIFEST).exists():
        return None
    manifest = read_manifest(cache)
    for part in manifest.parts:
        if part.in_other_cache:
            raise ValueError(
                f"{cache}: refers to {(cache / part.path).resolve()}, a part of another cache. "
                "Capture into that cache, then merge again"
            )
    return manifest


def divide(
    cache: Path, manifest: Manifest | None, found: Sequence[SourceFile]
) -> tuple[Portion, ...]:
    """The directories that there are, in order, each with its files among `found`; and behind them
    a new one for files that are in none.

    A directory whose files have changed or are missing gets those that there are: `claim` then
    refuses it and names them.
    """
    left = list(found)
    portions: list[Portion] = []
    number = 0
    while (layout := part_layout(cache, number)).request.exists() or (number == 0 or left):
        bound = _bound(layout, cache, manifest)
        taken, rest = (left, []) if bound is None else _take(bound, left)
        older = tuple(source for portion in portions for source in portion.sources)
        portions.append(
            Portion(
                number,
                layout,
                tuple(taken),
                older,
                begun=layout.request.exists(),
                complete=_complete(layout, cache, manifest),
            )
        )
        left, number = rest, number + 1
    return tuple(portions)


def _bound(
    layout: PartLayout, cache: Path, manifest: Manifest | None
) -> list[tuple[str, str]] | None:
    """(name, sha256) of the files that the directory was begun with; None if nobody knows."""
    for part in manifest.parts if manifest else ():
        if cache / part.path == layout.root:
            return [(source.name, source.sha256) for source in part.sources]
    return claimed_sources(read_json(layout.request)) if layout.request.exists() else None


def _take(
    bound: Sequence[tuple[str, str]], found: Sequence[SourceFile]
) -> tuple[list[SourceFile], list[SourceFile]]:
    """Those of `found` that are `bound`, in their order, and the others. One that has changed is
    taken as it is now, one that is gone left out."""
    exact: dict[tuple[str, str], list[SourceFile]] = defaultdict(list)
    named: dict[str, list[SourceFile]] = defaultdict(list)
    for source in found:
        exact[source.name, source.sha256].append(source)
    taken = [exact[key].pop(0) if exact[key] else None for key in bound]
    for source in itertools.chain.from_iterable(exact.values()):
        named[source.name].append(source)
    for at, (name, _) in enumerate(bound):
        if taken[at] is None and named[name]:
            taken[at] = named[name].pop(0)
    there = [source for source in taken if source]
    chosen = {id(source) for source in there}
    return there, [source for source in found if id(source) not in chosen]


def _complete(layout: PartLayout, cache: Path, manifest: Manifest | None) -> bool:
    parts = [p for p in manifest.parts if cache / p.path == layout.root] if manifest else []
    planned = [part.planned_units or len(part.units) for part in parts]
    return bool(parts) and sum(len(part.units) for part in parts) == planned[0]
