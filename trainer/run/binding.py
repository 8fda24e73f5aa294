"""`run.json`: the data, settings and code that a run must be continued with.

Every checkpoint holds a copy of these values, its binding. `run.json` also records each value that
changed during the run because `--allow` permitted it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from decant.schemas import Cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.config import Train
from decant.trainer.data.source_weights import source_weights
from decant.trainer.loss.settings import AttentionLoss, HiddenLoss
from decant.trainer.run.code_version import code_version

BINDING = "run.json"
_CHANGES = "changes"
# Paths, frequencies, devices and output: they change updates by rounding at most, so a continued
# run may change them.
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
    "log",
    "log_every",
    "max_bad_steps",
    "quiet",
    "json",
)
_FREE_OF_DATA = ("mirror", "mirror_bytes")
_PLACES = ("source", "config")
"""Settings of the student that are paths, or may be."""
_SHOWN = ("loss.alpha", "loss.temperature", "loss.tail")
"""Settings that every release has recorded and that reports and evaluations read."""
_NEVER = {
    r"student\.(?!source$).*": "a run cannot change its student",
    r"optimiser\.(name|freeze)": "the saved moments have another shape",
}
"""Patterns of settings that `--allow` cannot permit to change, each with the reason."""
_CHUNK = "loss.chunk_tokens"
"""Free to change since 0.6; `run.json` of older releases holds it."""
_PROJECTED = re.compile(r"(loss\.hidden\[\d+\])\.(projection|student_layers|teacher_layers)")
_TABLES = ("loss.hidden", "loss.attention", "data.caches", "data.source_weights")
"""Settings that are TOML tables, or lists of them."""
_OF_STEPS = ("steps", "epochs", "batch_rows", "caches", "source_weights")
"""Settings of `data` that the number of updates depends on."""
_CODE_BEFORE = "0.4.0 or older"
"""Stands for the code version of a run whose `run.json` does not record one."""


@dataclasses.dataclass(frozen=True)
class Binding:
    """The values that a run is bound to, and the names that `--allow` permits to differ."""

    values: dict[str, Any]
    allow: tuple[str, ...] = ()
    run: Path = Path()
    """Directory of the run."""

    def allows(self, name: str) -> bool:
        """Whether the value called `name` may differ."""
        return any(_covers(given, name) for given in self.allow)

    def require_same(self, saved: Mapping[str, Any] | None, *, where: str) -> None:
        """Raise ValueError if a checkpoint's copy differs in a value that may not.

        `saved` is None in a checkpoint of a release that kept no copy. `where` begins the message.
        """
        if saved is not None:
            was = _with_defaults(_with_places(saved, self.values, run=self.run), self.values)
            _require_allowed(self, was, where=where)


def bind(
    config: Train,
    *,
    cache: Cache,
    others: Sequence[Cache] = (),
    steps: int,
    signals: Sequence[str] = (),
    after: int = 0,
) -> Binding:
    """Write `run.json` for a new run; for an existing run, check that it has the same values.

    `others` are the caches of `config.data.caches`, `signals` the signals read besides `logits`,
    `after` the step of the run's newest checkpoint. Values that `config.allow` names may differ;
    `run.json` then takes the new value and records the change.

    Raises ValueError that lists the values that differ without permission.
    """
    now = binding_values(config, cache=cache, others=others, steps=steps, signals=signals)
    _require_names(config.allow, known=now)
    path = config.run / BINDING
    if not path.exists():
        write_json(path, now)
        return Binding(now, run=config.run)
    saved = _with_places(read_run_settings(config.run), now, run=config.run)
    was, changes = _with_defaults(saved, now), read_run_changes(config.run)
    if differing := _differing(was, now):
        _require_allowed(Binding(now, config.allow, config.run), was, where=str(config.run))
        changes += [
            {"after": after, "name": name, "was": was.get(name), "now": now.get(name)}
            for name in differing
        ]
        write_json(path, {**now, _CHANGES: changes})
    # Recorded changes stay allowed: the newest checkpoint may still hold the values before them.
    allow = (*config.allow, *(change["name"] for change in changes))
    return Binding(now, allow, config.run)


def cache_at_start(cache: Cache, *, run: Path) -> Cache:
    """The cache without the parts that were added after the run began.

    Added parts hold other rows, so they would change the run's order of rows. The cache is returned
    unchanged if the run is new, or if none of its first parts are the run's rows.
    """
    if not (run / BINDING).exists():
        return cache
    rows_id, parts = read_run_settings(run).get("rows_id"), cache.manifest.parts
    for count in range(1, len(parts)):
        first = dataclasses.replace(cache.manifest, parts=parts[:count])
        if first.rows_id == rows_id:
            return Cache(cache.path, first, cache.mirror)
    return cache


def read_run_settings(run: Path) -> dict[str, Any]:
    """The values that a run is bound to: settings by dotted name, ids of its data, code version."""
    values = read_json(run / BINDING, holds="rows_id")
    if missing := [name for name in _SHOWN if name not in values]:
        raise ValueError(f"{run / BINDING}: without {missing[0]!r}, so it is not the file of a run")
    return {name: value for name, value in values.items() if name != _CHANGES}


def read_run_changes(run: Path) -> list[dict[str, Any]]:
    """Values that `--allow` let change: each with `after` (the update), `name`, `was` and `now`."""
    return read_json(run / BINDING).get(_CHANGES, [])


def with_saved_layers(config: Train) -> Train:
    """The settings, with layers from `run.json` in each loss term that leaves its layers unset."""
    if not (config.run / BINDING).exists():
        return config
    saved = read_run_settings(config.run)

    def saved_term(name: str) -> Any:
        term = config.loss.terms[name]
        if term.teacher_layers:
            return term
        fields = ("student_layers", "teacher_layers")
        layers = {field: tuple(saved.get(f"loss.{name}.{field}", ())) for field in fields}
        return dataclasses.replace(term, **layers)

    loss = dataclasses.replace(
        config.loss,
        hidden=tuple(saved_term(f"hidden[{i}]") for i in range(len(config.loss.hidden))),
        attention=tuple(saved_term(f"attention[{i}]") for i in range(len(config.loss.attention))),
    )
    return dataclasses.replace(config, loss=loss)


def binding_values(
    config: Train,
    *,
    cache: Cache,
    others: Sequence[Cache] = (),
    steps: int,
    signals: Sequence[str] = (),
) -> dict[str, Any]:
    """The values that a continued run must match, by name: `loss.alpha`, `signal_id logits`, …

    Of a cache they include the ids of its rows and of the signals that training reads, so a cache
    may gain other signals; and the weights in effect of its groups of files, if one differs from 1.
    """
    settings = dataclasses.asdict(config)
    settings["loss"]["alpha"] = config.loss.first_alpha
    for name in FREE:
        del settings[name]
    for name in _FREE_OF_DATA:
        del settings["data"][name]
    for name in _PLACES:
        settings["student"][name] = _from_run(settings["student"][name], config.run)
    settings["data"]["source_weights"] = source_weights(cache, config.data.source_weights)
    for number, other in enumerate(others):
        mixed = settings["data"]["caches"][number]
        del mixed["path"]  # A cache may move; the ids of its contents must stay.
        mixed |= _data_ids(other, signals) | {"source_weights": source_weights(other)}
    flat = dict(_flatten(settings)) | _data_ids(cache, signals)
    del flat[_CHUNK]
    return json.loads(json.dumps({**flat, "steps": steps, "code": code_version()}, default=str))


def _from_run(text: Any, run: Path) -> Any:
    """A path that is there as it leads from the run's directory; else the text as it is.

    So a run and its student's source can be moved together, and a run continued from anywhere.
    """
    if text is None or str(text) == "embedded" or not Path(text).exists():
        return text
    return Path(os.path.relpath(Path(text).resolve(), run.resolve())).as_posix()


def _with_places(saved: Mapping[str, Any], now: Mapping[str, Any], *, run: Path) -> dict[str, Any]:
    """The saved values, with a path in the words of `now` if both may mean the same place.

    Releases before 0.9 saved paths as they led from the working directory.
    """

    def places(text: Any) -> set[Path]:
        return {(start / str(text)).resolve() for start in (run, Path())}

    def is_same(name: str) -> bool:
        return bool(saved.get(name)) and bool(places(saved[name]) & places(now.get(name)))

    names = [f"student.{name}" for name in _PLACES]
    return {**saved, **{name: now[name] for name in names if is_same(name)}}


def _data_ids(cache: Cache, signals: Sequence[str]) -> dict[str, str]:
    """Ids of a cache's rows and of its signals that a run reads."""
    held = cache.manifest.signals
    ids = {
        f"signal_id {name}": held[name].signal_id for name in ("logits", *signals) if name in held
    }
    if forgotten := cache.manifest.forgotten_id:
        # A run that has learned from rows that were forgotten since must not continue.
        ids["forgotten"] = forgotten
    return {"rows_id": cache.manifest.rows_id, **ids}


def _with_defaults(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The saved values, with defaults for settings that the run's release did not have.

    The default of a new setting is always what older releases did.
    """
    defaults = json.loads(json.dumps(dict(_flatten(dataclasses.asdict(Train()))), default=str))
    for name in saved:
        if term := re.fullmatch(r"(loss\.(hidden|attention)\[\d+\]\.)weight", name):
            default = HiddenLoss() if term[2] == "hidden" else AttentionLoss()
            defaults |= _flatten(dataclasses.asdict(default), term[1])
    missing = {name: value for name, value in defaults.items() if name in now}
    known = {name: value for name, value in saved.items() if name != _CHUNK}
    return {**missing, "code": _CODE_BEFORE, **known}


def _differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def _require_allowed(binding: Binding, was: Mapping[str, Any], *, where: str) -> None:
    """Raise ValueError if a value differs that is not allowed to, or that never may."""
    now = binding.values
    never = {name: why for name in _differing(was, now) if (why := _why_never(name, was, now))}
    refused = [name for name in _differing(was, now) if name in never or not binding.allows(name)]
    if not refused:
        return
    lines = [
        f"  {name}: this run has {was.get(name)!r}, asked for {now.get(name)!r}"
        + (f" (never allowed: {never[name]})" if name in never else "")
        for name in refused
    ]
    names = " ".join(sorted({_allow_name(name) for name in refused}))
    permit = "" if never else f", permit the change with --allow {names}"
    raise ValueError(
        f"{where}: this run began with other data or settings, so it cannot continue with these:\n"
        + "\n".join(lines)
        + f"\nRestore them{permit}, or begin a new run in another --run directory"
    )


def _why_never(name: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why `--allow` cannot permit this difference; None if it can."""
    for pattern, why in _NEVER.items():
        if re.fullmatch(pattern, name):
            return why
    term = _PROJECTED.fullmatch(name)
    # Without a projection, nothing of the term is saved.
    if term and any(values.get(f"{term[1]}.projection") for values in (was, now)):
        return "the saved projections would not fit"
    return None


def _covers(given: str, name: str) -> bool:
    """Whether `--allow given` lets `name` differ: `name` itself, a field of it or a consequence."""
    if given == "cache" and (
        name in ("rows_id", "steps", "forgotten") or name.startswith("signal_id ")
    ):
        return True
    if name == "steps":
        return given in ("data", *(f"data.{setting}" for setting in _OF_STEPS))
    return name == given or name.startswith((f"{given}.", f"{given}["))


def _allow_name(name: str) -> str:
    """The name to give to `--allow` so that `name` may differ."""
    if name in ("rows_id", "forgotten") or name.startswith("signal_id "):
        return "cache"
    if name.startswith("data.source_weights."):
        return "data.source_weights"
    return "data.steps" if name == "steps" else name


def _require_names(allow: Sequence[str], *, known: Mapping[str, Any]) -> None:
    """Raise ValueError if `allow` contains a name that is no setting."""
    names = {*known, "cache", *_TABLES}
    for given in allow:
        if given not in names and not any(_covers(given, name) for name in names):
            near = difflib.get_close_matches(given, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"allow: no setting is called {given!r}{hint}")


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif prefix + name in _TABLES:
            # An empty list adds no name: runs of releases without the setting still match.
            for number, table in enumerate(value):
                yield from _flatten(table, f"{prefix}{name}[{number}].")
        else:
            yield prefix + name, value
