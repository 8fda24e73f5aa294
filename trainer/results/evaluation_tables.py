"""An evaluation as tables for the terminal: the headline, then all estimates of the KL."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from decant.trainer.judging.headline import ESTIMATES, PREFIX, common_estimate
from decant.trainer.judging.teacher_reference import teacher_ce, teacher_sign
from decant.trainer.results.judged_on import describe

COLUMNS = {
    "ce": ("CE", "{:.4f}"),
    "perplexity": ("perplexity", "{:,.1f}"),
    "agreement": ("top-1", "{:.1%}"),
    "top5_agreement": ("top-5", "{:.1%}"),
    "accuracy": ("right", "{:.1%}"),
    "ece": ("ECE", "{:.3f}"),
}
"""Columns of the table after the headline: measure, title and format."""


def as_table(evaluation: dict[str, Any]) -> Table:
    """An evaluation as a table for the terminal: the headline KL and what all students have."""
    estimate, whole = common_estimate([evaluation]), _without_prefix(evaluation)
    table = Table(title=describe(evaluation), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("positions", no_wrap=True)
    for name in ("tokens", estimate.title, *(title for title, _ in COLUMNS.values()), "acceptance"):
        table.add_column(name, justify="right")

    def add(label: str, means: dict[str, Any], **style: Any) -> None:
        cells = [form.format(means[name]) for name, (_, form) in COLUMNS.items()]
        low, high = means["acceptance"]
        kl = f"{means[estimate.measure]:.4f}"
        if means.get("kl_error"):
            kl += f" ± {means['kl_error']:.4f}"
        table.add_row(label, f"{means['tokens']:,}", kl, *cells, f"{low:.1%} – {high:.1%}", **style)

    teacher = teacher_ce(evaluation)
    add("all", whole, end_section=teacher is None)
    if teacher:
        accuracy = f"{whole['teacher_accuracy']:.1%}"
        value = math.exp(whole["teacher_ce"])
        perplexity = f"{teacher_sign(evaluation)}{value:,.1f}"
        row = ("the teacher", "", "0", teacher, perplexity, "", "", accuracy, "", "")
        table.add_row(*row, end_section=True)
    for means in evaluation["by_frequency"]:
        last = means is evaluation["by_frequency"][-1]
        add(f"next token {means['frequency']}", means, end_section=last)
    for means in evaluation["by_position"]:
        add(f"at {position_range(means)}", means)
    if "bits_per_byte" in whole:
        table.caption = f"all labels: {whole['bits_per_byte']:.4f} bits per byte of text"
    return table


def details_table(evaluation: dict[str, Any]) -> Table:
    """All estimates of the KL, each with its meaning, at T = 1 and at the training temperature."""
    whole, temperature = _without_prefix(evaluation), evaluation["temperature"]
    table = Table(title="all estimates of the KL, in nats a token", box=SIMPLE_HEAD)
    for name in ("estimate", "T = 1", *([f"T = {temperature:g}"] if temperature != 1 else [])):
        table.add_column(name, justify="left" if name == "estimate" else "right")
    table.add_column("meaning")
    for each in ESTIMATES:
        if each.measure in whole:
            cells = [f"{whole[each.measure]:.4f}"]
            if temperature != 1:
                warm = whole.get(f"{each.measure}_at_temperature")
                cells.append("" if warm is None else f"{warm:.4f}")
            table.add_row(each.title, *cells, each.meaning)
    return table


def _without_prefix(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(PREFIX): v for k, v in evaluation.items() if k.startswith(PREFIX)}


def position_range(means: dict[str, Any]) -> str:
    """A group's positions as text: `0`, `4–7`."""
    start, end = means["position_from"], means["position_to"]
    return str(start) if start == end else f"{start}–{end}"
