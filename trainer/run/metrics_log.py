"""Logs a run's metrics: to `metrics.jsonl`, to TensorBoard events and to the terminal.

`metrics.jsonl` holds one JSON object a line. An update's line has `loss`, a held-out evaluation's
line has `heldout_…`. Lines are in order of `step`; a run that continues from a checkpoint drops the
lines after it, so no two lines contradict each other.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from decant.progress import LINE_SECONDS, duration, notices
from decant.schemas.disk.atomic import write_bytes
from decant.trainer.judging.headline import common_estimate
from decant.trainer.judging.teacher_reference import teacher_ce
from decant.trainer.run.tensorboard import EventFile

FILE = "metrics.jsonl"
Callback = Callable[[dict[str, Any]], object]
"""Called with the metrics of a line: those of an update (`loss`), or held-out ones."""
SHOWN = {
    "loss": "loss",
    "kl_loss": "kl",
    "ce_loss": "ce",
    "advantage": "advantage",
    "ratio": "ratio",
    "clipped": "clipped",
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


@dataclass(frozen=True)
class Place:
    """A run's place in a sweep."""

    name: str
    number: int
    """Of this student, from 1."""
    of: int
    """Number of students."""
    updates_after: int
    """Updates of the students that are trained after this one."""

    def __str__(self) -> str:
        return f"{self.name} ({self.number} of {self.of})"


class MetricsLog:
    """Writes a run's metrics to its files and prints them."""

    def __init__(
        self,
        run: Path,
        *,
        after: int | None,
        steps: int,
        quiet: bool = False,
        place: Place | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        """Open the files of a run of `steps` updates.

        `after` is the step of the checkpoint that the run continues from, None if there is none;
        lines after it are dropped. With `quiet` nothing is printed. `place` is the run's place in a
        sweep. Each of `callbacks` gets every line. Without a terminal there is a line for an update
        every half minute, and for the first and the last.
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
        self._steps, self._place, self._callbacks = steps, place, callbacks
        self._head = f"{place}: " if place else ""
        self._console = notices(quiet=quiet)
        self._shows_bar = self._console.is_terminal and not quiet
        self._printed: dict[str, float] = {}
        """When the last line of each kind was printed."""
        # Seconds an update of the last lines, to estimate the time left.
        self._recent: deque[float] = deque(maxlen=20)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            console=self._console,
            disable=not self._shows_bar,
        )
        name = str(place or "train")
        self._task = self._progress.add_task(name, total=steps, completed=after or 0, now="")
        self._progress.start()

    def log_update(self, metrics: dict[str, Any]) -> None:
        """Write and show an update's line."""
        each = self._seconds_an_update(metrics)
        self._write(metrics)
        parts = [f"{label} {metrics[name]:.4f}" for name, label in SHOWN.items() if name in metrics]
        parts.append(f"{metrics['step_seconds']:.3g} s")
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in metrics:
            parts.append(f"MFU {metrics['mfu']:.1%}")
        if each is not None:
            updates = self._steps - metrics["step"]
            parts.append(f"{duration(each * updates)} left")
            if self._place:
                # The students to come are taken to be as slow as this one.
                whole = each * (updates + self._place.updates_after)
                parts.append(f"{duration(whole)} of the sweep")
        now = "  ".join(parts)
        self._progress.update(self._task, completed=metrics["step"], now=now)
        if not self._shows_bar and self._is_due("update", metrics["step"]):
            self.say(f"step {metrics['step']:>6} of {self._steps:,}  {now}")

    def log_heldout(self, metrics: dict[str, Any]) -> None:
        """Write and show a held-out evaluation's line."""
        self._write(metrics)
        if self._shows_bar or self._is_due("held out", metrics["step"]):
            estimate, teacher = common_estimate([metrics]), teacher_ce(metrics)
            bits = metrics.get("heldout_bits_per_byte")
            self.say(
                f"step {metrics['step']:>6} of {self._steps:,}  held out: "
                f"{estimate.title} {metrics[estimate.metric]:.4f}, "
                f"agreement {metrics['heldout_agreement']:.1%}, CE {metrics['heldout_ce']:.4f}"
                + (f" (the teacher's {teacher})" if teacher else "")
                + f", perplexity {metrics['heldout_perplexity']:,.1f}"
                + (f", {bits:.4f} bits/byte" if bits is not None else "")
            )

    def say(self, text: str) -> None:
        """Print text that is no metric."""
        self._console.print(self._head + text)

    def close(self) -> None:
        """Stop the progress bar and close the files."""
        self._progress.stop()
        self._events.close()
        self._file.close()

    def _is_due(self, kind: str, step: int) -> bool:
        """Whether a line of this kind is due: the first, the last, or after half a minute."""
        now = time.monotonic()
        due = now - self._printed.get(kind, -math.inf) >= LINE_SECONDS or step == self._steps
        if due:
            self._printed[kind] = now
        return due

    def _write(self, metrics: dict[str, Any]) -> None:
        self._file.write(_json(metrics))
        self._file.flush()
        self._events.add(metrics)
        for callback in self._callbacks:
            callback(dict(metrics))

    def _seconds_an_update(self, metrics: dict[str, Any]) -> float | None:
        """Seconds an update takes; None at the first line (compiling included)."""
        self._recent.append(metrics["step_seconds"])
        seconds = sorted(self._recent)
        if len(seconds) < 2:
            return None
        # The lower median leaves out the first update's compilation while there are few lines.
        return seconds[(len(seconds) - 1) // 2]


def _json(metrics: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity, so both become null.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(finite) + "\n"
