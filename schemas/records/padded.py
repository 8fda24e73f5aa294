"""Targets of many rows as padded arrays [n, S, …], as `Cache.read` returns them for `logits`."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from decant.schemas.signals import TargetSpec
from decant.schemas.targets.draws import logweights
from decant.schemas.targets.targets import Targets

_ABSENT = {
    "topk_ids": 0,
    "topk_logprobs": -np.inf,
    "tail_logmass": -np.inf,
    "tail_ids": 0,
    "tail_logprobs": -np.inf,
    "tail_logweights": -np.inf,
}
"""The value of each array where a position has no target."""
_SHORT = 16
"""With fewer positions per run, one indexed copy is faster than a copy per run."""


def allocate_targets(n: int, *, length: int, spec: TargetSpec) -> dict[str, np.ndarray]:
    """Uninitialised arrays for `n` rows of `length` positions: ids int32, all others float32."""
    widths = dict.fromkeys(_ABSENT, spec.draws)
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
    """Copy `targets` into the arrays `out`; target i goes to position `places[i]`.

    Positions are numbered over all rows: slot · S + position. `nodes` are the β of `tail_logmass`.
    """
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
        stored = values.get(name)
        if stored is None or stored.shape[1] < array.shape[1]:
            array[places] = _ABSENT[name]  # this part stores fewer entries than another part
        if stored is not None:
            columns = array[:, : stored.shape[1]]
            for target, source in runs:
                columns[target] = stored[source]


def clear_targets(out: Mapping[str, np.ndarray], places: Int[np.ndarray, " positions"]) -> None:
    """Mark the positions `places` (numbered as in `fill_targets`) as having no target."""
    for name, array in _flat(out).items():
        array[places] = _ABSENT[name]


def _runs(places: Int[np.ndarray, " positions"]) -> list[tuple[slice | np.ndarray, slice]]:
    """(target positions, source indices) of each run of neighbours; text has a run per document."""
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
    """Views [n·S, width] of the arrays of `logits` in `out`."""
    return {name: out[name].reshape(-1, out[name].shape[2]) for name in _ABSENT if name in out}
