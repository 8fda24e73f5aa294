"""Targets of `decant align --targets matched`, split by whether the student has the token too.

On disk the ids are the teacher's k likeliest, of which those without a partner in the student's
vocabulary have ids from V on (`LogitsSignal.unmatched`). A reader gets the partners as its top-k,
all others as part of the tail, so that every use of a cache holds for this one too; and the
log-probabilities of the others apart.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from decant.schemas.targets.targets import nodes_of

UNMATCHED = "unmatched_logprobs"


class Partners(NamedTuple):
    """Which of the student's tokens the teacher has too: arrays of numpy, JAX or PyTorch."""

    alone: Any
    """float32 [V]: 1 for a token without a partner in the teacher's vocabulary, 0 for others."""
    share: Any
    """float32: tokens with a partner, as a share of the teacher's vocabulary; GOLD's weight w."""


def split_unmatched(
    arrays: Mapping[str, Shaped[np.ndarray, "n S ..."]], *, vocabulary: int
) -> dict[str, Shaped[np.ndarray, "n S ..."]]:
    """`topk_ids`, `topk_logprobs`, `tail_logmass` and `unmatched_logprobs` of positions as stored.

    Top-k and `unmatched_logprobs` [n, S, k] descend; −inf (and id 0) fills them up. `tail_logmass`
    has the mass of all tokens that are not in this top-k, at every node.
    """
    ids, logprobs = arrays["topk_ids"], arrays["topk_logprobs"]
    alone = (ids >= vocabulary) & np.isfinite(logprobs)
    order = np.argsort(alone, axis=-1, kind="stable")
    partners = np.take_along_axis(np.where(alone, -np.inf, logprobs), order, axis=-1)
    at = np.take_along_axis(np.where(alone, 0, ids), order, axis=-1)
    others = np.where(alone, logprobs, -np.inf)
    last = np.argsort(~alone, axis=-1, kind="stable")
    return {
        "topk_ids": at,
        "topk_logprobs": partners,
        "tail_logmass": _with_mass(arrays["tail_logmass"], logprobs, alone),
        UNMATCHED: np.take_along_axis(others, last, axis=-1),
    }


def _with_mass(masses: np.ndarray, logprobs: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """A(β) with Σ exp(β·log p) over `alone` added, at the nodes."""
    safe = np.where(alone, logprobs, 0.0)
    added = [np.where(alone, np.exp(beta * safe), 0.0).sum(-1) for beta in nodes_of(masses)]
    with np.errstate(divide="ignore"):
        return np.logaddexp(masses, np.log(np.stack(added, axis=-1))).astype(masses.dtype)
