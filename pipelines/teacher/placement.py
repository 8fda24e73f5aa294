"""How a host's devices share the teacher: its mesh, and the copies of the model that fit."""

import math

import jax
from jax.sharding import Mesh

from decant.models.mesh.sharding import teacher_mesh
from decant.schemas.manifest.plan import PlannedTeacher, TeacherMesh


def planned_mesh(planned: PlannedTeacher) -> Mesh:
    """The mesh that the plan asks for, over this host's devices.

    If the plan leaves `mesh.data` open, it is the greatest common divisor of the rows per batch and
    the copies of the model that fit the host. ValueError if a given `mesh.data` does not divide the
    batch.
    """
    shape, rows = planned.mesh, planned.batch_rows
    data = shape.data or math.gcd(model_copies(shape), rows) or None
    if data and rows % data:
        raise ValueError(
            f"teacher.batch_rows is {rows}, which mesh.data = {data} does not divide; choose a "
            "multiple"
        )
    return teacher_mesh(data=data, tensor=shape.tensor, expert=shape.expert)


def model_copies(shape: TeacherMesh) -> int:
    """Copies of the model, each with its own share of the batch: `shape.data`, or as many as fit
    this host's devices."""
    return shape.data or jax.local_device_count() // (shape.tensor * shape.expert)
