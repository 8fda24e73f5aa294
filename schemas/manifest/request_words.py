"""The settings of a request as users write them, for the error if two requests differ."""

import json
from collections.abc import Mapping
from typing import Any

from decant.schemas.disk.identity import canonical_json
from decant.schemas.disk.layout import COUNTS, LOGITS, SKETCH

Changes = Mapping[str, tuple[Any, Any]]
"""By setting: the value there, and the value asked for. None: unset, or without effect."""
_TABLE = "signals.logits"
_OLD_DEFAULTS = {f"{_TABLE}.k": 32, f"{_TABLE}.draws": 16}
"""Before release 0.11."""
_DETAILS = [f"{_TABLE}.{name}" for name in ("draw_temperatures", "sketch.step", "sketch.dither")]
"""None where there are no draws, or no sketch: then that is the difference."""


def changes(there: Mapping[str, Any], asked: Mapping[str, Any]) -> Changes:
    """The settings of the request `asked` that have another value in the request `there`."""
    before = _as_settings({name: there.get(name) for name in asked})
    both = {name: (before.get(name), value) for name, value in _as_settings(asked).items()}
    return {
        name: pair
        for name, pair in both.items()
        # Compared as JSON, because the file holds lists where `asked` has tuples.
        if canonical_json(pair[0]) != canonical_json(pair[1])
        and not (name in _DETAILS and None in pair)
    }


def how_to_keep(changes: Changes) -> str:
    """How to ask for what is there; empty if not all `changes` are settings of the logits."""
    kept = {name: there for name, (there, _) in changes.items()}
    if not all(name.startswith(_TABLE) and value is not None for name, value in kept.items()):
        return ""
    flags = " ".join(f"--{n.replace('_', '-')} {_words(value)}" for n, value in kept.items())
    lines = " and ".join(f"{n[len(_TABLE) + 1 :]} = {json.dumps(v)}" for n, v in kept.items())
    were = "These were the defaults before 0.11. " if kept == _OLD_DEFAULTS else ""
    return (
        f"{were}To go on with what is there, add {flags}, or {lines} below [{_TABLE}] of the "
        "config file. For a new capture choose another output."
    )


def _as_settings(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request with its values for `signals.logits` one by one, named as in a config file."""
    settings: dict[str, Any] = {}
    for name, value in request.items():
        if name in _NAMED:
            settings |= {f"{_TABLE}.{key}": one for key, one in _NAMED[name](value).items()}
        else:
            settings[name] = value
    return settings


def _logits(value: Mapping[str, Any] | None) -> dict[str, Any]:
    value = value or {}
    betas = value.get("draw_betas")
    return {
        "k": value.get("k"),
        "profile": value.get("profile"),
        "betas": value.get("betas"),
        "mass": value.get("mass"),
        "draws": value.get("draws", 0),
        "draw_temperatures": betas and sorted(round(1 / beta, 4) for beta in betas),
    }


def _sketch(value: Mapping[str, Any] | None) -> dict[str, Any]:
    value = value or {"rank": 0}
    return {f"sketch.{name}": value.get(name) for name in ("rank", "step", "dither")}


_NAMED = {LOGITS: _logits, COUNTS: lambda value: {"counts": value or 0}, SKETCH: _sketch}


def _words(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join(json.dumps(one).strip('"') for one in values)
