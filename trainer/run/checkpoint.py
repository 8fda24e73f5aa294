"""Checkpoints of a run: saving, restoring, and which ones are kept.

A checkpoint is written whole or not at all (Orbax writes under a temporary name, then renames). It
holds the training state, the position in the data and the run's binding. A killed run therefore
continues with identical losses, and a checkpoint that was moved still names its run's data.
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
from decant.trainer.loss.projections import Parameters
from decant.trainer.run.quiet_threads import quiet_threads
from decant.trainer.update.step import TrainState

CHECKPOINTS = "checkpoints"
By = Literal["kl", "ce"]
_METRICS: dict[By, str] = {"kl": "heldout_kl_bound", "ce": "heldout_ce"}
_BEST: dict[str, By] = {"best": "kl", "best-ce": "ce"}


def latest_step(run: Path) -> int:
    """Number of updates of a run's newest checkpoint; 0 if there is none."""
    directory = run / CHECKPOINTS
    steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
    return max(steps, default=0)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, *, keep: Keep = Keep(), read_only: bool = False):  # noqa: B008
        """`keep` says which checkpoints a save leaves.

        With `read_only` nothing is written or deleted, because another process may be training.
        """
        self._run, self._keep = run, keep
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Policy(self),
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
            # Not asynchronous: on CPU the next update would donate the buffers being written.
            enable_async_checkpointing=False,
        )
        with _quiet():  # Orbax warns about `read_only`.
            self._manager = ocp.CheckpointManager((run / CHECKPOINTS).absolute(), options=options)
        # Held-out metrics by step. In memory, because all processes must decide alike by them.
        self._heldout = {step: self._saved_heldout(step) for step in self._manager.all_steps()}

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def named_step(self, name: str) -> int | None:
        """The step of the checkpoint `last`, `best` (by held-out KL), `best-ce` or a given number.

        None for `last` if there is no checkpoint. Raises ValueError for any other missing one.
        """
        if name == "last":
            return self.latest
        if name in _BEST:
            scores = {s: x for s, x in self._scores(_BEST[name]).items() if s in self.steps}
            if not scores:
                raise ValueError(
                    f"{self._run}: no checkpoint has held-out metrics. "
                    "Train with --keep.best 1, or use --checkpoint last"
                )
            return min(scores, key=lambda step: (scores[step], step))
        if not name.isdecimal() or int(name) not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            raise ValueError(
                f"{self._run}: no checkpoint {name!r}; the run has checkpoints after updates "
                f"{there}. Use one of these numbers, `last` or `best`"
            )
        return int(name)

    def due(self, step: int, *, heldout: Mapping[str, Any] | None) -> bool:
        """Whether `keep` asks for a checkpoint at this step, besides the regular ones.

        `heldout` are the held-out metrics at this step, None if none were measured.
        """
        if self._keep.every and step % self._keep.every == 0:
            return True
        if not self._keep.best or heldout is None:
            return False
        by, there = self._keep.best_by, self.steps
        scores = self._scores(by)
        best = sorted(scores[s] for s in there if s in scores)[: self._keep.best]
        return len(best) < self._keep.best or _score(heldout, by) < best[-1]

    def save(
        self, state: TrainState, *, data: dict[str, Any], heldout: Mapping[str, Any] | None = None
    ) -> None:
        """Write the state and `data`, unless this step is already saved.

        `heldout` are the held-out metrics of this state, None if none were measured.
        """
        step = int(state.step)
        if step == self.latest:
            return
        self._heldout[step] = {n: heldout[n] for n in _METRICS.values()} if heldout else None
        with quiet_threads():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()),
                    data=ocp.args.JsonSave({**data, "judged": self._heldout[step]}),
                ),
            )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint's state, with the shapes and shardings of `like`, and its data."""
        saved = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_abstract(like._asdict())),
                data=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(**saved["state"]), saved["data"]

    def restore_parameters(self, like: Parameters, *, step: int) -> Parameters:
        """The parameters of the checkpoint after `step` updates, whatever its optimiser was."""
        wanted = {"params": _abstract(like)}
        restore = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        saved = self._manager.restore(step, args=ocp.args.Composite(state=restore))
        return saved["state"]["params"]

    def close(self) -> None:
        """Wait for Orbax's threads."""
        self._manager.close()

    def kept(self, steps: Sequence[int]) -> set[int]:
        """The steps, out of these, whose checkpoints `keep` preserves."""
        keep, scores = self._keep, self._scores(self._keep.best_by)
        best = sorted((scores[step], step) for step in steps if step in scores)[: keep.best]
        numbered = {step for step in steps if keep.every and step % keep.every == 0}
        return {*sorted(steps)[-max(1, keep.last) :], *(step for _, step in best), *numbered}

    def _scores(self, by: By) -> dict[int, float]:
        """Score of each checkpoint that has held-out metrics, by step."""
        return {step: _score(heldout, by) for step, heldout in self._heldout.items() if heldout}

    def _saved_heldout(self, step: int) -> dict[str, Any] | None:
        try:
            args = ocp.args.Composite(data=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["data"].get("judged")
        except (OSError, ValueError, KeyError):
            return None  # A kill interrupted the deletion of this checkpoint.


class _Policy(PreservationPolicy):
    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether Orbax preserves each of these checkpoints."""
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


def _score(heldout: Mapping[str, Any], by: By) -> float:
    """The metric to compare checkpoints by, lower is better; infinite if it is missing or NaN."""
    score = heldout.get(_METRICS[by])
    return score if score is not None and math.isfinite(score) else math.inf


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        tree,
    )
