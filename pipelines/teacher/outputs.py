"""What a capture asks of the teacher for each row, and what comes back to the host."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from decant.schemas.records.rows import Row
from decant.schemas.signals import ArraySignal, TargetSpec
from decant.schemas.targets.draws import Draws
from decant.schemas.targets.targets import Targets


@dataclass(frozen=True, eq=False)
class OutputSpec:
    """The outputs that a capture asks for, the same for every row."""

    targets: TargetSpec | None = None
    """None: no targets."""
    arrays: Mapping[str, ArraySignal] = field(default_factory=dict)
    """Hidden states and attention maps, by the signal's name."""
    directions: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By the signal's name, the directions [width, kept] that its states are projected onto. A
    signal that stores whole states has no entry."""

    @property
    def layers(self) -> set[int]:
        """Hidden layers that the arrays are computed from. Block i's attention map is computed
        from hidden layer i, the block's input."""
        return {signal.layer for signal in self.arrays.values()}


@dataclass(frozen=True)
class RowOutput:
    """The teacher's outputs for one row, on the host."""

    finite: bool
    """Whether all outputs are finite; a row with a NaN cannot be stored."""
    targets: Targets | None
    """Targets of the row's scored positions. None if they were not asked for."""
    arrays: dict[str, np.ndarray]
    """Stored arrays of the row, without a batch axis, named as in `schemas.arrays.spec`."""
    near_edge: int = 0
    """Number of tail draws that other rounding may change; see `schemas.targets.draws`."""


def row_outputs(
    batch: Sequence[Row], outputs: Mapping[str, Any], spec: OutputSpec
) -> Iterator[RowOutput]:
    """Copy a batch's outputs from the devices and divide them into rows.

    `outputs` holds arrays [batch, ...] in three dictionaries: "targets" by field, "arrays" by
    stored name, and "finite" (bool [batch]) by signal.
    """
    host = jax.device_get(outputs)
    for i, row in enumerate(batch):
        finite = all(of_batch[i] for of_batch in host["finite"].values())
        targets, near_edge = None, 0
        if spec.targets:
            fields = {name: x[i][row.loss_mask] for name, x in host["targets"].items()}
            targets, near_edge = _row_targets(fields, spec.targets)
            finite &= not (np.isnan(targets.logprobs).any() or np.isnan(targets.tail_logmass).any())
        arrays = {name: x[i] for name, x in host["arrays"].items()}
        yield RowOutput(bool(finite), targets, arrays, near_edge)


def _row_targets(fields: dict[str, np.ndarray], spec: TargetSpec) -> tuple[Targets, int]:
    draws, near_edge = None, 0
    if spec.draws:
        draws = Draws(fields["tail_ids"], fields["tail_logprobs"], spec.draw_betas)
        near_edge = int(fields["near_edge"].sum())
    return Targets(fields["ids"], fields["logprobs"], fields["tail_logmass"], draws), near_edge
