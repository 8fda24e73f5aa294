"""What a model is: its family, parameters and bytes, from its config and its files' headers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from decant.models import Checkpoint, open_checkpoint
from decant.models.parameters import parameters_by_path
from decant.schemas.disk.sizes import size_text


@dataclass(frozen=True)
class ModelFacts:
    """A model that can be run; the JSON document of `plan MODEL --json`."""

    model: str
    """Its name, a hub id with its commit."""
    family: str
    parameters: int
    """Numbers of the text model, a tied embedding once."""
    weight_bytes: int
    """Size of its weight files, with all that is in them."""
    kinds: tuple[str, ...]
    """Number formats of the weights, the commonest first."""
    memory_bytes: dict[str, int]
    """What the weights take in memory, by `teacher.dtype`."""
    layers: int
    width: int
    longest_row: int
    """The most tokens that `corpus.sequence_length` may be."""
    unread_tensors: int
    """Tensors of other parts than the text model."""

    @property
    def line(self) -> str:
        """The facts in a sentence or two."""
        memory = ", ".join(f"{size_text(n)} in {kind}" for kind, n in self.memory_bytes.items())
        unread = (
            f" Its {self.unread_tensors:,} tensors of other parts than the text model are not read."
            if self.unread_tensors
            else ""
        )
        return (
            f"{self.model}: family {self.family}, {self.parameters:,} parameters in {self.layers} "
            f"layers of width {self.width:,}, rows of up to {self.longest_row:,} tokens. Weights "
            f"take {size_text(self.weight_bytes)} on disk ({', '.join(self.kinds)}), and {memory} "
            f"in memory.{unread}"
        )


def look_at_model(name: str) -> ModelFacts:
    """The facts of a Hugging Face directory, a GGUF file, a hub id or `embedded`.

    FileNotFoundError or ValueError if it is none, or a model that we cannot run.
    """
    checkpoint = open_checkpoint(name)
    config, parameters = checkpoint.config, parameter_count(checkpoint)
    return ModelFacts(
        model=checkpoint.name,
        family=config.family,
        parameters=parameters,
        weight_bytes=checkpoint.files.weight_bytes,
        kinds=number_formats(checkpoint),
        memory_bytes={"float32": 4 * parameters, "bfloat16": 2 * parameters},
        layers=config.num_layers,
        width=config.hidden_size,
        longest_row=config.longest_row,
        unread_tensors=len(checkpoint.files.unread),
    )


def parameter_count(checkpoint: Checkpoint) -> int:
    """Numbers of the model; no weight is read."""
    parameters = parameters_by_path(checkpoint.abstract()).values()
    return sum(math.prod(p.get_value().shape) for p in parameters)


def number_formats(checkpoint: Checkpoint) -> tuple[str, ...]:
    """How the weights' numbers are stored, such as "BF16", the commonest first."""
    shapes = checkpoint.files.shapes
    sizes: Counter[str] = Counter()
    for name, kind in checkpoint.files.kinds.items():
        sizes[kind] += math.prod(shapes[name])
    return tuple(kind for kind, _ in sizes.most_common())
