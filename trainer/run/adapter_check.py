"""Whether a run's student can have the adapter that is asked for, before any weights are read."""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from decant.models import Decoder
from decant.models.checkpoints.peft_saving import inseparable
from decant.schemas import Cache
from decant.trainer.config import Student
from decant.trainer.run.adapter import AdapterRecord
from decant.trainer.run.initial_student import initial_config


def check_adapter(config: Student, *, cache: Cache, run: Path) -> str | None:
    """A line for the log if the adapter can only be exported merged, else None.

    ValueError for a target that the student lacks, and for a student that can have no adapter.
    """
    adapter = AdapterRecord.of(config, seed=0)
    if adapter is None:
        return None
    shape, _ = initial_config(config, cache=cache, run=run)
    model = nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0)))
    together = inseparable(model, adapter.lora)
    if not together:
        return None
    return (
        f"files of this student hold {', '.join(together)} together with other matrices, so PEFT "
        f"has no adapter for {'it' if len(together) == 1 else 'them'} alone. Export the run with "
        f"`decant export {run} --adapter merged`, or choose other student.adapter.targets"
    )
