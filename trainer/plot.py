"""A picture of what students learned: their held-out curves side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.binding import settings_of
from trainer.config import Plot
from trainer.metrics import read_metrics

PANELS = {
    "heldout_kl_bound": "KL to the teacher, nats a token (lower bound)",
    "heldout_ce": "cross-entropy, nats a token",
    "heldout_agreement": "agreement with the teacher's first choice",
}


def plot(config: Plot) -> Path:
    """Write the picture and return its path."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(14, 4.2), layout="constrained")
    for run in config.runs:
        lines = [line for line in read_metrics(run) if "heldout_ce" in line]
        steps = [line["step"] for line in lines]
        for axis, name in zip(axes, PANELS, strict=True):
            axis.plot(steps, [line[name] for line in lines], marker="o", ms=3, label=_label(run))
    for axis, title in zip(axes, PANELS.values(), strict=True):
        _leave_out_the_start(axis)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("updates")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.suptitle(
        "Held-out rows, never trained on (values before the first update may lie outside)",
        fontsize=11,
    )
    config.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output, dpi=130)
    pyplot.close(figure)
    return config.output


def _leave_out_the_start(axis: Any) -> None:
    """Fit the height to all but each curve's first value, which dwarfs the others when cut."""
    later = np.concatenate([line.get_ydata()[1:] for line in axis.get_lines()])
    if len(later) > 1 and np.ptp(later) > 0:
        margin = 0.05 * np.ptp(later)
        axis.set_ylim(later.min() - margin, later.max() + margin)


def _label(run: Path) -> str:
    settings = settings_of(run)
    alpha, temperature = settings["loss.alpha"], settings["loss.temperature"]
    kind = "hard labels only" if alpha == 0 else f"distilled, α = {alpha:g}, T = {temperature:g}"
    for term, name in (("hidden", "hidden states"), ("attention", "attention maps")):
        if f"loss.{term}[0].weight" in settings:
            kind = f"{kind.removesuffix(' only')}, {name}"
    return f"{run.name}: {kind}"
