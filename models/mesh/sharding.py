"""Where arrays live: one table from logical axes to mesh axes, and the mesh itself."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from decant.models.parameters import parameters_by_path

DATA, FSDP, TENSOR, EXPERT = "data", "fsdp", "tensor", "expert"

# Heads, the MLP's width and the vocabulary are split over `tensor`; so each block needs
# two all-reduces (after attention's and the MLP's output), and the head none until its sum.
# Experts are split over `expert`; their outputs meet in one more. What a mesh has no axis for is
# whole: a teacher's has no `fsdp`, a student's no `expert`. Over `fsdp` matrices are only kept
# in shares; each block gathers its own where it uses them (mesh.execution), and rows are split.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": TENSOR,
    "embed": FSDP,
    "norm": None,
    "mlp": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_dim": None,
    "experts": EXPERT,
    "batch": (DATA, FSDP),
    "time": None,
}


def teacher_mesh(
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


def student_mesh(
    *, data: int | None = None, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None
) -> Mesh:
    """A mesh of the devices of all processes for training: rows are split over `data` · `fsdp`,
    weights over `fsdp` · `tensor`. Unset, `data` is as many as there are devices for.

    ValueError if the devices do not suffice, some would be left over while `data` is unset, or a
    process would have none.
    """
    devices = jax.devices() if devices is None else devices
    group, asked = fsdp * tensor, f"fsdp = {fsdp}, tensor = {tensor}"
    if min(fsdp, tensor, data or 1) < 1 or len(devices) < group * (data or 1):
        raise ValueError(
            f"a mesh of {f'data = {data}, ' if data else ''}{asked} needs {group * (data or 1)} "
            f"devices, all of them at least 1; there are {len(devices)}"
        )
    if data is None and len(devices) % group:
        raise ValueError(
            f"mesh.fsdp = {fsdp} times mesh.tensor = {tensor} does not divide the {len(devices)} "
            "devices; choose one of its divisors, or say how many groups with mesh.data"
        )
    data = data or len(devices) // group
    used = devices[: data * group]
    if {d.process_index for d in used} != {d.process_index for d in devices}:
        raise ValueError(
            f"a mesh of data = {data}, {asked} takes {len(used)} of {len(devices)} devices and "
            "leaves a process without any; start fewer processes or use all devices"
        )
    return jax.make_mesh(
        (data, fsdp, tensor),
        (DATA, FSDP, TENSOR),
        axis_types=(AxisType.Auto,) * 3,
        devices=used,
    )


def partition_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh, *, gathered: str | None = None
) -> PartitionSpec:
    """The rules applied to one array, which is whole over the mesh axis `gathered`.

    An axis whose length the mesh axis does not divide is kept whole on every device:
    SmolLM2's 3 key/value heads on 2 devices cost memory, not correctness.
    """

    def place(axis: str, length: int) -> str | tuple[str, ...] | None:
        rule = RULES[axis]
        names = (rule,) if isinstance(rule, str) else rule or ()
        there = tuple(name for name in names if name in mesh.shape and name != gathered)
        if length % math.prod(mesh.shape[name] for name in there):
            return None
        return (there[0] if len(there) == 1 else there) or None

    return PartitionSpec(*(place(*pair) for pair in zip(axes, shape, strict=True)))


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter goes, by path, from the `axes` metadata that every one carries."""

    def of(path: str, parameter: nnx.Variable) -> NamedSharding:
        axes = parameter.get_metadata().get("axes")
        if axes is None:
            raise ValueError(f"parameter {path} has no logical axes.")
        return NamedSharding(mesh, partition_spec(axes, parameter.get_value().shape, mesh))

    return {path: of(path, parameter) for path, parameter in parameters_by_path(model).items()}


def place_parameters(model: nnx.Module, mesh: Mesh) -> None:
    """Move a model's parameters to where the rules put them, in place."""
    shardings = parameter_shardings(model, mesh)
    for path, parameter in parameters_by_path(model).items():
        parameter.set_value(jax.device_put(parameter.get_value(), shardings[path]))


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that rows are split over."""
    return tuple(axis for axis in (DATA, FSDP) if axis in mesh.shape)


def row_shard_count(mesh: Mesh) -> int:
    """Into how many shares rows are split."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`: for tokens and all that has a batch axis."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh)))


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which of a batch's `count` rows the devices of this process hold, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in places if index]))


def shard_rows(rows: np.ndarray, *, count: int, mesh: Mesh) -> jax.Array:
    """The array of a batch of `count` rows from those that are this process's (`local_rows`)."""
    here = local_rows(mesh, count)

    def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(count)
        first = int(np.searchsorted(here, start))
        return rows[first : first + stop - start]

    shape = (count, *rows.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), of_device)


def replicate(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array, the same in every process, whole on every device of the mesh."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(array.shape, whole, lambda index: array[index])
