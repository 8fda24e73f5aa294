"""LoRA on a decoder: a low-rank change beside chosen matrices of the blocks, W + s·B·A.

Beside a matrix [*input, *output] lie A [*input, rank] and B [rank, *output], stacked over layers
like the matrix. B begins at zero, so a new adapter changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from decant.models.decoder.blocks import LORA_A, LORA_B
from decant.models.decoder.decoder import Decoder
from decant.models.families import family_of
from decant.models.mesh.sharding import parameter_shardings
from decant.models.parameters import parameters_by_path

TARGETS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
"""What people call the matrices of a block, and our names."""
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Lora:
    """The shape of an adapter."""

    rank: int
    scaling: float
    """s of W + s·B·A."""
    targets: tuple[str, ...]
    """Keys of `TARGETS`, or "all-linear": all of them that the model has, without experts'."""


def add_adapter(model: Decoder, lora: Lora, *, seed: int, mesh: Mesh | None = None) -> None:
    """Give the model a new adapter, in place and in float32; on a mesh, split by the same rules.

    A is uniform within ±1/√inputs (Kaiming's for √5, as PEFT begins), B is zero. ValueError for a
    target that the model lacks.
    """
    made = dict(_new_matrices(model, lora, seed=seed))
    for name, (array, axes) in made.items():
        setattr(model.blocks, name, nnx.Param(array, axes=axes))
    model.blocks.lora_scaling = lora.scaling
    places = {} if mesh is None else parameter_shardings(model, mesh)
    for name, (array, _) in made.items():
        parameter = getattr(model.blocks, name)
        if mesh is None:
            parameter.set_value(jax.numpy.asarray(array))
        else:
            there = places[f"blocks.{name}"]
            placed = jax.make_array_from_callback(array.shape, there, array.__getitem__)
            parameter.set_value(placed)


def _new_matrices(
    model: Decoder, lora: Lora, *, seed: int
) -> Iterator[tuple[str, tuple[np.ndarray, tuple[str, ...]]]]:
    """Attribute of the blocks → a new matrix and its logical axes."""
    names = family_of(model.config).tensors(model.config)
    for name in adapted_matrices(model, lora.targets):
        matrix = getattr(model.blocks, name)
        shape, axes = matrix.get_value().shape, matrix.get_metadata()["axes"]
        inputs = 1 + (names[f"blocks.{name}"].in_axes or 0)  # after the layers' axis
        # Seeded by name, so that another target does not change the other matrices.
        draw = np.random.default_rng([seed % 2**64, *name.encode()])
        bound = 1 / math.sqrt(math.prod(shape[1:inputs]))
        a = draw.uniform(-bound, bound, (*shape[:inputs], lora.rank)).astype(np.float32)
        b = np.zeros((shape[0], lora.rank, *shape[inputs:]), np.float32)
        yield name + LORA_A, (a, (*axes[:inputs], "rank"))
        yield name + LORA_B, (b, (axes[0], "rank", *axes[inputs:]))


def adapted_matrices(model: Decoder, targets: tuple[str, ...]) -> list[str]:
    """Our names of the targets. ValueError for a target that this model lacks."""
    if model.config.several_attentions:
        raise ValueError(
            "student.adapter: attention of this model has other sizes in some blocks, and adapters "
            "need blocks that are alike. Train without an adapter"
        )
    if any(model.config.layers_linear):
        raise ValueError(
            "student.adapter: this model has blocks of linear attention, and adapters need blocks "
            "that are alike. Train without an adapter"
        )
    if model.config.dense_layers:
        raise ValueError(
            f"student.adapter: the first {model.config.dense_layers} blocks of this model have no "
            "experts, and adapters need blocks that are alike. Train without an adapter, or cut "
            "the student out of the other blocks (student.layers)"
        )
    experts = ("gate", "up", "down") if model.config.num_experts else ()
    known = {
        target: name
        for target, name in TARGETS.items()
        if hasattr(model.blocks, name) and name not in experts
    }
    for target in targets:
        if target not in (*known, ALL_LINEAR):
            of_experts = TARGETS.get(target) in experts and " is a matrix of each expert, which"
            raise ValueError(
                f"student.adapter.targets: {target!r}{of_experts or ''} cannot be adapted; this "
                f"model has {', '.join(known)}, and {ALL_LINEAR!r} for all of these"
            )
    wanted = set(known if ALL_LINEAR in targets else targets)
    if not wanted:
        raise ValueError(f"student.adapter.targets is empty; this model has {', '.join(known)}")
    return [name for target, name in known.items() if target in wanted]


def is_adapters(name: str) -> bool:
    """Whether a parameter of the blocks is a matrix of an adapter."""
    return name.endswith((LORA_A, LORA_B))


def merged(model: Decoder) -> Decoder:
    """The decoder with its adapter's changes in its matrices, all of it float32 on the host."""
    plain = nnx.eval_shape(lambda: Decoder(model.config, rngs=nnx.Rngs(0), dtype=model.dtype))
    parameters = parameters_by_path(plain)
    for path, array in merged_arrays(model):
        parameters[path].set_value(array)
    return plain


def merged_arrays(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Path and float32 values on the host of each parameter of `merged`, one at a time, by path.

    Sums are float64, one layer at a time.
    """
    ours = parameters_by_path(model)
    for path in sorted(path for path in ours if not is_adapters(path)):
        array: Any = np.asarray(ours[path].get_value()).astype(np.float32)
        if f"{path}{LORA_A}" in ours:
            a, b = (np.asarray(ours[path + part].get_value()) for part in (LORA_A, LORA_B))
            for layer in range(len(array)):
                change = np.tensordot(a[layer].astype(np.float64), b[layer].astype(np.float64), 1)
                array[layer] += model.blocks.lora_scaling * change
        yield path, array
