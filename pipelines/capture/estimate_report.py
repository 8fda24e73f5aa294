"""Prints an estimate as a table for people."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from decant.pipelines.capture.estimate import Estimate
from decant.schemas.disk.sizes import size_text


def print_estimate(total: Estimate, console: Console) -> None:
    """Print counts, a table of signals, time and memory."""
    console.print(
        f"{total.sources:,} files, {size_text(total.source_bytes)} "
        f"({size_text(total.tokenised_bytes)} were tokenised): {total.rows:,} rows, "
        f"{total.heldout_rows:,} of them held out, "
        f"{total.tokens:,} tokens, {total.units:,} units of {total.unit_rows:,} rows"
    )
    for place, cost in total.remote.items():
        console.print(f"from {place}: {cost.files:,} files, {size_text(cost.bytes)}", markup=False)
    _print_documents(total, console)
    table = Table("signal", "files", "bytes", "a token", box=SIMPLE_HEAD)
    for name, cost in total.signals.items():
        each = f"{cost.bytes / total.tokens:,.1f}"
        table.add_row(name, f"{cost.files:,}", size_text(cost.bytes), each)
    each = f"{total.bytes / total.tokens:,.1f}"
    table.add_row("with commits", f"{total.files:,}", size_text(total.bytes), each)
    console.print(table)
    _print_bucket(total, console)
    console.print(
        f"tokenising {_time(total.tokenise_hours)}, capture {_time(total.capture_hours)} at "
        f"{total.tokens_a_second:,.0f} tokens/s, as {total.measured_rows} rows took here"
    )
    console.print(
        f"memory: batches of {total.batch_rows} rows take {size_text(total.device_bytes)} of each "
        f"device's {size_text(total.device_has)}; this host {size_text(total.host_bytes)} of "
        f"{size_text(total.host_has)}"
        + (f"; disk free: {size_text(total.disk_free)}" if total.disk_free else "")
    )
    for warning in total.warnings:
        console.print(warning)


def _print_bucket(total: Estimate, console: Console) -> None:
    """Two lines on a cache in a bucket."""
    if (cost := total.bucket) is None:
        return
    region = f" (region {cost.region})" if cost.region else ""
    console.print(
        f"to {cost.address}{region}: {cost.objects:,} objects; the capture sends "
        f"{size_text(cost.capture.bytes)} by {cost.capture.put:,} PUT, and looks by "
        f"{cost.capture.get:,} GET or HEAD",
        markup=False,
    )
    console.print(
        f"a first epoch from there: {size_text(cost.epoch.bytes)} by at most {cost.epoch.get:,} "
        f'GET; with data.shuffle = "blocks" {size_text(cost.epoch_in_blocks.bytes)} by '
        f"{cost.epoch_in_blocks.get:,}. Later ones come from the mirror, as far as it holds them",
        markup=False,
    )


def one_line(total: Estimate) -> str:
    """The estimate's totals, or why the capture will not fit."""
    if total.problems:
        return f"the capture will not fit: {'; '.join(total.problems)}"
    return (
        f"the capture will take about {_time(total.tokenise_hours + total.capture_hours)} here and "
        f"{size_text(total.bytes)} in {total.files:,} files"
    )


def _print_documents(total: Estimate, console: Console) -> None:
    """A line for each kind of document, with the text that a student sees of one."""
    for kind, known in total.documents.items():
        learned = f"{known.learned:,} of them learned from" if known.tokens else "none readable"
        console.print(
            f"{kind}: {known.documents:,} documents, {size_text(known.bytes)}, about "
            f"{known.tokens:,} tokens, {learned}. One of them, learned from in «»:"
        )
        for line in known.sample.splitlines():
            console.print(f"    {line}")


def _time(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.1f} min"
