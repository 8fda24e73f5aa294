"""Checkpoints of a run.

One is written whole or not at all (Orbax: temporary name, then rename) and holds the position in
the data, so that a killed run continues to the identical sequence of losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from trainer.step import TrainState

CHECKPOINTS = "checkpoints"


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
