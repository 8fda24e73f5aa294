"""Chooses the rows per batch, by the memory that the compiler says the programs need."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from decant.models import open_checkpoint
from decant.models.mesh.sharding import DATA, TENSOR, batch_sharding, parameter_shardings
from decant.models.numerics import dtype_named
from decant.models.parameters import parameters_by_path
from decant.pipelines.teacher.outputs import OutputSpec
from decant.pipelines.teacher.placement import model_copies, planned_mesh
from decant.pipelines.teacher.programs import batch_targets, forward
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.targets import TokenInputs
from decant.schemas.host import memory_bytes
from decant.schemas.manifest.plan import PlannedTeacher, TeacherMesh

_USABLE_SHARE = 0.9
"""Share of a device's memory. The rest is for the batch before, for fragmentation, and for other
processes of the host."""

CPU_BATCH_TOKENS = 2048


def default_batch_rows(sequence_length: int, *, mesh: TeacherMesh) -> int:
    """Rows of about 2,048 tokens on CPU and 32,768 on accelerators; a multiple of the copies of
    the model."""
    tokens = CPU_BATCH_TOKENS if jax.default_backend() == "cpu" else 32_768
    copies = max(1, model_copies(mesh))
    return -(-rows_of_tokens(tokens, sequence_length) // copies) * copies


def rows_of_tokens(tokens: int, sequence_length: int) -> int:
    """Whole rows of about so many tokens, at least one."""
    return max(1, tokens // sequence_length)


def fitting_batch_rows(
    planned: PlannedTeacher, spec: OutputSpec, *, budget: int | None = None
) -> int:
    """`planned.batch_rows`, halved until a batch fits into `budget` bytes per device.

    None: the budget is nine tenths of the device's memory. ValueError if not even one row per
    copy of the model fits.
    """
    budget = int(device_bytes() * _USABLE_SHARE) if budget is None else budget
    copies = max(1, model_copies(planned.mesh))
    rows = planned.batch_rows
    while True:
        needed = bytes_needed(dataclasses.replace(planned, batch_rows=rows), spec)
        if needed <= budget:
            return rows
        if rows <= copies:
            raise ValueError(
                f"{planned.model}: a batch of {rows} rows of {planned.sequence_length} tokens "
                f"needs {needed / 2**30:.1f} GiB on each device, which has {budget / 2**30:.1f} "
                "GiB for it. Split the model over more devices (teacher.mesh.tensor), use smaller "
                'weights (teacher.dtype = "bfloat16", teacher.quantize = "int8"), or choose a '
                "shorter corpus.sequence_length."
            )
        rows = max(copies, rows // 2 // copies * copies)


def bytes_needed(planned: PlannedTeacher, spec: OutputSpec) -> int:
    """Bytes that each device needs at once for weights, inputs, results and temporaries.

    The programs are compiled for abstract arrays: nothing is loaded and nothing runs.
    """
    mesh = planned_mesh(planned)
    model = open_checkpoint(planned.model).abstract(dtype=planned.dtype, quantize=planned.quantize)
    head = Head.of(model, vocabulary_size=planned.vocabulary_size, mesh=mesh)
    places = parameter_shardings(model, mesh)
    for path, parameter in parameters_by_path(model).items():
        like = parameter.get_value()
        placed = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=places[path])
        parameter.set_value(placed)
    graph, weights = nnx.split(model)
    shape = planned.batch_rows, planned.sequence_length
    of_rows = batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=of_rows)
    read = jax.jit(partial(forward, graph), static_argnames="layers")
    first = read.lower(weights, ids, ids, ids, layers=tuple(sorted(spec.layers))).compile()
    needed = _all_bytes(first)
    if of_logits := spec.of_logits:
        width = model.config.hidden_size
        columns = -(-planned.vocabulary_size // mesh.shape[TENSOR]) * mesh.shape[TENSOR]
        dtype = dtype_named(planned.dtype)
        hidden = jax.ShapeDtypeStruct((*shape, width), dtype, sharding=of_rows)
        split = NamedSharding(mesh, P(None, TENSOR))
        unembedding = jax.ShapeDtypeStruct((width, columns), dtype, sharding=split)
        starts = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=of_rows)
        inputs = TokenInputs()._replace(starts=starts, labels=ids, counts_starts=starts)
        program = jax.jit(batch_targets, static_argnames=("spec", "head"))
        second = program.lower(hidden, unembedding, inputs, spec=of_logits, head=head)
        # Both programs' arguments are in memory throughout: the weights while targets are
        # computed, the unembedding while the blocks run.
        weight_bytes = sum(
            math.prod(place.shard_shape(p.get_value().shape)) * p.get_value().dtype.itemsize
            for p, place in ((p, places[path]) for path, p in parameters_by_path(model).items())
        )
        head_bytes = width * columns // mesh.shape[TENSOR] * dtype.itemsize
        needed = max(needed + head_bytes, weight_bytes + _all_bytes(second.compile()))
    return needed + _map_bytes(planned, spec) // mesh.shape[DATA]


def device_bytes() -> int:
    """Bytes of memory of one device; if the backend does not tell, its share of the host's.

    In a container, its share of the container's.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return memory_bytes() // jax.local_device_count()


def _all_bytes(compiled: jax.stages.Compiled) -> int:
    sizes = compiled.memory_analysis()
    if sizes is None:
        return 0  # the backend does not tell, so the batch is not made smaller
    return int(sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes)


def _map_bytes(planned: PlannedTeacher, spec: OutputSpec) -> int:
    """Upper bound for the attention maps: two copies (computed and stored) in bfloat16."""
    heads = sum(getattr(signal, "stored_heads", 0) for signal in spec.arrays.values())
    return 4 * heads * planned.batch_rows * planned.sequence_length**2
