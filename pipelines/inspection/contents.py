"""The contents of a sealed cache: rows by split, bytes by signal, how sure the teacher was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from decant.pipelines.inspection.entropy import entropies
from decant.schemas import Cache
from decant.schemas.disk.layout import LOGITS, ROWS
from decant.schemas.manifest.manifest import SPLITS
from decant.schemas.signals import AttentionSignal, HiddenSignal, LogitsSignal, Signal

_BAR_WIDTH = 40


def splits_table(cache: Cache) -> Table:
    """Rows, tokens, positions with targets and units of each split."""
    units = [unit for part in cache.manifest.parts for unit in part.units]
    table = Table("split", "rows", "tokens", "with targets", "units", title=str(cache.path))
    for split in SPLITS:
        of_split = [unit for unit in units if unit.split == split]
        totals = (sum(getattr(u, name) for u in of_split) for name in ("rows", "tokens", "scored"))
        table.add_row(split, *(f"{total:,}" for total in totals), f"{len(of_split):,}")
    return table


def forgotten_summary(cache: Cache) -> str:
    """One line on forgotten documents, files and rows; empty if nothing was forgotten."""
    parts = cache.manifest.parts
    once = {(part.path, place) for part in parts for place in part.forgotten}
    documents = sum(place.document is not None for _, place in once)
    files, rows = len(once) - documents, sum(len(part.forgotten_rows) for part in parts)
    if not once:
        return ""
    counts = [f"{n:,} {name}{'s' * (n != 1)}" for n, name in ((documents, "document"),) if n]
    counts += [f"{n:,} whole file{'s' * (n != 1)}" for n in (files,) if n]
    return f"forgotten: {' and '.join(counts)}; {rows:,} rows held nothing else and are left out"


def sizes_table(cache: Cache, sample: Sequence[int] | np.ndarray) -> Table:
    """Bytes on disk of each signal; logits also by field, measured on the rows `sample`."""
    manifest = cache.manifest
    units = [unit for part in manifest.parts for unit in part.units]
    sizes = Counter[str]()
    for unit in units:
        sizes.update({name: entry.bytes for name, entry in unit.files.items()})
    scored = max(1, sum(unit.scored for unit in units))
    table = Table("signal", "what", "MB", "bytes a target", title="where the bytes go")
    for name in (ROWS, *manifest.signals):
        what = _describe(manifest.signals[name]) if name in manifest.signals else "tokens"
        table.add_row(name, what, f"{sizes[name] / 1e6:,.1f}", f"{sizes[name] / scored:,.1f}")
        if name == LOGITS and len(sample):
            fields = cache.logits_bytes(sample)
            targets = int(cache.read(sample, signals=())["loss_mask"].sum())
            each = {field: size / max(1, targets) for field, size in fields.items()}
            each["files' own"] = sizes[name] / scored - sum(each.values())
            for field, size in each.items():
                table.add_row("", f"  {field}", "", f"{size:,.1f}", style="dim")
    return table


def histograms(cache: Cache, sample: Sequence[int] | np.ndarray) -> str:
    """Histograms over the targets of the rows `sample`: entropy, and mass outside the top-k."""
    batch = cache.read(sample)
    scored = batch["loss_mask"]
    tails = batch["tail_logmass"][scored]
    entropy = entropies(batch["topk_logprobs"][scored], tails)
    mass = np.exp(tails[:, -1])
    n = f"{int(scored.sum()):,} targets of {len(sample)} rows"
    return "\n".join(
        [
            f"teacher's entropy, nats; mean {entropy.mean():.2f}  ({n})",
            *_histogram(entropy, np.arange(0, 11), "{:4.0f}"),
            f"mass outside the stored ids at T = 1; mean {mass.mean():.3f}",
            *_histogram(mass, np.linspace(0, 1, 11), "{:4.1f}"),
        ]
    )


def _histogram(values: np.ndarray, edges: np.ndarray, form: str) -> list[str]:
    """One line a bin; values beyond the last edge count in the last bin."""
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    shares = counts / max(1, counts.sum())
    widest = max(shares.max(), 1e-9)
    lines = []
    for low, high, share in zip(edges[:-1], edges[1:], shares, strict=True):
        bar = "█" * round(_BAR_WIDTH * share / widest)
        lines.append(f"  {form.format(low)} – {form.format(high)}  {bar:{_BAR_WIDTH}} {share:6.1%}")
    return lines


def _describe(signal: Signal) -> str:
    if isinstance(signal, LogitsSignal):
        draws = f", {signal.draws} draws" if signal.draws else ""
        return f"{signal.profile}, k = {signal.k}{draws}"
    if isinstance(signal, HiddenSignal):
        kept = f", {signal.variance_kept:.1%} of variance" if signal.directions else ""
        return f"{signal.dtype}, width {signal.width} of {signal.teacher_width}{kept}"
    assert isinstance(signal, AttentionSignal)
    return f"{signal.dtype}, {signal.stored_heads} of {signal.teacher_heads} heads"
