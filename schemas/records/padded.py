"""Targets of many rows as arrays [n, S, …]: what `Cache.read` returns of `logits`."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from decant.schemas.signals import TargetSpec
from decant.schemas.targets.draws import logweights
from decant.schemas.targets.targets import Targets

_NOTHING = {
    "topk_ids": 0,
    "topk_logprobs": -np.inf,
    "tail_logmass": -np.inf,
    "tail_ids": 0,
    "tail_logprobs": -np.inf,
    "tail_logweights": -np.inf,
}
"""What stands where there is no target."""
_SHORT = 16
"""Positions a run below which one look-up of all is faster than copying run after run."""


def allocate_targets(n: int, *, length: int, spec: TargetSpec) -> dict[str, np.ndarray]:
    """The arrays, not filled: ids int32, all others float32."""
    widths = dict.fromkeys(_NOTHING, spec.draws)
    widths |= {"topk_ids": spec.k, "topk_logprobs": spec.k, "tail_logmass": len(spec.betas)}
    return {
        name: np.empty((n, length, width), np.int32 if name.endswith("ids") else np.float32)
        for name, width in widths.items()
        if width
    }


def fill_targets(
    out: Mapping[str, np.ndarray],
    places: Int[np.ndarray, " positions"],
    *,
    targets: Targets,
    nodes: tuple[float, ...],
) -> None:
    """Fill in the targets of positions, which `places` counts over all rows."""
    values = {
        "topk_ids": targets.ids,
        "topk_logprobs": targets.logprobs,
        "tail_logmass": targets.tail_logmass,
    }
    if draws := targets.draws:
        values["tail_ids"], values["tail_logprobs"] = draws.ids, draws.logprobs
        values["tail_logweights"] = logweights(draws, targets.tail_logmass, nodes=nodes)
    flat = _flat(out)
    runs = _runs(places)
    for name, array in flat.items():
        found = values.get(name)
        if found is None or found.shape[1] < array.shape[1]:
            array[places] = _NOTHING[name]  # fewer are stored here than elsewhere in the cache
        if found is not None:
            of_array = array[:, : found.shape[1]]
            for there, here in runs:
                of_array[there] = found[here]


def clear_targets(out: Mapping[str, np.ndarray], places: Int[np.ndarray, " positions"]) -> None:
    """Fill in positions that have no target."""
    for name, array in _flat(out).items():
        array[places] = _NOTHING[name]


def _runs(places: Int[np.ndarray, " positions"]) -> list[tuple[slice | np.ndarray, slice]]:
    """Where neighbouring positions go, and which they are: of rows of text, a run a document."""
    ends = [*(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    if len(ends) * _SHORT > len(places):
        return [(places, slice(None))]
    starts = [0, *ends[:-1]]
    firsts = places[starts].tolist()
    return [
        (slice(first, first + end - start), slice(start, end))
        for first, start, end in zip(firsts, starts, ends, strict=True)
    ]


def _flat(out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Views of those arrays that are of `logits`, [all positions, width]."""
    return {name: out[name].reshape(-1, out[name].shape[2]) for name in _NOTHING if name in out}
