"""Decides the counts and the sketch of a capture whose settings leave them unset.

A new capture gets the defaults. One that has begun keeps what it began with: a release with other
defaults neither refuses to go on, nor runs the teacher again for signals that nobody asked for.
"""

import dataclasses
from pathlib import Path

from decant.pipelines.config import RANK, Logits, Precompute, Sketch
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.layout import COUNTS, SKETCH, part_layout
from decant.schemas.disk.stand_in import exists
from decant.schemas.manifest.manifest import Manifest
from decant.schemas.signals import CountsSignal, SketchSignal


def decide_signals(
    config: Precompute, *, width: int, manifest: Manifest | None
) -> tuple[Precompute, str]:
    """The settings with counts and sketch decided, and a line if the rank is not the usual one.

    `width` is the teacher's; `manifest` that of the output, None if nothing is sealed there.
    """
    logits = config.signals.logits
    if held := _held(config.output, manifest):
        decided, line = logits.filled(*held), ""
    else:
        decided = logits.decided(width=width)
        line = _rank_line(logits, decided, width=width)
    signals = dataclasses.replace(config.signals, logits=decided)
    return dataclasses.replace(config, signals=signals), line


def _held(cache: Path, manifest: Manifest | None) -> tuple[int, Sketch] | None:
    """The counts and the sketch that the cache has, or was begun with; None if it is new."""
    if manifest:
        counts, sketch = (manifest.signals.get(name) for name in (COUNTS, SKETCH))
        draws = counts.draws if isinstance(counts, CountsSignal) else 0
        return draws, _settings_of(sketch) if isinstance(sketch, SketchSignal) else Sketch(0)
    request = part_layout(cache, 0).request
    if not exists(request):
        return None
    begun = read_json(request)  # release 0.9 and older wrote neither
    sketch = begun.get(SKETCH)
    return begun.get(COUNTS) or 0, Sketch(**sketch) if sketch else Sketch(0)


def _settings_of(signal: SketchSignal) -> Sketch:
    full = signal.rank == signal.teacher_width
    rank = "full" if full else signal.asked_rank or signal.rank
    return Sketch(rank, signal.step, signal.dither)


def _rank_line(asked: Logits, decided: Logits, *, width: int) -> str:
    rank = decided.sketch.rank
    if asked.sketch.rank is not None or rank in (0, RANK):
        return ""
    return (
        f"{SKETCH}: {rank} numbers a position, half of this teacher's width of {width}; "
        "signals.logits.sketch.rank sets another number"
    )
