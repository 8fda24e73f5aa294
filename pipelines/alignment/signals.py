"""Which targets an aligned cache gets: those that the other cache and the settings allow."""

import dataclasses
from typing import Any

from decant.pipelines.config import Align, Logits
from decant.schemas import Cache
from decant.schemas.disk.layout import COUNTS, SKETCH
from decant.schemas.signals import CountsSignal, LogitsSignal, TargetSpec


def decided_logits(
    cache: Cache, config: Align, *, size: int, teacher_size: int
) -> tuple[LogitsSignal, int]:
    """The signal `logits` without its signal_id, and N of the counts (0 for none).

    `size` and `teacher_size` are the numbers of ids of the student's tokenizer and of the other
    cache. ValueError for settings that need a sketch, if there is none.
    """
    held, own = cache.manifest.signals, cache.manifest.logits
    counts = held.get(COUNTS)
    drawn = counts.draws if isinstance(counts, CountsSignal) else 0
    sketched = SKETCH in held and own.k > 0 and config.targets == "projected"
    _require_sketch(cache, config, sketched=sketched, k=own.k, drawn=drawn)
    if config.targets == "matched":
        if not own.k:
            raise ValueError(f"{cache.address}: holds no head, which --targets matched are made of")
        spec = TargetSpec(own.k, betas=own.betas, labels=own.labels, mass=own.mass)
        # The codecs take the tail's size from the vocabulary: it should be the teacher's.
        own_ids = max(own.k, teacher_size - size)
        return _signal(own, spec, unmatched=own_ids), 0
    drawn = drawn if config.counts is None else config.counts
    if not sketched:
        mass = (own.mass or 1.0) if own.k else None
        k = min(own.k, size)
        spec = TargetSpec(k, betas=own.betas, labels=own.labels, mass=mass)
        return _signal(own, spec, tail_at_1=k > 0), drawn
    k = min(config.k or own.k, size - (config.draws > 0))
    asked = Logits(
        k=k,
        mass=None if config.draws else own.mass,
        profile=own.profile,
        draws=config.draws,
        draw_temperatures=config.draw_temperatures,
        counts=drawn,
    )
    spec = dataclasses.replace(asked.target_spec(), labels=own.labels)
    return _signal(own, spec), drawn


def _signal(own: LogitsSignal, spec: TargetSpec, **more: Any) -> LogitsSignal:
    return LogitsSignal(
        signal_id="",
        teacher_id=own.teacher_id,
        profile=own.profile,
        **vars(spec),
        **more,
    )


def _require_sketch(cache: Cache, config: Align, *, sketched: bool, k: int, drawn: int) -> None:
    """ValueError for a setting that needs the whole distribution, if there is no sketch."""
    needs = {
        "k": config.k not in (None, k),
        "draws": config.draws > 0,
        "counts": config.counts not in (None, 0, drawn)
        or (config.targets == "matched" and bool(config.counts)),
    }
    for name, asked in needs.items():
        if asked and not sketched:
            why = (
                "holds no sketch"
                if config.targets == "projected"
                else "gives --targets matched its own head alone"
            )
            raise ValueError(
                f"{cache.address}: {why}, so --{name} cannot be {getattr(config, name)}. Leave it "
                "out, or add a sketch to that cache first: the same precompute config with "
                "--signals.logits.sketch.rank 256"
            )
