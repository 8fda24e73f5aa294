"""What a run's directory is bound to: `run.json`.

It says which rows, signals, student and settings the run belongs to; everything else in the
directory (initial student, checkpoints, metrics) means nothing without it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas import Cache
from schemas.files import read_json, write_json
from trainer.config import Train

BINDING = "run.json"
# Where and how often, not what: these may change when a run goes on.
FREE = (
    "cache",
    "run",
    "mesh",
    "distributed",
    "remat",
    "compilation_cache",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "heldout_rows",
    "log_every",
    "max_bad_steps",
    "quiet",
    "json",
)


def bind(config: Train, *, cache: Cache, steps: int, signals: Sequence[str] = ()) -> None:
    """Tie the run's directory to its data and settings, or check that it is tied to these.

    `signals` are what is read of the cache beside `logits`.

    Raises ValueError that lists what differs.
    """
    now = binding(config, cache=cache, steps=steps, signals=signals)
    path = config.run / BINDING
    if not path.exists():
        write_json(path, now)
        return
    saved = settings_of(config.run)
    differences = [
        f"  {name}: this run has {saved.get(name)!r}, asked for {now.get(name)!r}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{config.run}: this run was started with other data or settings and cannot go on "
            "with these:\n"
            + "\n".join(differences)
            + "\nRestore them, or start anew with another --run directory"
        )


def settings_of(run: Path) -> dict[str, Any]:
    """What a run is bound to: its settings and its data."""
    return read_json(run / BINDING)


def with_saved_layers(config: Train) -> Train:
    """The settings in which terms without layers have those that the run began with."""
    if not (config.run / BINDING).exists():
        return config
    saved = settings_of(config.run)

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
    config: Train, *, cache: Cache, steps: int, signals: Sequence[str] = ()
) -> dict[str, Any]:
    """What must stay the same for a run to go on, flat: `loss.alpha`, `signal_id logits`, …

    Of the cache the rows and the signals that training reads: adding another strands nobody.
    """
    settings = dataclasses.asdict(config)
    for name in FREE:
        del settings[name]
    held = cache.manifest.signals
    read = {f"signal_id {name}": held[name].signal_id for name in ("logits", *signals)}
    flat = _flatten(settings) | {"rows_id": cache.manifest.rows_id, "steps": steps} | read
    return json.loads(json.dumps(flat, default=str))


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and all(isinstance(table, dict) for table in value):
            # No term leaves no trace, so that runs from before there were any go on.
            for number, table in enumerate(value):
                flat |= _flatten(table, f"{prefix}{name}[{number}].")
        else:
            flat[prefix + name] = value
    return flat
