"""Meshes, and the one table of rules that maps logical axes of arrays to mesh axes."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from decant.models.parameters import parameters_by_path

DATA, FSDP, TENSOR, EXPERT = "data", "fsdp", "tensor", "expert"

# Heads, the MLP's width and the vocabulary are split over `tensor`. So each block needs two
# all-reduces (after the outputs of attention and MLP), and the head none until its sum. Experts are
# split over `expert`, which needs one more all-reduce for their outputs. An array stays whole over
# axes that the mesh lacks: a teacher's mesh has no `fsdp`, a student's no `expert`. Over `fsdp`,
# rows are split and matrices are stored in shares, which each block gathers (mesh/execution.py).
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": TENSOR,
    # Of a table whose other axes a file holds as one, so that rows alone can be split.
    "rows": (FSDP, TENSOR),
    "positions": None,
    "embed": FSDP,
    "latent": FSDP,
    "norm": None,
    "mlp": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_dim": None,
    "experts": EXPERT,
    "rank": None,
    "taps": None,
    "copies": None,
    "other_copies": None,
    "modalities": None,
    "shared_heads": None,
    "batch": (DATA, FSDP),
    "time": None,
}


def teacher_mesh(
    *, data: int | None = None, tensor: int = 1, expert: int = 1, devices: Sequence | None = None
) -> Mesh:
    """A mesh for running a teacher on this host's devices.

    Groups of `tensor` · `expert` devices share one copy of the model, and `data` such groups split
    the batch. ValueError if there are too few devices, or if `data` is None and devices are left
    over.

    Args:
        data: number of groups; None makes as many as there are devices for.
        tensor: devices that split heads, MLP width and vocabulary.
        expert: devices that split the experts.
        devices: None takes this host's.
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
    """A mesh for training a student on the devices of all processes.

    Rows are split over `data` · `fsdp` and weights over `fsdp` · `tensor`. ValueError if there are
    too few devices, if `data` is None and devices are left over, or if a process has no device in
    the mesh.

    Args:
        data: number of groups of `fsdp` · `tensor` devices. Each group holds all weights and has
            its share of the rows. None makes as many groups as there are devices for.
        fsdp: devices that split rows and weights.
        tensor: devices that split heads, MLP width and vocabulary.
        devices: None takes those of all processes.
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
    """The rules applied to one array.

    An axis whose length the mesh axis does not divide stays whole on every device: SmolLM2's 3
    key/value heads on 2 devices cost memory, not correctness.

    Args:
        axes: the array's logical axes, keys of `RULES`.
        shape: the array's shape.
        mesh: the mesh to split it over.
        gathered: a mesh axis over which the array is whole all the same.
    """

    def mesh_axes(axis: str, length: int) -> str | tuple[str, ...] | None:
        rule = RULES[axis]
        names = (rule,) if isinstance(rule, str) else rule or ()
        names = tuple(name for name in names if name in mesh.shape and name != gathered)
        if length % math.prod(mesh.shape[name] for name in names):
            return None
        return (names[0] if len(names) == 1 else names) or None

    return PartitionSpec(*(mesh_axes(*pair) for pair in zip(axes, shape, strict=True)))


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each parameter by path, from its `axes` metadata.

    ValueError for a parameter without that metadata.
    """

    def sharding(path: str, parameter: nnx.Variable) -> NamedSharding:
        axes = parameter.get_metadata().get("axes")
        if axes is None:
            raise ValueError(f"parameter {path} has no logical axes.")
        return NamedSharding(mesh, partition_spec(axes, parameter.get_value().shape, mesh))

    return {
        path: sharding(path, parameter) for path, parameter in parameters_by_path(model).items()
    }


def place_parameters(model: nnx.Module, mesh: Mesh) -> None:
    """Shard a model's parameters over the mesh by the rules, in place."""
    shardings = parameter_shardings(model, mesh)
    for path, parameter in parameters_by_path(model).items():
        parameter.set_value(jax.device_put(parameter.get_value(), shardings[path]))


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that rows are split over."""
    return tuple(axis for axis in (DATA, FSDP) if axis in mesh.shape)


def row_shard_count(mesh: Mesh) -> int:
    """The number of shares that a batch's rows are split into."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is rows: split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh)))


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which of a batch's `count` rows this process's devices hold: their numbers, ascending."""
    return rows_of_process(batch_sharding(mesh), count)


def rows_of_process(sharding: Sharding, count: int) -> np.ndarray:
    """As `local_rows`, for any sharding whose first axis is rows."""
    places = sharding.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in places if index]))


def shard_rows(rows: np.ndarray, *, count: int, mesh: Mesh) -> jax.Array:
    """The global array of a batch, split over the mesh.

    Args:
        rows: this process's rows, as `local_rows` lists them.
        count: rows of the whole batch.
        mesh: whose `batch_sharding` the array gets.
    """
    return place_rows(rows, count=count, sharding=batch_sharding(mesh))


def place_rows(rows: np.ndarray, *, count: int, sharding: Sharding) -> jax.Array:
    """As `shard_rows`, for any sharding whose first axis is rows; see `rows_of_process`."""
    numbers = rows_of_process(sharding, count)

    def device_rows(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(count)
        first = int(np.searchsorted(numbers, start))
        return rows[first : first + stop - start]

    return jax.make_array_from_callback((count, *rows.shape[1:]), sharding, device_rows)


def replicate(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """The array whole on every device of the mesh. Every process must pass the same values."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(array.shape, replicated, lambda index: array[index])


def split_columns(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array with the vocabulary as its last axis, split over `tensor` if that divides it."""
    even = array.shape[-1] % mesh.shape[TENSOR] == 0
    axes = (*[None] * (array.ndim - 1), TENSOR if even else None)
    there = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, there, lambda index: array[index])
