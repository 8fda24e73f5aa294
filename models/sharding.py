"""Where arrays live: one table from logical axes to mesh axes, and the mesh itself."""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.decoder import parameters

DATA, TENSOR, EXPERT = "data", "tensor", "expert"

# Heads, the MLP's width and the vocabulary are split over `tensor`; so each block needs
# two all-reduces (after attention's and the MLP's output), and the head none until its sum.
# Experts are split over `expert`; their outputs meet in one more.
RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": TENSOR,
    "embed": None,
    "mlp": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_dim": None,
    "experts": EXPERT,
    "batch": DATA,
    "time": None,
}


def make_mesh(
    *, data: int | None = None, tensor: int = 1, expert: int = 1, devices: Sequence | None = None
) -> Mesh:
    """A mesh of this host's devices: `tensor` · `expert` share one copy of the model, and `data`
    such groups split the batch. Unset, `data` is as many as there are devices for.

    ValueError if the devices do not suffice, or `data` is unset and some would be left over.
    """
    devices = jax.local_devices() if devices is None else devices
    group = tensor * expert
    if min(tensor, expert, data or 1) < 1 or len(devices) < group * (data or 1):
        raise ValueError(
            f"a mesh of {f'data = {data}, ' if data else ''}tensor = {tensor}, expert = {expert} "
            f"needs {group * (data or 1)} devices, all of them at least 1; this host has "
            f"{len(devices)}."
        )
    if data is None and len(devices) % group:
        raise ValueError(
            f"tensor = {tensor} times expert = {expert} does not divide the {len(devices)} devices "
            "of this host; choose one of its divisors, or say how many groups with data."
        )
    data = data or len(devices) // group
    grid = np.asarray(devices[: data * group]).reshape(data, tensor, expert)
    return Mesh(grid, (DATA, TENSOR, EXPERT), axis_types=(AxisType.Auto,) * 3)


def spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The rules applied to one array.

    An axis whose length the mesh axis does not divide is kept whole on every device:
    SmolLM2's 3 key/value heads on 2 devices cost memory, not correctness.
    """

    def place(axis: str, length: int) -> str | None:
        name = RULES[axis]
        return name if name in mesh.shape and length % mesh.shape[name] == 0 else None

    return PartitionSpec(*(place(*pair) for pair in zip(axes, shape, strict=True)))


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter goes, by path, from the `axes` metadata that every one carries."""

    def of(path: str, parameter: nnx.Variable) -> NamedSharding:
        axes = parameter.get_metadata().get("axes")
        if axes is None:
            raise ValueError(f"parameter {path} has no logical axes.")
        return NamedSharding(mesh, spec(axes, parameter.get_value().shape, mesh))

    return {path: of(path, parameter) for path, parameter in parameters(model).items()}


def place(model: nnx.Module, mesh: Mesh) -> None:
    """Move a model's parameters to where the rules put them, in place."""
    shardings = parameter_shardings(model, mesh)
    for path, parameter in parameters(model).items():
        parameter.set_value(jax.device_put(parameter.get_value(), shardings[path]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over `data`: for tokens, segment ids, positions and all that has a batch axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))
