"""Values of the loss that may change over a run: constant, linear or cosine in the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """A value that is `start` at the first update and `end` at the last; None: constant.

    The settings of a value NAME are `NAME`, `NAME_end` and `NAME_schedule`.
    """

    start: float
    end: float | None = None
    shape: Shape = "linear"

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last value. All others lie between them."""
        return self.start, self.start if self.end is None else self.end

    def at(self, step: Any, *, steps: int) -> Any:
        """The value at update `step` of `steps`, counted from 0: a float32 scalar on the device.

        `step` is an int or an integer scalar. Neither is annotated, because even the type `Array`
        would import jax, and `--help` and a typo in a config file must not wait for that.
        """
        import jax.numpy as jnp

        first, last = self.ends
        if first == last:  # so that the compiled program holds a constant
            return jnp.float32(first)
        progress = jnp.clip(jnp.float32(step) / max(steps - 1, 1), 0.0, 1.0)
        if self.shape == "cosine":
            progress = (1 - jnp.cos(jnp.pi * progress)) / 2
        return first + (last - first) * progress


def check_schedule(name: str, schedule: Schedule) -> None:
    """ValueError if a shape is set for a constant value. `name` is its setting."""
    if schedule.end is None and schedule.shape != "linear":
        raise ValueError(
            f"{name}_schedule is {schedule.shape}, but {name}_end is not set, so {name} stays at "
            f"{schedule.start}. Set {name}_end, or leave out {name}_schedule"
        )
