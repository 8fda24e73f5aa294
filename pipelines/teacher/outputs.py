"""What a capture asks of the teacher for each row, and what comes back to the host."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from decant.pipelines.teacher.targets import LogitsSpec
from decant.schemas.records.rows import Row
from decant.schemas.signals import ArraySignal, TargetSpec
from decant.schemas.targets.counts import Counts, count_draws
from decant.schemas.targets.draws import Draws
from decant.schemas.targets.targets import Targets


class Projection(NamedTuple):
    """How a state h after the final norm becomes a sketch: c = (h − mean)·matrix."""

    mean: Any
    """float32 [width]."""
    matrix: Any
    """float32 [width, rank]."""


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
    counts: int = 0
    """N, draws of the counts; 0: no counts."""
    sketch: Projection | None = None
    """None: no sketches."""

    @property
    def of_logits(self) -> LogitsSpec | None:
        """What is computed from logits; None if nothing is."""
        spec = LogitsSpec(self.targets, self.counts)
        return None if spec == LogitsSpec() else spec

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
    counts: Counts | None = None
    """Counts of the row's scored positions. None if they were not asked for."""
    counts_near_edge: int = 0
    """Number of the counts' draws that other rounding may change."""
    sketch: np.ndarray | None = None
    """Sketches of the row's scored positions, float32 [n, rank]. None if not asked for."""


def row_outputs(
    batch: Sequence[Row], outputs: Mapping[str, Any], spec: OutputSpec
) -> Iterator[RowOutput]:
    """Copy a batch's outputs from the devices and divide them into rows.

    `outputs` holds arrays [batch, ...] in three dictionaries: "targets" by field, "arrays" by
    stored name, and "finite" (bool [batch]) by signal; and the array "sketch" if asked for.
    """
    host = jax.device_get(outputs)
    for i, row in enumerate(batch):
        finite = all(of_batch[i] for of_batch in host["finite"].values())
        fields = {name: x[i][row.loss_mask] for name, x in host["targets"].items()}
        if spec.sketch:
            fields["sketch"] = host["sketch"][i][row.loss_mask]
        finite &= not any(np.isnan(x).any() for x in fields.values() if x.dtype.kind == "f")
        positions = int(row.loss_mask.sum())
        yield RowOutput(
            bool(finite),
            _row_targets(fields, spec.targets, positions=positions) if spec.targets else None,
            {name: x[i] for name, x in host["arrays"].items()},
            near_edge=int(fields["near_edge"].sum()) if "near_edge" in fields else 0,
            counts=count_draws(fields["count_ids"]) if spec.counts else None,
            counts_near_edge=int(fields["counts_near_edge"].sum()) if spec.counts else 0,
            sketch=fields.get("sketch"),
        )


def _row_targets(fields: dict[str, np.ndarray], spec: TargetSpec, *, positions: int) -> Targets:
    draws = None
    if spec.draws:
        draws = Draws(fields["tail_ids"], fields["tail_logprobs"], spec.draw_betas)
    nothing = np.zeros((positions, 0), np.float32)  # of all three for k = 0
    return Targets(
        fields.get("ids", nothing.astype(np.int32)),
        fields.get("logprobs", nothing),
        fields.get("tail_logmass", nothing),
        draws,
        fields.get("label_logprobs"),
    )
