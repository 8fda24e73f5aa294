"""`metrics.jsonl`, one object a line, and the same in the terminal.

A line of training has `loss`; a line of judging has `heldout_…`. Lines are in order of `step`
and no step contradicts another: going on from a checkpoint drops what came after it.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from schemas.files import write_bytes

FILE = "metrics.jsonl"
SHOWN = {
    "loss": "loss",
    "kl_loss": "kl",
    "ce_loss": "ce",
    "hidden_state_loss": "hidden",
    "attention_loss": "attention",
}
"""What of a line is for the eye too, if it is there."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run; a last line that a kill cut short is left out."""
    path = run / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; {run} is not the directory of a run")
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


class Metrics:
    """Writes a run's metrics to its file and to the terminal."""

    def __init__(self, run: Path, *, after: int | None, steps: int):
        """Go on after the checkpoint of step `after` (None: there is none) in a run of `steps`.

        Lines that an earlier life wrote after it are dropped.
        """
        path = run / FILE
        if path.exists():
            lines = read_metrics(run)
            kept = [line for line in lines if after is not None and line["step"] <= after]
            write_bytes(path, "".join(_json(line) for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("train", total=steps, completed=after or 0, now="")
        self._progress.start()

    def log(self, metrics: dict[str, Any]) -> None:
        """A line of training."""
        self._write(metrics)
        parts = [f"{label} {metrics[name]:.4f}" for name, label in SHOWN.items() if name in metrics]
        now = "  ".join([*parts, f"{metrics['tokens_per_second']:,.0f} tokens/s"])
        self._progress.update(self._task, completed=metrics["step"], now=now)
        if not sys.stderr.isatty():
            self._console.print(
                f"step {metrics['step']:>6}  {now}", highlight=False, soft_wrap=True
            )

    def judged(self, metrics: dict[str, Any]) -> None:
        """A line of judging."""
        self._write(metrics)
        self.say(
            f"step {metrics['step']:>6}  held out: KL ≥ {metrics['heldout_kl_bound']:.4f}, "
            f"agreement {metrics['heldout_agreement']:.1%}, CE {metrics['heldout_ce']:.4f}, "
            f"perplexity {metrics['heldout_perplexity']:,.1f}"
        )

    def say(self, text: str) -> None:
        """Something for the eye only."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing."""
        self._progress.stop()
        self._file.close()

    def _write(self, metrics: dict[str, Any]) -> None:
        self._file.write(_json(metrics))
        self._file.flush()


def _json(metrics: dict[str, Any]) -> str:
    # JSON has no NaN; null keeps the line readable everywhere.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(finite) + "\n"
