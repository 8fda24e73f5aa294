"""Several processes that train one student: how they connect, which one writes, when all stop."""

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


def join_processes(config: Distributed) -> None:
    """Connect to the run's other processes; call this before anything touches a device.

    Does nothing for a run of one process. Raises ValueError if a setting is missing or the
    processes cannot connect.
    """
    if config == Distributed() or jax.distributed.is_initialized():
        return
    settings = {
        "coordinator": config.coordinator,
        "processes": config.processes,
        "process": config.process,
    }
    missing = [f"distributed.{name}" for name, value in settings.items() if value is None]
    if missing and not config.detect:
        raise ValueError(
            f"{', '.join(missing)} not given: every process needs the address of process 0 "
            "(coordinator, HOST:PORT), the number of processes (processes) and its own number "
            "from 0 (process). On Slurm, Open MPI, Kubernetes and TPU pods --distributed.detect "
            "finds all three"
        )
    try:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"distributed: the processes did not connect: {error}") from error


def is_first_process() -> bool:
    """Whether this process writes the run's files and prints; all others do neither."""
    return jax.process_index() == 0


def first_then_others(function: Callable[[], T]) -> T:
    """Call `function` in the first process, then in the others, which find the first one's files.

    If it raises ValueError or OSError in the first process, every process raises an error, so that
    none waits forever.
    """
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    if is_first_process():
        try:
            result = function()
        except (ValueError, OSError) as caught:
            error = caught
    failed = bool(multihost_utils.broadcast_one_to_all(np.bool_(error is not None)))
    if error is not None:
        raise error
    if failed:
        raise ValueError("the first process could not begin; its output gives the reason")
    return result if is_first_process() else function()  # type: ignore[return-value]


def all_processes(function: Callable[[], T]) -> T:
    """Call `function` in every process at once. ValueError in all if it raises one in any."""
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    try:
        result = function()
    except ValueError as caught:
        error = caught
    failed = multihost_utils.process_allgather(np.bool_(error is not None))
    if error is not None:
        raise error
    if failed.any():
        raise ValueError("another process could not; its output gives the reason")
    return result  # type: ignore[return-value]


class StopAgreement:
    """Whether any process wants to stop: all get the same answer after the same update."""

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def __call__(self, wish: bool) -> bool:
        """Submit this process's wish; return the answer to all wishes of the previous call.

        The answer comes one call late, so that no device waits for it. A run of one process gets
        its own wish at once.
        """
        if self._alone:
            return wish
        previous = self._pending
        wishes = jax.make_array_from_callback(
            (self._size,), self._split, lambda index: np.full(self._size, wish)[index]
        )
        self._pending = self._any(wishes)
        return previous is not None and bool(previous)


class SilentMetrics:
    """Takes the place of `MetricsLog` in all processes but the first."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """A method that does nothing, for every name."""

        def do_nothing(*_: Any, **__: Any) -> None:
            return None

        return do_nothing
