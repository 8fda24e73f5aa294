"""Terms that compare a student's hidden states and attention maps with the teacher's stored ones.

Each is a mean over a batch's counted positions, to be weighted and added to the loss. Formulas are
those of `trainer/loss/hidden_states.py` and `attention_maps.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from decant.torch.packing import attention_mask

_PROBABILITY_FLOOR = 1e-30
"""Lower clamp on the student's probabilities in the KL, because log 0 is −∞."""


def hidden_loss(
    student: Float[Tensor, "batch position width"],
    teacher: Float[Tensor, "batch position stored"],
    batch: Mapping[str, Tensor],
    *,
    kind: Literal["mse", "cosine"] = "mse",
    scale: Literal["mean", "sum"] = "mean",
    matrix: Float[Tensor, "width stored"] | None = None,
    count: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """The mean distance of hidden states over counted positions.

    ```python
    term = decant.torch.hidden_loss(states, batch["hidden/12"], batch, matrix=projection)
    ```

    `kind`: "mse" is the mean over the width of the squared difference, with `scale` "sum" its sum
    over the width; "cosine" is one minus the cosine. `matrix` maps the student's states before they
    are compared: a matrix that is trained with the student, or `cache.directions("hidden/12")` if
    the cache stores states along these. `count` is as in `loss`.
    """
    if scale == "sum" and kind != "mse":
        raise ValueError(f"scale is 'sum' with kind {kind!r}; it is for kind 'mse'")
    counted = batch["loss_mask"]
    student = student.float()[counted]
    if matrix is not None:
        student = student @ matrix.float()
    teacher = teacher[counted].float()
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's states have width {student.shape[-1]}, the teacher's stored ones "
            f"{teacher.shape[-1]}. Pass a matrix [{student.shape[-1]}, {teacher.shape[-1]}] that "
            "is trained with the student"
        )
    if kind == "mse":
        squared = (student - teacher).square()
        distance = squared.mean(-1) if scale == "mean" else squared.sum(-1)
    else:
        distance = 1 - (_direction(student) * _direction(teacher)).sum(-1)
    return distance.sum() / _count(counted, count)


def attention_loss(
    student: Float[Tensor, "batch ours query key"],
    teacher: Float[Tensor, "batch theirs query key"],
    batch: Mapping[str, Tensor],
    *,
    kind: Literal["mse", "kl"] = "mse",
    scale: Literal["mean", "pairs"] = "mean",
    normalize: bool = True,
    average_heads: bool = False,
    count: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """The mean distance of attention maps over counted queries and heads.

    `kind`: "mse" is the mean over a query's visible keys of the squared difference; "kl" is
    KL(teacher ‖ student) of its row in nats. `scale` "pairs", for "mse": the sum over heads and
    keys of the squared difference, divided by `pair_count(batch)`, as online trainers have it.
    `normalize` scales each row of both maps to sum to one, because stored maps are rounded.
    `average_heads` compares the means over the heads; without it both models need the same number
    of heads. `count` is as in `loss`; with `scale` "pairs" a number of pairs.
    """
    if scale == "pairs" and kind != "mse":
        raise ValueError(f"scale is 'pairs' with kind {kind!r}; it is for kind 'mse'")
    counted = batch["loss_mask"]
    if not average_heads and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student's maps have {student.shape[1]} heads, the stored ones "
            f"{teacher.shape[1]}. To compare the means over the heads, pass average_heads=True"
        )
    seen = attention_mask(batch["segment_ids"])
    # Uncounted rows are masked too: their stored values may not be finite, and 0·NaN is NaN.
    teacher = teacher.float().where(seen & counted[:, None, :, None], 0.0)
    student = student.float().where(seen, 0.0)
    if average_heads:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    if normalize:
        student, teacher = _row_stochastic(student), _row_stochastic(teacher)
    if scale == "pairs":
        rows = (student - teacher).square().sum((1, 3))
        count = pair_count(batch).clamp(min=1) if count is None else count
    elif kind == "mse":
        rows = ((student - teacher).square().sum(-1) / seen.sum(-1)).mean(1)
    else:
        rows = _kl(student, teacher).mean(1)
    return rows.where(counted, 0.0).sum() / _count(counted, count)


def pair_count(batch: Mapping[str, Tensor]) -> Int[Tensor, ""]:
    """Pairs of a counted query and a token of its document, in this row, seen or not.

    Sum it over the microbatches and processes of an update for `attention_loss(…, count=)`.
    """
    segments = batch["segment_ids"]
    same = segments[:, :, None] == segments[:, None, :]
    return same.sum(-1).where(batch["loss_mask"], 0).sum()


def _direction(x: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """Zero vectors, which have no direction, stay zero without a gradient."""
    square = (x * x).sum(-1, keepdim=True)
    nonzero = square > 0
    return x * square.where(nonzero, 1.0).rsqrt().where(nonzero, 0.0)


def _row_stochastic(
    maps: Float[Tensor, "batch heads query key"],
) -> Float[Tensor, "batch heads query key"]:
    total = maps.sum(-1, keepdim=True)
    return maps / total.where(total > 0, 1.0)


def _kl(
    student: Float[Tensor, "batch heads query key"],
    teacher: Float[Tensor, "batch heads query key"],
) -> Float[Tensor, "batch heads query"]:
    # The double where: p·(log p − log q) at p = 0 is 0·(−inf), whose value and gradient are NaN.
    present = teacher > 0
    safe_p = teacher.where(present, 1.0)
    safe_q = student.clamp(min=_PROBABILITY_FLOOR).where(present, 1.0)
    return (safe_p * (safe_p.log() - safe_q.log())).where(present, 0.0).sum(-1)


def _count(counted: Tensor, count: Tensor | float | None) -> Tensor | float:
    return counted.sum().clamp(min=1) if count is None else count
