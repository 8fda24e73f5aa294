"""Checkpoints of a run: saving, restoring, and which ones are kept.

A checkpoint is written whole or not at all (Orbax writes under a temporary name, then renames). It
holds the training state, the position in the data and the run's binding. A killed run therefore
continues with identical losses, and a checkpoint that was moved still names its run's data.

It also holds checksums of all arrays and of its other values. Restoring compares them, so a
checkpoint that rotted on the disk is never used. Checkpoints of 0.7 and older have none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from decant.schemas.disk.identity import digest
from decant.trainer.config import Keep
from decant.trainer.judging.headline import ESTIMATES, common_estimate
from decant.trainer.loss.projections import Parameters
from decant.trainer.run.checksums import require_finite, summarise
from decant.trainer.run.processes import all_processes, is_first_process
from decant.trainer.run.quiet_threads import quiet_threads
from decant.trainer.update.step import TrainState

CHECKPOINTS = "checkpoints"
DAMAGED = "damaged-checkpoints"
"""Where a run that goes on puts checkpoints that it could not restore."""
By = Literal["kl", "ce"]
_CE = "heldout_ce"
_SAVED = (*(each.metric for each in ESTIMATES), _CE)
"""Held-out metrics that a checkpoint keeps, as far as they were measured. Checkpoints of 0.8 and
older keep the KL's bound only."""
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
            judged = {s: x for s, x in self._heldout.items() if x and s in self.steps}
            scores = _scores(judged, _BEST[name])
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
        others = {s: x for s, x in self._heldout.items() if x and s in self.steps}
        scores = _scores({**others, step: heldout}, self._keep.best_by)
        best = sorted(scores[s] for s in others)[: self._keep.best]
        return len(best) < self._keep.best or scores[step] < best[-1]

    def save(
        self, state: TrainState, *, data: dict[str, Any], heldout: Mapping[str, Any] | None = None
    ) -> None:
        """Write the state and `data`, unless this step is already saved.

        `heldout` are the held-out metrics of this state, None if none were measured.
        """
        step = int(state.step)
        if step == self.latest:
            return
        arrays = summarise(state._asdict())
        require_finite(arrays, where=f"{self._run}, after update {step}")
        self._heldout[step] = {n: heldout[n] for n in _SAVED if n in heldout} if heldout else None
        values = {
            **data,
            "step": step,
            "judged": self._heldout[step],
            "checksums": {name: array.checksum for name, array in arrays.items()},
        }
        values = json.loads(json.dumps(values))  # as they will be read
        with quiet_threads():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()),
                    data=ocp.args.JsonSave({**values, "digest": digest(values)}),
                ),
            )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and data of the newest good checkpoint, with shapes and shardings of `like`.

        Damaged newer ones are put into `damaged-checkpoints`, and standard error says so. Raises
        ValueError that names the damage if no checkpoint is good.
        """
        bad: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                restored = all_processes(lambda step=step: self._restore(step, like))
            except ValueError as error:
                bad[step] = str(error)
                continue
            for damaged, why in bad.items():
                self._put_aside(damaged)
                _say(f"{why}\nput into {self._run / DAMAGED}; training goes on after update {step}")
            return restored
        raise ValueError(
            "\n".join(bad.values()) + f"\n{self._run}: no checkpoint is good. Bring back a copy "
            f"or delete {self._run / CHECKPOINTS} to train again from the initial student"
        )

    def restore_newest_parameters(self, like: Parameters) -> tuple[Parameters, int]:
        """Parameters and step of the newest good checkpoint. Nothing on the disk is changed."""
        bad: list[str] = []
        for step in reversed(self.steps):
            try:
                params = self.restore_parameters(like, step=step)
            except ValueError as error:
                bad.append(str(error))
                continue
            for why in bad:
                _say(f"{why}\nthe checkpoint after update {step} is used")
            return params, step
        raise ValueError(
            "\n".join([*bad, f"{self._run}: no checkpoint is good; bring a copy back"])
        )

    def restore_parameters(self, like: Parameters, *, step: int) -> Parameters:
        """The parameters of the checkpoint after `step` updates, whatever its optimiser was.

        ValueError if they are damaged or not finite.
        """
        wanted = {"params": _abstract(like)}
        restore = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        with self._damage(step):
            saved = self._manager.restore(
                step, args=ocp.args.Composite(state=restore, data=ocp.args.JsonRestore())
            )
            state = {"params": saved["state"]["params"]}
            self._check(step, state, saved["data"])
        return state["params"]

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(_abstract(like._asdict())),
            data=ocp.args.JsonRestore(),
        )
        with self._damage(step):
            saved = self._manager.restore(step, args=args)
            self._check(step, saved["state"], saved["data"])
            return TrainState(**saved["state"]), saved["data"]

    def _check(self, step: int, state: dict[str, Any], data: dict[str, Any]) -> None:
        """ValueError unless arrays and data are those that were saved, and the arrays finite."""
        _require_intact(data)
        if data.get("step", step) != step:
            raise ValueError(f"it is the checkpoint after update {data['step']}")
        arrays, saved = summarise(state), data.get("checksums")
        for name, array in arrays.items():
            if saved is not None and saved.get(name) != array.checksum:
                raise ValueError(f"{name[1:]} is not what was saved")
        require_finite(arrays, where=f"after update {step}")

    @contextlib.contextmanager
    def _damage(self, step: int) -> Iterator[None]:
        """Whatever Orbax and its parsers raise at a damaged file, as a ValueError that names it."""
        where = self._run / CHECKPOINTS / str(step)
        try:
            with quiet_threads():
                yield
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{where}: this checkpoint is damaged: {lines[0][:160]}") from error

    def _put_aside(self, step: int) -> None:
        if is_first_process():
            aside = self._run / DAMAGED
            aside.mkdir(exist_ok=True)
            taken = len(list(aside.glob(f"{step}*")))
            name = f"{step}-{taken}" if taken else str(step)
            (self._run / CHECKPOINTS / str(step)).rename(aside / name)
        all_processes(self._manager.reload)
        self._heldout.pop(step, None)

    def close(self) -> None:
        """Wait for Orbax's threads."""
        self._manager.close()

    def kept(self, steps: Sequence[int]) -> set[int]:
        """The steps, out of these, whose checkpoints `keep` preserves."""
        keep = self._keep
        judged = {step: x for step in steps if (x := self._heldout.get(step))}
        scores = _scores(judged, keep.best_by)
        best = sorted((score, step) for step, score in scores.items())[: keep.best]
        numbered = {step for step in steps if keep.every and step % keep.every == 0}
        return {*sorted(steps)[-max(1, keep.last) :], *(step for _, step in best), *numbered}

    def _saved_heldout(self, step: int) -> dict[str, Any] | None:
        """A checkpoint's metrics; None if a kill interrupted its deletion, or it is damaged."""
        try:
            with self._damage(step):
                args = ocp.args.Composite(data=ocp.args.JsonRestore())
                data = self._manager.restore(step, args=args)["data"]
                _require_intact(data)
                return data.get("judged")
        except ValueError:
            return None


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
    logger.setLevel(logging.CRITICAL)  # and reports damage, which we tell ourselves
    try:
        yield
    finally:
        logger.setLevel(before)


def _scores(judged: Mapping[int, Mapping[str, Any]], by: By) -> dict[int, float]:
    """What to compare checkpoints by, lower is better, by step; infinite if it is missing or NaN.

    The KL is the best estimate that all of them have.
    """
    metric = common_estimate(judged.values()).metric if by == "kl" else _CE
    found = {step: heldout.get(metric) for step, heldout in judged.items()}
    return {s: x if x is not None and math.isfinite(x) else math.inf for s, x in found.items()}


def _require_intact(data: Any) -> None:
    """ValueError if a checkpoint's JSON values are not those that were saved.

    Releases before 0.8 saved no digest, but always the position in the data.
    """
    values = {name: value for name, value in data.items() if name != "digest"}
    old = "position" in data and "digest" not in data and "checksums" not in data
    if not old and data.get("digest") != digest(values):
        raise ValueError("its data is not what was saved")


def _say(text: str) -> None:
    if is_first_process():
        print(f"warning: {text}", file=sys.stderr)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        tree,
    )
