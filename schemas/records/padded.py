"""Targets of many rows as padded arrays [n, S, …], as `Cache.read` returns them."""

from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Float, Int

from decant.schemas.disk.layout import COUNTS, LOGITS, SKETCH
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.counts import Counts
from decant.schemas.targets.draws import logweights
from decant.schemas.targets.targets import Targets

_WIDE = {
    "topk_ids": 0,
    "topk_logprobs": -np.inf,
    "tail_logmass": -np.inf,
    "tail_ids": 0,
    "tail_logprobs": -np.inf,
    "tail_logweights": -np.inf,
}
_ABSENT_OF = {
    LOGITS: {**_WIDE, "label_logprobs": -np.inf},
    COUNTS: {"count_ids": 0, "counts": 0},
    SKETCH: {"sketch": 0},
}
"""By signal: the value of each array where a position has no target."""
_ABSENT = {name: value for arrays in _ABSENT_OF.values() for name, value in arrays.items()}
_SHORT = 16
"""With fewer positions per run, one indexed copy is faster than a copy per run."""


def allocate_targets(n: int, *, length: int, spec: TargetSpec) -> dict[str, np.ndarray]:
    """Uninitialised arrays for `n` rows of `length` positions: ids int32, all others float32.

    Arrays of ids and of the tail's mass have width 0 if `spec.k` is 0. There are no arrays of draws
    or labels if none are stored.
    """
    widths = {name: spec.draws for name in _WIDE if spec.draws}
    widths |= {"topk_ids": spec.k, "topk_logprobs": spec.k}
    widths["tail_logmass"] = len(spec.betas) if spec.k else 0
    out: dict[str, np.ndarray] = {
        name: np.empty((n, length, width), np.int32 if name.endswith("ids") else np.float32)
        for name, width in widths.items()
    }
    if spec.labels:
        out["label_logprobs"] = np.empty((n, length), np.float32)
    return out


def allocate_counts(n: int, *, length: int, draws: int) -> dict[str, np.ndarray]:
    """Uninitialised arrays for the counts of `n` rows: int32 [n, length, draws]."""
    return {name: np.empty((n, length, draws), np.int32) for name in _ABSENT_OF[COUNTS]}


def allocate_sketch(n: int, *, length: int, rank: int) -> dict[str, np.ndarray]:
    """An uninitialised array for the sketches of `n` rows: float32 [n, length, rank]."""
    return {"sketch": np.empty((n, length, rank), np.float32)}


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
    if targets.label_logprobs is not None:
        values["label_logprobs"] = targets.label_logprobs[:, None]
    _fill(out, places, values, signal=LOGITS)


def fill_companion(
    out: Mapping[str, np.ndarray],
    places: Int[np.ndarray, " positions"],
    values: Counts | Float[np.ndarray, "positions r"],
) -> None:
    """Copy counts or sketches into the arrays `out`, as `fill_targets` does."""
    if isinstance(values, Counts):
        arrays = {"count_ids": values.ids, "counts": values.counts}
        _fill(out, places, arrays, signal=COUNTS)
    else:
        _fill(out, places, {"sketch": values}, signal=SKETCH)


def _fill(
    out: Mapping[str, np.ndarray],
    places: Int[np.ndarray, " positions"],
    values: Mapping[str, np.ndarray],
    *,
    signal: str,
) -> None:
    runs = _runs(places)
    for name, array in _flat(out, _ABSENT_OF[signal]).items():
        stored = values.get(name)
        width = 0 if stored is None else stored.shape[1]
        columns, beyond = array[:, :width], array[:, width:]
        for target, source in runs:
            if stored is not None:
                columns[target] = stored[source]
            if beyond.shape[1]:  # these positions, or this part, have fewer entries than others
                beyond[target] = _ABSENT[name]


def clear_targets(
    out: Mapping[str, np.ndarray],
    places: Int[np.ndarray, " positions"],
    *,
    signals: Collection[str] = tuple(_ABSENT_OF),
) -> None:
    """Mark the positions `places` (numbered as in `fill_targets`) as having no target."""
    for signal in signals:
        for name, array in _flat(out, _ABSENT_OF[signal]).items():
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


def _flat(out: Mapping[str, np.ndarray], names: Collection[str]) -> dict[str, np.ndarray]:
    """Views [n·S, width] of the arrays called `names` in `out`; width 1 for arrays [n, S]."""
    views = {}
    for name in names:
        if name in out:
            n, length, *width = out[name].shape
            views[name] = out[name].reshape(n * length, *(width or [1]))
    return views
