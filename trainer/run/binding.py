"""What a run's directory is bound to: `run.json`.

It says which rows, signals, student, settings and code the run belongs to; everything else in the
directory (initial student, checkpoints, metrics) means nothing without it. Every checkpoint has a
copy. What changed on the way, because `--allow` named it, is written down too.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from decant.schemas import Cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.config import Train
from decant.trainer.run.code_version import code_version

BINDING = "run.json"
_CHANGES = "changes"
# Where and how often, not what: these may change when a run goes on.
FREE = (
    "cache",
    "run",
    "mesh",
    "distributed",
    "remat",
    "compilation_cache",
    "allow",
    "checkpoint_every",
    "keep",
    "evaluate_every",
    "heldout_rows",
    "log_every",
    "max_bad_steps",
    "quiet",
    "json",
)
_NEVER = {
    r"student\.(?!source$).*": "the student is what the run began with",
    r"optimiser\.(name|freeze)": "the moments that were saved are of another shape",
}
"""What cannot be allowed, and why."""
_CHUNK = "loss.chunk_tokens"
"""As free as the mesh; runs of 0.5 and before were bound to it."""
_PROJECTED = re.compile(r"(loss\.hidden\[\d+\])\.(projection|student_layers|teacher_layers)")
_TABLES = ("loss.hidden", "loss.attention", "data.caches")
"""Settings that are lists of tables."""
_CODE_BEFORE = "0.4.0 or older"
"""What runs were made by that did not write down their code."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a run is bound to, and by which names it may differ from what a checkpoint says."""

    values: dict[str, Any]
    allow: tuple[str, ...] = ()

    def allows(self, name: str) -> bool:
        """Whether this may be another than it was."""
        return any(_stands_for(given, name) for given in self.allow)

    def require_same(self, saved: Mapping[str, Any] | None, *, where: str) -> None:
        """ValueError if a checkpoint's copy says otherwise; None is of a release without one."""
        if saved is not None:
            _refuse(self, _completed(saved, self.values), where=where)


def bind(
    config: Train,
    *,
    cache: Cache,
    others: Sequence[Cache] = (),
    steps: int,
    signals: Sequence[str] = (),
    after: int = 0,
) -> Bound:
    """Tie the run's directory to its data and settings, or check that it is tied to these.

    `others` are `config.data.caches`, `signals` what is read beside `logits`, `after` the step of
    the run's newest checkpoint. What `config.allow` names may differ, and is bound anew.

    Raises ValueError that lists what differs.
    """
    now = binding(config, cache=cache, others=others, steps=steps, signals=signals)
    _require_names(config.allow, known=now)
    path = config.run / BINDING
    if not path.exists():
        write_json(path, now)
        return Bound(now)
    was, changes = _completed(read_run_settings(config.run), now), read_run_changes(config.run)
    if differing := _differing(was, now):
        _refuse(Bound(now, config.allow), was, where=str(config.run))
        changes += [
            {"after": after, "name": name, "was": was.get(name), "now": now.get(name)}
            for name in differing
        ]
        write_json(path, {**now, _CHANGES: changes})
    # A kill may have come between the change and the first checkpoint that knows of it.
    return Bound(now, (*config.allow, *(change["name"] for change in changes)))


def cache_at_start(cache: Cache, *, run: Path) -> Cache:
    """The cache with the parts that the run began with: those that it has gained since are other
    rows. Unchanged if there is no such run or the cache does not begin with its rows."""
    if not (run / BINDING).exists():
        return cache
    began_with, parts = read_run_settings(run).get("rows_id"), cache.manifest.parts
    for count in range(1, len(parts)):
        first = dataclasses.replace(cache.manifest, parts=parts[:count])
        if first.rows_id == began_with:
            return Cache(cache.path, first)
    return cache


def read_run_settings(run: Path) -> dict[str, Any]:
    """What a run is bound to: its settings and its data."""
    return {name: value for name, value in read_json(run / BINDING).items() if name != _CHANGES}


def read_run_changes(run: Path) -> list[dict[str, Any]]:
    """What was changed by `--allow` while the run went on: `after` which update, `name`, `was`,
    `now`."""
    return read_json(run / BINDING).get(_CHANGES, [])


def with_saved_layers(config: Train) -> Train:
    """The settings in which terms without layers have those that the run began with."""
    if not (config.run / BINDING).exists():
        return config
    saved = read_run_settings(config.run)

    def of(name: str) -> Any:
        term = config.loss.terms[name]
        if term.teacher_layers:
            return term
        fields = ("student_layers", "teacher_layers")
        layers = {field: tuple(saved.get(f"loss.{name}.{field}", ())) for field in fields}
        return dataclasses.replace(term, **layers)

    loss = dataclasses.replace(
        config.loss,
        hidden=tuple(of(f"hidden[{i}]") for i in range(len(config.loss.hidden))),
        attention=tuple(of(f"attention[{i}]") for i in range(len(config.loss.attention))),
    )
    return dataclasses.replace(config, loss=loss)


def binding(
    config: Train,
    *,
    cache: Cache,
    others: Sequence[Cache] = (),
    steps: int,
    signals: Sequence[str] = (),
) -> dict[str, Any]:
    """What must stay the same for a run to go on, flat: `loss.alpha`, `signal_id logits`, …

    Of a cache the rows and the signals that training reads: adding another strands nobody.
    """
    settings = dataclasses.asdict(config)
    for name in FREE:
        del settings[name]
    for number, other in enumerate(others):
        mixed = settings["data"]["caches"][number]
        del mixed["path"]  # Where it lies is free, what it holds is not.
        mixed |= _read_of(other, signals)
    flat = dict(_flatten(settings)) | _read_of(cache, signals)
    del flat[_CHUNK]
    return json.loads(json.dumps({**flat, "steps": steps, "code": code_version()}, default=str))


def _read_of(cache: Cache, signals: Sequence[str]) -> dict[str, str]:
    """The rows and signals that are read of a cache."""
    held = cache.manifest.signals
    read = {
        f"signal_id {name}": held[name].signal_id for name in ("logits", *signals) if name in held
    }
    if forgotten := cache.manifest.forgotten_id:
        # Nor may a run go on that has learned from what must be forgotten.
        read["forgotten"] = forgotten
    return {"rows_id": cache.manifest.rows_id, **read}


def _completed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was bound to, with what its release did not have: defaults do what was done."""
    defaults = json.loads(json.dumps(dict(_flatten(dataclasses.asdict(Train()))), default=str))
    missing = {name: value for name, value in defaults.items() if name in now}
    known = {name: value for name, value in saved.items() if name != _CHUNK}
    return {**missing, "code": _CODE_BEFORE, **known}


def _differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def _refuse(bound: Bound, was: Mapping[str, Any], *, where: str) -> None:
    """ValueError if something differs that was not allowed to, or cannot be."""
    now = bound.values
    never = {name: why for name in _differing(was, now) if (why := _never(name, was, now))}
    refused = [name for name in _differing(was, now) if name in never or not bound.allows(name)]
    if not refused:
        return
    lines = [
        f"  {name}: this run has {was.get(name)!r}, asked for {now.get(name)!r}"
        + (f" (never allowed: {never[name]})" if name in never else "")
        for name in refused
    ]
    names = " ".join(sorted({_allowed_by(name) for name in refused}))
    regardless = "" if never else f", go on regardless with --allow {names}"
    raise ValueError(
        f"{where}: this run was started with other data or settings and cannot go on with these:\n"
        + "\n".join(lines)
        + f"\nRestore them{regardless}, or start anew with another --run directory"
    )


def _never(name: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why this difference cannot be allowed; None if it can."""
    for pattern, why in _NEVER.items():
        if re.fullmatch(pattern, name):
            return why
    found = _PROJECTED.fullmatch(name)
    # Only a trained projection is part of what was saved.
    if found and any(values.get(f"{found[1]}.projection") for values in (was, now)):
        return "the projections that were saved are others"
    return None


def _stands_for(given: str, name: str) -> bool:
    """Whether `--allow given` lets `name` differ: itself, what it holds or decides."""
    if given == "cache" and (
        name in ("rows_id", "steps", "forgotten") or name.startswith("signal_id ")
    ):
        return True
    if name == "steps":
        return given in ("data", "data.steps", "data.epochs", "data.batch_rows", "data.caches")
    return name == given or name.startswith((f"{given}.", f"{given}["))


def _allowed_by(name: str) -> str:
    """What to say to `--allow` for it."""
    if name in ("rows_id", "forgotten") or name.startswith("signal_id "):
        return "cache"
    return "data.steps" if name == "steps" else name


def _require_names(allow: Sequence[str], *, known: Mapping[str, Any]) -> None:
    """ValueError for a name that is not one."""
    names = {*known, "cache", *_TABLES}
    for given in allow:
        if given not in names and not any(_stands_for(given, name) for name in names):
            near = difflib.get_close_matches(given, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"allow: no setting is called {given!r}{hint}")


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif prefix + name in _TABLES:
            # No table leaves no trace, so that runs from before there were any go on.
            for number, table in enumerate(value):
                yield from _flatten(table, f"{prefix}{name}[{number}].")
        else:
            yield prefix + name, value
