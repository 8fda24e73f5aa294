"""The tables of a codec as they may be. A stranger's cache may bring others."""

from collections.abc import Callable, Mapping

import numpy as np

from decant.schemas.codecs.id_sets import KINDS

_SMALLEST, _LARGEST = 1e-4, 16.0
"""Nats of a quantiser's steps. Finer ones would take tables of gigabytes."""
_MOST_ORDERS = 256
_NODES, _PREDICTORS = 6, 9


def require_tables(arrays: Mapping[str, np.ndarray], *, vocabulary: int) -> None:
    """ValueError naming the table that no calibration on `vocabulary` ids makes."""
    listed = len(arrays.get("order", ()))
    checks: dict[str, Callable[[np.ndarray], bool]] = {
        "steps": _are_steps,
        "order": lambda table: _are_different_ids(table, vocabulary),
        "draw-order": lambda table: _are_different_ids(table, vocabulary),
        "orders": lambda table: _are_orders(table, listed),
        "contexts": lambda table: table.shape == (KINDS * KINDS,) and table.dtype == np.uint8,
        "tail": lambda table: table.shape == (_NODES, _PREDICTORS) and table.dtype == np.int32,
    }
    for name, check in checks.items():
        if name in arrays and not check(arrays[name]):
            table = arrays[name]
            raise ValueError(
                f"the codec's table {name}, {table.dtype} of shape {table.shape}, is none that a "
                f"calibration on {vocabulary} ids makes"
            )


def _are_steps(table: np.ndarray) -> bool:
    inside = table.shape == (2,) and table.dtype == np.float64
    return inside and bool(((table >= _SMALLEST) & (table <= _LARGEST)).all())


def _are_different_ids(table: np.ndarray, vocabulary: int) -> bool:
    if table.ndim != 1 or table.dtype.kind not in "iu" or len(table) > vocabulary:
        return False
    inside = not len(table) or (table.min() >= 0 and table.max() < vocabulary)
    return bool(inside) and len(np.unique(table)) == len(table)


def _are_orders(table: np.ndarray, listed: int) -> bool:
    if table.ndim != 2 or table.dtype != np.uint16 or not 1 <= len(table) <= _MOST_ORDERS:
        return False
    ranks = np.sort(table, axis=1)
    return bool((ranks < listed).all() and (np.diff(ranks.astype(np.int64), axis=1) > 0).all())
