"""`request.json`: the settings that claim a part's directory, written before any other file.

A directory belongs to one request. Another request is refused, and the error names the differences.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.stand_in import exists
from decant.schemas.manifest.manifest import Source
from decant.schemas.manifest.request_words import Changes, changes, how_to_keep

_SOURCES = "sources"
_SETTINGS = "settings"
_REMOTE = "remote"
_NAMED = 5
"""Files that an error lists by name."""


class Remote(NamedTuple):
    """What a capture keeps about sources at addresses. It decides nothing."""

    revisions: Mapping[str, str] = {}
    """The commit of each dataset of the hub, by its address in the settings."""
    digests: Mapping[str, str] = {}
    """sha256 of files, by address, version and size."""

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return bool(self.revisions or self.digests)


def claim(
    path: Path,
    request: Mapping[str, Any],
    *,
    sources: Collection[Source],
    settings: Mapping[str, Any],
    cache: Path,
    remote: Remote | None = None,
) -> None:
    """Write `request`, its `sources` and `settings` to `path`, or check that `path` holds the same
    request.

    `settings` are the single values behind the request's ids, by name; they are kept for the error
    and decide nothing. `remote` is kept for later runs. `cache` names the directory in errors.
    ValueError if `path` holds another request; it names both values of every setting that differs,
    and the sources that changed.
    """
    if not exists(path):
        named = [[source.name, source.sha256] for source in sources]
        written = {**request, _SOURCES: named, _SETTINGS: dict(settings)}
        if remote:
            written[_REMOTE] = {name: dict(value) for name, value in remote._asdict().items()}
        write_json(path, written, first=True)
    bound = read_json(path)
    if changed := changes(bound, request):
        source_changes = _source_changes(bound.get(_SOURCES), sources)
        keep = how_to_keep(changed)
        different = _lines(changed)
        if not keep:
            different += _setting_changes(bound.get(_SETTINGS), settings)
        remedy = keep or "Choose another output, or ask for what it holds."
        if source_changes:
            remedy = (
                "Bring its files back as they were (new ones beside them make a new part), or "
                "choose another output. In a sealed cache --replace-changed forgets changed files "
                "and captures them again."
            )
        raise ValueError(
            f"{cache}: this directory holds another capture\n"
            + "\n".join([*different, *source_changes])
            + f"\n{remedy}"
        )


def claimed_remote(request: Mapping[str, Any]) -> Remote:
    """What a request keeps about sources at addresses; nothing if there are none."""
    return Remote(**request.get(_REMOTE, {}))


def claimed_sources(request: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """(name, sha256) of a request's sources; None if release 0.3 or older wrote the request."""
    named = request.get(_SOURCES)
    return None if named is None else [(name, sha256) for name, sha256 in named]


def _lines(changed: Changes) -> list[str]:
    return [
        f"  {name}: there {_brief(there)}, asked for {_brief(asked)}"
        for name, (there, asked) in changed.items()
    ]


def _setting_changes(bound: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> list[str]:
    """A line for each setting behind the ids that differs; `bound` is None before release 0.9."""
    if bound is not None:
        return _lines(changes(bound, settings))
    return [
        "  it was begun before release 0.9 and kept only its ids. What differs is one of "
        f"{', '.join(settings)}"
    ]


def _source_changes(bound: list[list[str]] | None, sources: Collection[Source]) -> list[str]:
    """A line that lists changed sources; none if `bound` is of release 0.3 or older."""
    then = {tuple(source) for source in bound or ()}
    now = {(source.name, source.sha256) for source in sources}
    gone, new = ({name for name, _ in pairs} for pairs in (then - now, now - then))
    changes = [f"{name} has changed" for name in sorted(gone & new)]
    changes += [f"{name} is missing" for name in sorted(gone - new)]
    changes += [f"{name} is new" for name in sorted(new - gone)]
    if not then or not changes:
        return []
    more = f", and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
    return [f"  files: {', '.join(changes[:_NAMED])}{more}"]


def _brief(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"
