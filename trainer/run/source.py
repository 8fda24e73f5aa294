"""The model that a student is made of: a checkpoint, or what another run has trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx

from decant.models import Checkpoint, Decoder, ModelConfig, open_checkpoint
from decant.models.checkpoints.adapters import merged
from decant.models.numerics import dtype_named
from decant.models.text.tokenizer import Tokenizer
from decant.trainer.run.adapter import read_adapter
from decant.trainer.run.binding import BINDING
from decant.trainer.run.saved_initial import INITIAL, open_initial
from decant.trainer.run.trained_student import load_student


@dataclass(frozen=True)
class StudentOfRun:
    """The student of a run's last checkpoint, with the methods of a `Checkpoint`."""

    run: Path

    @property
    def name(self) -> str:
        """Path of the run."""
        return str(self.run)

    @property
    def config(self) -> ModelConfig:
        """The student's shape."""
        return open_initial(self.run).config

    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer."""
        return open_initial(self.run).tokenizer()

    def load(self, *, dtype: str, param_dtype: str) -> Decoder:
        """The student, an adapter merged; ValueError if its checkpoint is damaged."""
        model = nnx.merge(*load_student(self.run, dtype=dtype))
        whole = merged(model) if read_adapter(self.run / INITIAL) else model
        kept = dtype_named(param_dtype)
        nnx.update(whole, jax.tree.map(lambda x: x.astype(kept), nnx.state(whole, nnx.Param)))
        return whole


Source = Checkpoint | StudentOfRun


def open_source(name: str) -> Source:
    """The model called `name`, as `student.source` says it, or a run's directory."""
    run = Path(name)
    is_run = (run / BINDING).is_file() and (run / INITIAL).is_dir()
    return StudentOfRun(run) if is_run else open_checkpoint(name)
