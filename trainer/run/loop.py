"""The training loop: run updates, log their metrics, evaluate held-out rows, save, stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from decant.store import url_of
from decant.trainer.config import Train
from decant.trainer.data.batches import Batches
from decant.trainer.judging.heldout import Evaluator
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.run.binding import Binding
from decant.trainer.run.checkpoint import Checkpoints
from decant.trainer.run.metrics_log import MetricsLog
from decant.trainer.run.processes import StopAgreement
from decant.trainer.run.speed import Clock
from decant.trainer.update.step import TrainState

_LOWER = (
    "To go on from there, run the same command again with a lower learning rate: "
    "--optimiser.learning-rate RATE --allow optimiser.learning_rate"
)


@dataclass(frozen=True)
class TrainingLoop:
    """The loop of one run, with the objects that it reads from and writes to."""

    config: Train
    steps: int
    """Updates of the whole run."""
    signals: tuple[str, ...]
    """Signals that go to the device with every batch, besides `logits`."""
    batches: Batches
    checkpoints: Checkpoints
    binding: Binding
    """The values that the run is bound to; saved with every checkpoint."""
    metrics: MetricsLog
    mesh: Mesh
    step: Callable[[TrainState, dict], tuple[TrainState, dict]]
    """The compiled update."""
    evaluator: Evaluator | None
    """Held-out metrics of given parameters. None: the run is not judged."""
    clock: Clock = field(default_factory=Clock)

    def run(self, state: TrainState, *, stopping: Sequence[int] = ()) -> TrainState:
        """Update the state until the run's last update or a signal; return the last state.

        `stopping` is a list that a signal handler fills; the loop stops once it is not empty.
        """
        config = self.config
        delayed = _DelayedMetrics(config, self.metrics, self.clock, saved=self._saved)
        agreed = StopAgreement(self.mesh)
        done, stop, save = int(state.step), False, True
        if done < self.steps:
            self.metrics.say(self._opening(state, done))
        if done == 0:
            self._evaluate(0, state)
        while done < self.steps and not stop:
            batch = self.batches.next()
            on_device = to_device(
                batch,
                mesh=self.mesh,
                rows=config.data.batch_rows,
                tail=config.loss.tail,
                divergence=config.loss.divergence,
                signals=self.signals,
            )
            state, latest = self.step(state, on_device)
            done += 1
            delayed.add(done, batch["rows"], latest)
            end, stop = done == self.steps, agreed(bool(stopping))
            evaluate = end or done % config.evaluate_every == 0
            save = end or stop or done % config.checkpoint_every == 0
            if evaluate or save:
                delayed.flush()
            heldout = self._evaluate(done, state) if evaluate else None
            save = save or self.checkpoints.due(done, heldout=heldout)
            if save := save and self._worth_saving(state, heldout=heldout):
                data = {**self.batches.state(), "binding": self.binding.values}
                self.checkpoints.save(state, data=data, heldout=heldout)
            if evaluate or save:
                self.clock.restart()
        if done == self.steps and not save:
            raise FloatingPointError(
                f"{config.run}: the held-out loss is not finite after the last update, which "
                f"is not saved. The run is {self._saved()}. {_LOWER}"
            )
        return state

    def _opening(self, state: TrainState, done: int) -> str:
        """What is trained, on what, and for how long."""
        size = sum(weights.size for weights in jax.tree.leaves(state.params))
        source = url_of(self.config.cache) or self.config.cache
        rows, start = self.config.data.batch_rows, "continues" if done else "begins"
        return (
            f"{self.config.run} {start}: {size:,} parameters, updates {done + 1:,} to "
            f"{self.steps:,} of {rows:,} rows each, from {source}. The first update "
            "takes longer, because it compiles"
        )

    def _worth_saving(self, state: TrainState, *, heldout: dict[str, Any] | None) -> bool:
        """False if the student's loss is no longer finite: then an older checkpoint is better."""
        if heldout is not None:
            return math.isfinite(heldout["heldout_ce"])
        return int(state.skipped_in_a_row) == 0

    def _saved(self) -> str:
        latest = self.checkpoints.latest
        return f"saved in {self.config.run} after update {latest or 0}"

    def _evaluate(self, step: int, state: TrainState) -> dict[str, Any] | None:
        """Measure the state on held-out rows and log the metrics; None if the run is not judged."""
        if self.evaluator is None:
            return None
        heldout = self.evaluator(state.params)
        self.metrics.log_heldout({"step": step, **heldout})
        return heldout


class _DelayedMetrics:
    """Logs an update's metrics when the next update has been dispatched.

    Fetching metrics waits for the device. With one update's delay the device always has work.
    Raises FloatingPointError after `max_bad_steps` skipped updates in a row.
    """

    def __init__(
        self, config: Train, metrics: MetricsLog, clock: Clock, *, saved: Callable[[], str]
    ):
        self._config, self._metrics, self._clock, self._saved = config, metrics, clock, saved
        self._pending: tuple[int, np.ndarray, dict[str, jax.Array]] | None = None
        clock.restart()

    def add(self, step: int, rows: np.ndarray, metrics: dict[str, jax.Array]) -> None:
        self.flush()
        self._pending = (step, rows, metrics)

    def flush(self) -> None:
        """Wait for the pending update and log it."""
        if self._pending is None:
            return
        step, rows, on_device = self._pending
        self._pending = None
        values: dict[str, Any] = {"step": step}
        values |= {name: np.asarray(value).item() for name, value in on_device.items()}
        values["tokens"] = int(values["tokens"])
        self._clock.add(values["tokens"])
        bad = values["skipped_in_a_row"] > 0
        if bad:
            values["skipped_rows"] = rows.tolist()
        if bad or step % self._config.log_every == 0:
            self._metrics.log_update({**values, **self._clock.read()})
        if values["skipped_in_a_row"] >= self._config.max_bad_steps:
            raise FloatingPointError(
                f"{self._config.run}: {values['skipped_in_a_row']} updates in a row had a "
                f"non-finite loss or gradient, the last at step {step} with rows "
                f"{rows.tolist()} (metrics.jsonl lists the rows of each as skipped_rows). The run "
                f"is {self._saved()}. {_LOWER}; or use dtype = float32, or look at these rows with "
                "`decant inspect`"
            )
