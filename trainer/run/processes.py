"""Several processes that train one student together: how they meet, who writes, when they stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decant.trainer.config import Distributed

T = TypeVar("T")


def join(config: Distributed) -> None:
    """Meet the other processes, before anything touches a device. Nothing to do for one alone.

    Raises ValueError if it is not said how.
    """
    if config == Distributed() or jax.distributed.is_initialized():
        return
    told = {
        "coordinator": config.coordinator,
        "processes": config.processes,
        "process": config.process,
    }
    missing = [f"distributed.{name}" for name, value in told.items() if value is None]
    if missing and not config.detect:
        raise ValueError(
            f"{', '.join(missing)} not given: every process is told the address of process 0 "
            "(coordinator, HOST:PORT), how many there are (processes) and which it is (process, "
            "from 0). On Slurm, Open MPI, Kubernetes and TPU pods --distributed.detect finds all "
            "three"
        )
    try:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"distributed: the processes did not meet: {error}") from error


def first() -> bool:
    """Whether this is the process that writes the run's files; of the others all keep quiet."""
    return jax.process_index() == 0


def in_turn(function: Callable[[], T]) -> T:
    """`function()` by the first process, then by the others, who find its files there.

    If it fails in the first one it is an error in all, so that none waits for ever.
    """
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    if first():
        try:
            result = function()
        except (ValueError, OSError) as found:
            error = found
    failed = bool(multihost_utils.broadcast_one_to_all(np.bool_(error is not None)))
    if error is not None:
        raise error
    if failed:
        raise ValueError("the first process could not begin; its output says why")
    return result if first() else function()  # type: ignore[return-value]


class Agreement:
    """Whether any process wants to stop: the same answer in all of them after the same update."""

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: jax.Array | None = None

    def __call__(self, wish: bool) -> bool:
        """The answer to the question before, so that no device waits for this one."""
        if self._alone:
            return wish
        before = self._asked
        wishes = jax.make_array_from_callback(
            (self._size,), self._each, lambda index: np.full(self._size, wish)[index]
        )
        self._asked = self._any(wishes)
        return before is not None and bool(before)


class Silent:
    """In place of `Metrics` in all processes but the first."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Every method does nothing."""

        def nothing(*_: Any, **__: Any) -> None:
            return None

        return nothing
