"""A run after `train`: how far it is, its last metrics and its newest checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decant.trainer.run.checkpoint import CHECKPOINTS, latest_step
from decant.trainer.run.metrics_log import read_metrics


@dataclass(frozen=True)
class Trained:
    """A run after `train`. Its properties read the files of the run's directory."""

    run: Path
    step: int
    """Updates done."""
    steps: int
    """Updates of the whole run."""

    @property
    def finished(self) -> bool:
        """Whether the run has reached its last update; otherwise a signal has stopped it."""
        return self.step == self.steps

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The last line of `metrics.jsonl` about an update: `loss`, `kl_loss`, …; None if none."""
        return self._last("loss")

    @property
    def heldout(self) -> dict[str, Any] | None:
        """The last judgement on held-out rows: `heldout_kl`, `heldout_ce`, …; None if none."""
        return self._last("heldout_ce")

    @property
    def checkpoint(self) -> Path | None:
        """Directory of the newest checkpoint; None if there is none."""
        step = latest_step(self.run)
        return self.run / CHECKPOINTS / str(step) if step else None

    def document(self) -> dict[str, Any]:
        """The run, with its last metrics, as `--json` prints it."""
        return {
            **dataclasses.asdict(self),
            "finished": self.finished,
            "checkpoint": self.checkpoint,
            "heldout": self.heldout,
            "last_update": self.metrics,
        }

    def _last(self, name: str) -> dict[str, Any] | None:
        lines = [line for line in read_metrics(self.run) if name in line]
        return lines[-1] if lines else None
