"""Where arrays live: one table from logical axes to mesh axes, and the mesh itself."""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.decoder import parameters

DATA, TENSOR = "data", "tensor"

# Heads, the MLP's width and the vocabulary are split over `tensor`; so each block needs
# two all-reduces (after attention's and the MLP's output), and the head none until its sum.
RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": TENSOR,
    "embed": None,
    "mlp": TENSOR,
    "experts": None,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_dim": None,
    "batch": DATA,
    "time": None,
}


def make_mesh(*, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh of all devices of this host: `tensor` share one copy, the rest split the batch."""
    devices = jax.local_devices() if devices is None else devices
    if len(devices) % tensor:
        raise ValueError(
            f"tensor = {tensor} does not divide the {len(devices)} devices of this host; "
            "choose one of its divisors."
        )
    grid = np.asarray(devices).reshape(-1, tensor)
    return Mesh(grid, (DATA, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))


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
