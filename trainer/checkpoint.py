"""Checkpoints of a run, and what a run is bound to.

`run.json` says which rows, signals, student and settings the run belongs to; everything else in
the directory (initial student, checkpoints, metrics) means nothing without it. A checkpoint is
written whole or not at all (Orbax: temporary name, then rename) and holds the position in the
data, so that a killed run continues to the identical sequence of losses.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from schemas import Cache
from schemas.files import read_json, write_json
from trainer.config import Train
from trainer.step import TrainState

BINDING = "run.json"
CHECKPOINTS = "checkpoints"
# Where and how often, not what: these may change when a run goes on.
FREE = (
    "cache",
    "run",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "heldout_rows",
    "log_every",
    "max_bad_steps",
)


def bind(config: Train, *, cache: Cache, steps: int) -> None:
    """Tie the run's directory to its data and settings, or check that it is tied to these.

    Raises ValueError that lists what differs.
    """
    now = binding(config, cache=cache, steps=steps)
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


def binding(config: Train, *, cache: Cache, steps: int) -> dict[str, Any]:
    """What must stay the same for a run to go on, flat: `loss.alpha`, `signal_id logits`, …"""
    settings = dataclasses.asdict(config)
    for name in FREE:
        del settings[name]
    signals = {name: signal.signal_id for name, signal in cache.manifest.signals.items()}
    flat = _flatten(settings) | {"rows_id": cache.manifest.rows_id, "steps": steps}
    # Only the signals that training reads: adding another to the cache strands nobody.
    flat["signal_id logits"] = signals["logits"]
    return json.loads(json.dumps(flat, default=str))


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, *, keep: int = 1):
        self._manager = ocp.CheckpointManager(
            (run / CHECKPOINTS).absolute(),
            # Not asynchronous: on CPU the step donates the very buffers that would be written.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=False
            ),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, data: dict[str, Any]) -> None:
        """Write the state and the position in the data, unless this step is already saved."""
        step = int(state.step)
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data)
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint in the shapes and places of `like`, and the data's position."""
        found = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_abstract(like)._asdict()),
                data=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(**found["state"]), found["data"]

    def close(self) -> None:
        """Wait for Orbax's threads."""
        self._manager.close()


def _abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state,
    )


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
