"""Assigns the corpus's files to the cache's part directories; new files make a new directory.

A directory keeps the files that it was begun with. If one of them has changed or is missing,
`PartCapture.claim` refuses to go on: the cache still holds rows of the old file. But a file that
the cache has wholly forgotten may be missing, and one of the same name is new.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from decant.pipelines.rows.sources import SourceFile
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.layout import MANIFEST, PartLayout, part_layout
from decant.schemas.disk.stand_in import exists
from decant.schemas.manifest.manifest import Manifest, read_manifest
from decant.schemas.manifest.request import claimed_sources


@dataclass(frozen=True)
class PartDirectory:
    """One directory `parts/NNNN` and the files that its rows are made from.

    It holds one part, or several if it was sealed in steps (`--seal-partial`).
    """

    number: int
    layout: PartLayout
    sources: tuple[SourceFile, ...]
    older: tuple[SourceFile, ...]
    """Files of the directories before this one."""
    begun: bool
    """Whether an earlier run has claimed the directory."""
    complete: bool
    """Whether all of its planned units are sealed."""


def sealed_manifest(cache: Path) -> Manifest | None:
    """The cache's manifest, or None if it is not sealed.

    ValueError if it refers to parts of other caches, as a merged cache does: those are captured in
    their own cache.
    """
    if not exists(cache / MANIFEST):
        return None
    manifest = read_manifest(cache)
    for part in manifest.parts:
        if part.in_other_cache:
            raise ValueError(
                f"{cache}: refers to {(cache / part.path).resolve()}, a part of another cache. "
                "Capture into that cache, then merge again"
            )
    return manifest


Key = tuple[str, str]
"""Name and sha256 of a file."""


def changed_files(
    cache: Path, manifest: Manifest | None, sources: Sequence[SourceFile]
) -> list[Key]:
    """The files that completely sealed directories hold, of which `sources` have another version.

    Those that are forgotten already are left out.
    """
    changed: list[Key] = []
    forgotten, left, number = forgotten_files(manifest), list(sources), 0
    while exists((layout := part_layout(cache, number)).request):
        bound = _bound_files(layout, cache, manifest) or []
        own, left = _split_by_owner(bound, left, forgotten)
        if is_complete(layout, cache, manifest):
            there = {source.name: source.sha256 for source in own}
            changed += [(n, sha) for n, sha in bound if there.get(n, sha) != sha]
        number += 1
    return [key for key in changed if key not in forgotten]


def forgotten_files(manifest: Manifest | None) -> set[Key]:
    """The files of which the cache has forgotten every document."""
    return {
        (part.sources[place.source].name, part.sources[place.source].sha256)
        for part in (manifest.parts if manifest else ())
        for place in part.forgotten
        if place.document is None
    }


def assign_files(
    cache: Path,
    manifest: Manifest | None,
    sources: Sequence[SourceFile],
    *,
    replaced: Collection[Key] = (),
) -> tuple[PartDirectory, ...]:
    """The cache's part directories in order, each with its files among `sources`.

    Files that belong to no directory make a new one at the end. A directory of which files have
    changed or are missing gets the files that are left; `PartCapture.claim` then names the others.
    Files that are forgotten, or `replaced`, are described as they were.
    """
    forgotten = forgotten_files(manifest) | set(replaced)
    left = list(sources)
    directories: list[PartDirectory] = []
    number = 0
    while exists((layout := part_layout(cache, number)).request) or (number == 0 or left):
        bound = _bound_files(layout, cache, manifest)
        own, rest = (left, []) if bound is None else _split_by_owner(bound, left, forgotten)
        if bound is not None and is_complete(layout, cache, manifest):
            own = _with_forgotten(bound, own, forgotten, sources, layout)
        older = tuple(
            source
            for directory in directories
            for source in directory.sources
            if not source.forgotten
        )
        directories.append(
            PartDirectory(
                number,
                layout,
                tuple(own),
                older,
                begun=exists(layout.request),
                complete=is_complete(layout, cache, manifest),
            )
        )
        left, number = rest, number + 1
    return tuple(directories)


def _bound_files(
    layout: PartLayout, cache: Path, manifest: Manifest | None
) -> list[tuple[str, str]] | None:
    """(name, sha256) of the files that the directory was begun with.

    None if it is new, or was begun by a release that did not record them.
    """
    for part in manifest.parts if manifest else ():
        if cache / part.path == layout.root:
            return [(source.name, source.sha256) for source in part.sources]
    return claimed_sources(read_json(layout.request)) if exists(layout.request) else None


def _split_by_owner(
    bound: Sequence[Key], sources: Sequence[SourceFile], forgotten: Collection[Key]
) -> tuple[list[SourceFile], list[SourceFile]]:
    """The sources that `bound` names, in the order of `bound`, and all others.

    A file that has changed counts as bound by its name, unless it is forgotten; a missing file is
    left out.
    """
    exact: dict[Key, list[SourceFile]] = defaultdict(list)
    by_name: dict[str, list[SourceFile]] = defaultdict(list)
    for source in sources:
        exact[source.name, source.sha256].append(source)
    own = [exact[key].pop(0) if exact[key] else None for key in bound]
    for source in itertools.chain.from_iterable(exact.values()):
        by_name[source.name].append(source)
    for at, key in enumerate(bound):
        if own[at] is None and by_name[key[0]] and key not in forgotten:
            own[at] = by_name[key[0]].pop(0)
    present = [source for source in own if source]
    chosen = {id(source) for source in present}
    return present, [source for source in sources if id(source) not in chosen]


def _with_forgotten(
    bound: Sequence[Key],
    own: Sequence[SourceFile],
    forgotten: Collection[Key],
    sources: Sequence[SourceFile],
    layout: PartLayout,
) -> list[SourceFile]:
    """`own` with a description of each forgotten file that is no longer there, for the rows_id.

    Only the size of all files together is known, from the request; defaults depend on no other.
    """
    there = {(source.name, source.sha256): source for source in own}
    same_name = {source.name: source for source in reversed(sources)}
    described = re.search(r"([\d,]+) bytes", str(read_json(layout.request).get("corpus")))
    missing = int(described[1].replace(",", "")) if described else 0
    missing -= sum(source.bytes for source in own)
    files: list[SourceFile] = []
    for key in bound:
        if key in there:
            files.append(there[key])
        elif key in forgotten:
            like = same_name.get(key[0], SourceFile(key[0], key[0], 0, ""))
            files.append(
                dataclasses.replace(like, sha256=key[1], bytes=max(missing, 0), forgotten=True)
            )
            missing = 0
    known = set(bound)
    return files + [source for source in own if (source.name, source.sha256) not in known]


def is_complete(layout: PartLayout, cache: Path, manifest: Manifest | None) -> bool:
    """Whether all planned units of the directory are sealed."""
    parts = [p for p in manifest.parts if cache / p.path == layout.root] if manifest else []
    planned = [part.planned_units or len(part.units) for part in parts]
    return bool(parts) and sum(len(part.units) for part in parts) == planned[0]
