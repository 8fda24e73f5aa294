"""Logs a run's metrics: to `metrics.jsonl`, to TensorBoard events and to the terminal.

`metrics.jsonl` holds one JSON object a line. An update's line has `loss`, a held-out evaluation's
line has `heldout_…`. Lines are in order of `step`; a run that continues from a checkpoint drops the
lines after it, so no two lines contradict each other.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from decant.foreign import tell, terminal
from decant.schemas.disk.atomic import write_bytes
from decant.trainer.run.tensorboard import EventFile

FILE = "metrics.jsonl"
SHOWN = {
    "loss": "loss",
    "kl_loss": "kl",
    "ce_loss": "ce",
    "hidden_state_loss": "hidden",
    "attention_loss": "attention",
}
"""Metrics that the terminal shows, with their labels there."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's `metrics.jsonl`, without a last line that a kill cut short.

    Raises FileNotFoundError if the directory holds no run, ValueError for a damaged line.
    """
    path = run / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; {run} is not the directory of a run")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [_object_with_step(json.loads(line)) for line in lines[:-1]]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def _object_with_step(line: Any) -> dict[str, Any]:
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise ValueError(f"a line without a step: {str(line)[:80]}")
    return line


class MetricsLog:
    """Writes a run's metrics to its files and prints them."""

    def __init__(
        self,
        run: Path,
        *,
        after: int | None,
        steps: int,
        quiet: bool = False,
        as_json: bool = False,
    ):
        """Open the files of a run of `steps` updates.

        `after` is the step of the checkpoint that the run continues from, None if there is none;
        lines after it are dropped. With `quiet` nothing goes to standard error. With `as_json`
        every line goes to standard output too, with `steps` and, for updates, `eta_seconds` added.
        """
        path = run / FILE
        if path.exists():
            lines = read_metrics(run)
            kept = [line for line in lines if after is not None and line["step"] <= after]
            write_bytes(path, "".join(_json(line) for line in kept).encode())
        # A link in a run from elsewhere must not make us append to another file.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8")
        self._events = EventFile(run, after=after)
        self._steps, self._as_json = steps, as_json
        self._console = terminal(stderr=True, quiet=quiet)
        self._shows_bar = sys.stderr.isatty() and not quiet and not as_json
        # Seconds an update of the last lines, to estimate the time left.
        self._recent: deque[float] = deque(maxlen=20)
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            console=self._console,
            disable=not self._shows_bar,
        )
        self._task = self._progress.add_task("train", total=steps, completed=after or 0, now="")
        self._progress.start()

    def log_update(self, metrics: dict[str, Any]) -> None:
        """Write and show an update's line."""
        left = self._seconds_left(metrics)
        self._write(metrics, eta_seconds=left)
        parts = [f"{label} {metrics[name]:.4f}" for name, label in SHOWN.items() if name in metrics]
        parts.append(f"{metrics['step_seconds']:.3g} s")
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in metrics:
            parts.append(f"MFU {metrics['mfu']:.1%}")
        if left is not None:
            parts.append(f"{_duration(left)} left")
        now = "  ".join(parts)
        self._progress.update(self._task, completed=metrics["step"], now=now)
        if not self._shows_bar and not self._as_json:
            self._console.print(
                f"step {metrics['step']:>6}  {now}", highlight=False, soft_wrap=True
            )

    def log_heldout(self, metrics: dict[str, Any]) -> None:
        """Write and show a held-out evaluation's line."""
        self._write(metrics)
        if not self._as_json:
            self.say(
                f"step {metrics['step']:>6}  held out: KL ≥ {metrics['heldout_kl_bound']:.4f}, "
                f"agreement {metrics['heldout_agreement']:.1%}, CE {metrics['heldout_ce']:.4f}, "
                f"perplexity {metrics['heldout_perplexity']:,.1f}"
            )

    def say(self, text: str) -> None:
        """Print text that is no metric."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the progress bar and close the files."""
        self._progress.stop()
        self._events.close()
        self._file.close()

    def _write(self, metrics: dict[str, Any], **printed: Any) -> None:
        self._file.write(_json(metrics))
        self._file.flush()
        self._events.add(metrics)
        if self._as_json:
            tell(_json({**metrics, "steps": self._steps, **printed}), end="", flush=True)

    def _seconds_left(self, metrics: dict[str, Any]) -> float | None:
        """Estimated seconds to the last update; None at the first line (compiling included)."""
        self._recent.append(metrics["step_seconds"])
        seconds = sorted(self._recent)
        if len(seconds) < 2:
            return None
        # The lower median leaves out the first update's compilation while there are few lines.
        return round(seconds[(len(seconds) - 1) // 2] * (self._steps - metrics["step"]), 1)


def _duration(seconds: float) -> str:
    """Seconds as 4:05 or 1:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _json(metrics: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity, so both become null.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(finite) + "\n"
