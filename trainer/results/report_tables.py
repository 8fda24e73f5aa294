"""The report's tables of measures: a short one that fits a phone, and all measures of each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from decant.foreign import escaped
from decant.trainer.judging.headline import ESTIMATES, Estimate, common_estimate
from decant.trainer.judging.standard_error import paired_difference
from decant.trainer.judging.teacher_reference import teacher_ce, teacher_sign
from decant.trainer.results.charts import colour, dashes
from decant.trainer.results.run_summary import ABSENT, RunSummary
from decant.trainer.results.seed_groups import Group

SIDE_BY_SIDE = 4
"""Most runs that the table of all measures shows as columns; more runs are shown as lines."""
_STYLES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}


@dataclass(frozen=True)
class Measure:
    """A figure of a run."""

    name: str
    unit: str
    value: Callable[[RunSummary], Any]
    form: str
    better: int = 0
    """−1: lower is better, 1: higher is better, 0: neither."""


def _metric(name: str, unit: str, metric: str, form: str, better: int) -> Measure:
    return Measure(name, unit, lambda run: run.measure(metric), form, better)


def _of(estimate: Estimate) -> Measure:
    return _metric(estimate.title, "nats a token", estimate.metric, "{:.4f}", -1)


CE = _metric("CE", "nats a token", "heldout_ce", "{:.4f}", -1)
AGREEMENT = _metric("top-1", "same as the teacher", "heldout_agreement", "{:.1%}", 1)
MINUTES = Measure(
    "trained", "minutes", lambda r: max(r.seconds.values(), default=0) / 60 or None, "{:,.1f}"
)
UPDATES = Measure("updates", "", lambda r: r.updates[-1]["step"] if r.updates else None, "{:,.0f}")
ALL = (
    Measure("judged on", "", lambda r: r.judged_on, "{}"),
    UPDATES,
    *map(_of, ESTIMATES),
    _metric("standard error", "of the headline", "heldout_kl_error", "{:.4f}", 0),
    CE,
    _metric("bits/byte", "of text", "heldout_bits_per_byte", "{:.4f}", -1),
    _metric("perplexity", "", "heldout_perplexity", "{:,.1f}", -1),
    AGREEMENT,
    _metric("top-5", "shared with it", "heldout_top5_agreement", "{:.1%}", 1),
    _metric("right", "next token", "heldout_accuracy", "{:.1%}", 1),
    _metric("ECE", "", "heldout_ece", "{:.3f}", -1),
    _metric("accepted", "as a draft", "heldout_acceptance", "{:.1%}", 0),
    Measure("read", "bytes a token", lambda r: r.bytes_per_token, "{:,.1f}"),
    Measure("update", "µs a token", lambda r: r.microseconds_per_token, "{:,.1f}"),
    MINUTES,
    Measure("MFU", "", lambda r: _last(r, "mfu"), "{:.1%}"),
)
"""All measures, in the order of the table that is folded away."""
SMALL_SCREENS_LACK = ("updates", "minutes", "behind")
"""Columns of the short table that a phone has no room for."""


def summary(groups: Sequence[Group]) -> str:
    """What was measured, the short table, and notes on how far its lines can be compared."""
    runs = [run for group in groups for run in group.runs]
    judged = [run.judgement for run in runs if run.judgement]
    kl = common_estimate(judged)
    on = {run.judged_on for run in runs if run.judged_on}
    where = f"Judged on {on.pop()}" if len(on) == 1 else "Judged on different rows: see below"
    seeds = any(len(group.runs) > 1 for group in groups)
    text = (
        f"{where.replace('Judged on while', 'Judged while')}. {kl.title}: {kl.meaning}. "
        "No run was trained on these rows."
        + (" Of several seeds: the mean, and the lowest and highest KL." if seeds else "")
    )
    return "\n".join(
        [f'<p class="note">{escaped(text)}</p>', _warning(runs), _short_table(groups, kl)]
    )


def _warning(runs: Sequence[RunSummary]) -> str:
    """A note if the runs were judged against different teachers, or on different rows."""
    if len(_teachers(runs)) > 1:
        return (
            "<p><strong>These runs were judged against different teachers</strong> (see “judged "
            "on”), so their figures say nothing about which is better.</p>"
        )
    if not _comparable(runs):
        return (
            "<p><strong>These runs were judged on different rows</strong>, so none is marked as "
            "the best. Run <code>decant evaluate</code> on each.</p>"
        )
    return ""


def _comparable(runs: Sequence[RunSummary]) -> bool:
    """Whether all were judged against one teacher, as far as they say, on as many positions."""
    tokens = {run.measure("heldout_tokens") for run in runs if run.judgement}
    return len(_teachers(runs)) <= 1 and len(tokens) <= 1


def _teachers(runs: Sequence[RunSummary]) -> set[str]:
    return {run.judged_against for run in runs if run.judged_against}


def _short_table(groups: Sequence[Group], kl: Estimate) -> str:
    runs = [run for group in groups for run in group.runs]
    headline = _of(kl)
    ranked = len(groups) > 1 and _comparable(runs)
    means = [group.mean(headline.value) for group in groups]
    first = min((x for x in means if x is not None), default=None)
    best = next((g for g, x in zip(groups, means, strict=True) if x == first), None)
    errors = any(run.measure("heldout_kl_error") for run in runs)
    behind = ranked and errors and best is not None and len(best.runs) == 1
    shown = [headline, CE, AGREEMENT]
    head = ["run", *(f"{escaped(m.name)}<br><small>{escaped(m.unit)}</small>" for m in shown)]
    classes = ["", *[""] * len(shown)]
    if behind:
        head.insert(2, "behind<br><small>row by row</small>")
        classes.insert(2, "behind")
    for measure in (UPDATES, MINUTES):
        if any(measure.value(run) is not None for run in runs):
            head.append(f"{measure.name}<br><small>{measure.unit}</small>")
            classes.append(measure.unit or measure.name)
            shown.append(measure)
    rows = []
    for group in groups:
        cells = [_shown(group, m, best=ranked and _is_best(groups, group, m)) for m in shown]
        if behind:
            cells.insert(1, cell(_behind(group, best, by=kl.name)))
        rows.append([named(group), *cells])
    if line := teachers_line(groups):
        rows.append(line(shown, behind))
    small = [at for at, name in enumerate(classes) if name in SMALL_SCREENS_LACK]
    return table(head, rows, small=small)


def _is_best(groups: Sequence[Group], group: Group, measure: Measure) -> bool:
    known = [x for each in groups if (x := each.mean(measure.value)) is not None]
    if not measure.better or not known:
        return False
    return group.mean(measure.value) == (max(known) if measure.better > 0 else min(known))


def _shown(group: Group, measure: Measure, *, best: bool) -> str:
    """The mean over a group's runs; for the headline also its error, or the runs' range."""
    value = group.mean(measure.value)
    if value is None:
        return cell(ABSENT)
    text = measure.form.format(value)
    if measure.name.startswith("KL"):
        values, error = group.values(measure.value), group.runs[0].measure("heldout_kl_error")
        if len(values) > 1:
            text += f"<br><small>{min(values):.4f} – {max(values):.4f}</small>"
        elif error and group.runs[0].measure("heldout_kl") == values[0]:
            text += f"<br><small>± {error:.4f}</small>"
    return cell(text, best=best)


def _behind(group: Group, best: Group | None, *, by: str) -> str:
    if best is None or group is best or len(group.runs) != 1:
        return ""
    found = paired_difference(group.runs[0].judgement, best.runs[0].judgement, by=by)
    if found is None:
        return ABSENT
    difference, error = found
    return f"{difference:.4f}<br><small>± {error:.4f}</small>"


def teachers_line(
    groups: Sequence[Group],
) -> Callable[[Sequence[Measure], bool], list[str]] | None:
    """The teacher's line of the short table; None unless the runs agree on its figures."""
    runs = [run for group in groups for run in group.runs]
    found = {teacher_ce(run.judgement): run.judgement for run in runs if run.judgement}
    if len(found) != 1 or None in found:
        return None
    ((text, judgement),) = found.items()
    perplexity = math.exp(judgement["heldout_teacher_ce"])
    known = f"{judgement['heldout_teacher_known']:.1%} of its next tokens are stored"
    title = f"perplexity {teacher_sign(judgement)}{perplexity:,.1f}; {known}"

    def line(shown: Sequence[Measure], behind: bool) -> list[str]:
        values = {CE.name: text, AGREEMENT.name: "100%"}
        cells = [cell("0" if m.name.startswith("KL") else values.get(m.name) or "") for m in shown]
        if behind:
            cells.insert(1, cell(""))
        name = f'<span class="line teacher"></span>the teacher<br><small>{escaped(title)}</small>'
        return [cell(name, head=True), *cells]

    return line


def all_measures(groups: Sequence[Group]) -> str:
    """Every measure of every run: few runs as columns; more runs as lines."""
    runs = [(group.number, run) for group in groups for run in group.runs]
    ranked = len(runs) > 1 and _comparable([run for _, run in runs])
    rows = [[cell(chip(number) + escaped(run.name), head=True)] for number, run in runs]
    head = ["run"]
    for measure in ALL:
        values = [measure.value(run) for _, run in runs]
        if all(value is None for value in values):
            continue
        unit = f" <small>{escaped(measure.unit)}</small>" if measure.unit else ""
        head.append(escaped(measure.name) + unit)
        known = [value for value in values if value is not None]
        best = None
        if ranked and measure.better:
            best = max(known) if measure.better > 0 else min(known)
        for row, value in zip(rows, values, strict=True):
            marked = best is not None and value == best
            row.append(cell(_formatted(value, measure.form), best=marked))
    if len(runs) > SIDE_BY_SIDE:
        return table(head, rows)
    sides = [chip(number) + escaped(run.name) for number, run in runs]
    kinds = [cell("loss", head=True), *(cell(_wrapped(run.kind)) for _, run in runs)]
    turned = [
        [cell(text, head=True), *cells]
        for text, cells in zip(head[1:], zip(*(row[1:] for row in rows), strict=True), strict=True)
    ]
    return table(["", *sides], [kinds, *turned])


def named(group: Group) -> str:
    """A group's name with its colour, and its loss in a few words."""
    name = chip(group.number) + escaped(group.name)
    return cell(f"{name}<br><small>{escaped(group.runs[0].kind)}</small>", head=True)


def chip(number: int) -> str:
    """The line of a group as the charts draw it."""
    style = f"border-top-color:{colour(number)};border-top-style:{_STYLES[dashes(number)]}"
    return f'<span class="line" style="{style}"></span>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: bool = False,
    small: Iterable[int] = (),
) -> str:
    """A table of cells. `small`: the columns, by number, that small screens leave out."""
    first = "".join(f"<th>{text}</th>" for text in head)
    rest = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    kind = " ".join(["left"] * left + [f"small-{number}" for number in small])
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{first}</tr></thead>'
        f"<tbody>{rest}</tbody></table></div>"
    )


def cell(text: str, *, head: bool = False, best: bool = False) -> str:
    """A cell that holds HTML."""
    if head:
        return f"<th>{text}</th>"
    return f'<td class="best">{text}</td>' if best else f"<td>{text}</td>"


def _wrapped(text: str) -> str:
    return f'<div class="wrap">{escaped(text)}</div>'


def _formatted(value: Any, form: str) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, list):
        return " – ".join(form.format(x) for x in value)
    return _wrapped(value) if isinstance(value, str) else form.format(value)


def _last(run: RunSummary, name: str) -> Any:
    return next((line[name] for line in reversed(run.updates) if name in line), None)
