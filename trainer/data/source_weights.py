"""Weights of a cache's groups of files: how often an epoch takes the rows of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from decant.schemas import Cache
from decant.trainer.config import Data


class Stream(NamedTuple):
    """Train rows of one cache that are equally frequent."""

    rows: np.ndarray
    """Their numbers."""
    weight: float
    """How often an epoch takes each of them."""


def source_weights(cache: Cache, asked: Sequence[str] = ()) -> dict[str, float]:
    """The weight in effect of each group of the cache, by name; empty if no weight differs from 1.

    `asked`, as in `data.source_weights`, replaces those of the manifest. ValueError for a name that
    the cache lacks, which lists those that it has, and for a weight that is not above 0.
    """
    recorded = cache.manifest.source_weights
    own = dict(_named_weight(setting) for setting in asked)
    if unknown := [name for name in own if name not in recorded]:
        held = f"its groups are {', '.join(recorded)}" if recorded else "it has no groups"
        raise ValueError(
            f"data.source_weights: {cache.path} has no group {unknown[0]!r}; {held}. Groups are "
            "made by [[corpus.sources]] when a cache is captured"
        )
    weights = {**recorded, **own}
    return weights if any(weight != 1 for weight in weights.values()) else {}


def streams(cache: Cache, weights: Mapping[str, float]) -> list[Stream]:
    """The cache's train rows by group, groups without any left out; one stream if all weigh 1."""
    rows = cache.rows(split="train")
    if not weights:
        return [Stream(rows, 1.0)]
    # "" is the group of rows that were captured without groups.
    groups = {"": 1.0, **weights}
    found = [Stream(cache.rows("train", group=name), weight) for name, weight in groups.items()]
    return [stream for stream in found if len(stream.rows)]


def epoch_rows(cache: Cache, config: Data) -> float:
    """Rows that one epoch takes of the main cache."""
    of_main = streams(cache, source_weights(cache, config.source_weights))
    return sum(len(stream.rows) * stream.weight for stream in of_main)


def _named_weight(setting: str) -> tuple[str, float]:
    name, _, text = setting.rpartition("=")
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not name or not 1e-6 <= weight <= 1e6:
        raise ValueError(
            f"data.source_weights: {setting!r} is not NAME=WEIGHT with a weight above 0, such as "
            "code=0.5"
        )
    return name, weight
