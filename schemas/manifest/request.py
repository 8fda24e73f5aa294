"""`request.json`: the settings that a part's directory was claimed for, written before all else.

A directory belongs to one request. Another request is refused with the differences named.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.identity import canonical_json
from decant.schemas.manifest.manifest import Source

_SOURCES = "sources"
_NAMED = 5
"""Files that an error lists by name."""


def claim(
    path: Path, request: Mapping[str, Any], *, sources: Collection[Source], cache: Path
) -> None:
    """Bind the directory to `request` by writing it, or check that it is bound to the same.

    ValueError that names both sides of every difference, and the `sources` that are not what they
    were, when it belongs to another.
    """
    if not path.exists():
        named = [[source.name, source.sha256] for source in sources]
        write_json(path, {**request, _SOURCES: named})
        return
    bound = read_json(path)
    different = [
        f"  {name}: there {_brief(bound.get(name))}, asked for {_brief(value)}"
        for name, value in request.items()
        # As JSON, which has no tuples.
        if canonical_json(bound.get(name)) != canonical_json(value)
    ]
    if different:
        changes = _changes(bound.get(_SOURCES), sources)
        remedy = "Choose another output, or ask for what it holds."
        if changes:
            remedy = "Bring its files back as they were (new ones beside them make a new part), or "
            remedy += "choose another output."
        raise ValueError(
            f"{cache}: this directory holds another capture\n"
            + "\n".join([*different, *changes])
            + f"\n{remedy}"
        )


def claimed_sources(request: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """(name, sha256) of the files that a request names; releases until 0.3 did not write them."""
    named = request.get(_SOURCES)
    return None if named is None else [(name, sha256) for name, sha256 in named]


def _changes(bound: list[list[str]] | None, sources: Collection[Source]) -> list[str]:
    """A line of the files that are others; releases until 0.3 did not write down which they had."""
    then = {tuple(source) for source in bound or ()}
    now = {(source.name, source.sha256) for source in sources}
    gone, new = ({name for name, _ in some} for some in (then - now, now - then))
    found = [f"{name} has changed" for name in sorted(gone & new)]
    found += [f"{name} is missing" for name in sorted(gone - new)]
    found += [f"{name} is new" for name in sorted(new - gone)]
    if not then or not found:
        return []
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return [f"  files: {', '.join(found[:_NAMED])}{more}"]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"
