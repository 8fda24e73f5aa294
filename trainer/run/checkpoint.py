"""Checkpoints of a run.

One is written whole or not at all (Orbax: temporary name, then rename) and holds the position in
the data and what the run is bound to, so that a killed run continues to the identical sequence of
losses, and a checkpoint that was put elsewhere still says whose it is.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from decant.trainer.config import Keep
from decant.trainer.update.step import Parameters, TrainState

CHECKPOINTS = "checkpoints"
By = Literal["kl", "ce"]
_JUDGED: dict[By, str] = {"kl": "heldout_kl_bound", "ce": "heldout_ce"}
_BEST: dict[str, By] = {"best": "kl", "best-ce": "ce"}


def latest_step(run: Path) -> int:
    """Step of a run's newest checkpoint; 0 if there is none."""
    directory = run / CHECKPOINTS
    steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
    return max(steps, default=0)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, *, keep: Keep = Keep(), read_only: bool = False):  # noqa: B008
        """`read_only` neither writes nor clears up: another process may be training."""
        self._run, self._keep = run, keep
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Policy(self),
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
            # Not asynchronous: on CPU the step donates the very buffers that would be written.
            enable_async_checkpointing=False,
        )
        with _quiet():  # Orbax warns of what `read_only` means.
            self._manager = ocp.CheckpointManager((run / CHECKPOINTS).absolute(), options=options)
        # In memory, because all processes must come to the same answer from it.
        self._judged = {step: self._judged_at(step) for step in self._manager.all_steps()}

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Of all checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def named_step(self, name: str) -> int | None:
        """The step of `last` (None: there is none yet), `best` (by KL), `best-ce`, or of a number.

        ValueError if there is no such checkpoint.
        """
        if name == "last":
            return self.latest
        if name in _BEST:
            scores = {s: x for s, x in self._scores(_BEST[name]).items() if s in self.steps}
            if not scores:
                raise ValueError(
                    f"{self._run}: no checkpoint was judged on held-out rows when it was saved. "
                    "Train with --keep.best 1, or ask for --checkpoint last"
                )
            return min(scores, key=lambda step: (scores[step], step))
        if not name.isdecimal() or int(name) not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            raise ValueError(
                f"{self._run}: no checkpoint {name!r}; there are those after updates {there}. Ask "
                "for one of them, `last` or `best`"
            )
        return int(name)

    def due(self, step: int, *, judged: Mapping[str, Any] | None) -> bool:
        """Whether the rules of keeping ask for a checkpoint here, beside the regular ones."""
        if self._keep.every and step % self._keep.every == 0:
            return True
        if not self._keep.best or judged is None:
            return False
        by, there = self._keep.best_by, self.steps
        scores = self._scores(by)
        best = sorted(scores[s] for s in there if s in scores)[: self._keep.best]
        return len(best) < self._keep.best or _score(judged, by) < best[-1]

    def save(
        self, state: TrainState, *, data: dict[str, Any], judged: Mapping[str, Any] | None = None
    ) -> None:
        """Write the state and what belongs to it, unless this step is already saved.

        `judged` are the held-out metrics of this very state, if it was judged.
        """
        step = int(state.step)
        if step == self.latest:
            return
        self._judged[step] = {n: judged[n] for n in _JUDGED.values()} if judged else None
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                data=ocp.args.JsonSave({**data, "judged": self._judged[step]}),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint in the shapes and places of `like`, and what was saved with it."""
        found = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_abstract(like._asdict())),
                data=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(**found["state"]), found["data"]

    def restore_parameters(self, like: Parameters, *, step: int) -> Parameters:
        """The parameters alone of the checkpoint after `step` updates, whatever optimised them."""
        wanted = {"params": _abstract(like)}
        restore = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        found = self._manager.restore(step, args=ocp.args.Composite(state=restore))
        return found["state"]["params"]

    def close(self) -> None:
        """Wait for Orbax's threads."""
        self._manager.close()

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Which of these checkpoints stay."""
        keep, scores = self._keep, self._scores(self._keep.best_by)
        best = sorted((scores[step], step) for step in steps if step in scores)[: keep.best]
        numbered = {step for step in steps if keep.every and step % keep.every == 0}
        return {*sorted(steps)[-max(1, keep.last) :], *(step for _, step in best), *numbered}

    def _scores(self, by: By) -> dict[int, float]:
        """Of the checkpoints that were judged, by step."""
        return {step: _score(found, by) for step, found in self._judged.items() if found}

    def _judged_at(self, step: int) -> dict[str, Any] | None:
        try:
            args = ocp.args.Composite(data=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["data"].get("judged")
        except (OSError, ValueError, KeyError):
            return None  # Its deletion was cut short by a kill: nobody wants it.


class _Policy(PreservationPolicy):
    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """As Orbax asks for it."""
        kept = self._checkpoints.kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _score(judged: Mapping[str, Any], by: By) -> float:
    """Less is better; what is not a number is worst."""
    score = judged.get(_JUDGED[by])
    return score if score is not None and math.isfinite(score) else math.inf


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        tree,
    )
