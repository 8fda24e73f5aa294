"""The order in which the blocks of a model's stacks are run, as few loops over their arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decant.models.config import Stack, shortest_cycle


class Run(NamedTuple):
    """Alike blocks that follow each other in a period."""

    stack: str
    length: int
    at: int
    """Place of its first block among the period's."""
    in_stack: int
    """Place of its first block among those of the period that are of its stack."""


class Part(NamedTuple):
    """A period of runs, and how often it is repeated."""

    runs: tuple[Run, ...]
    repeats: int
    first: int
    """The number of its first block."""
    first_of: Mapping[str, int]
    """Place in each stack of its first block."""

    def of_model(self, run: Run, arrays: Any) -> Any:
        """What the run reads of arrays [layers of the model, …]: [repeats, run.length, …] each."""
        period = sum(each.length for each in self.runs)
        return self._cut(arrays, self.first, period, run.at, run.length)

    def of_stack(self, run: Run, arrays: Any) -> Any:
        """What the run reads of arrays [layers of its stack, …]: [repeats, run.length, …] each."""
        period = sum(each.length for each in self.runs if each.stack == run.stack)
        return self._cut(arrays, self.first_of[run.stack], period, run.in_stack, run.length)

    def by_stack(self, outputs: Sequence[Any]) -> dict[str, Any]:
        """The runs' outputs [repeats, run.length, …] as arrays [layers of the stack, …]."""
        stacks = dict.fromkeys(run.stack for run in self.runs)
        own = {
            stack: [out for run, out in zip(self.runs, outputs, strict=True) if run.stack == stack]
            for stack in stacks
        }
        return {stack: jax.tree.map(_joined, *of_stack) for stack, of_stack in own.items()}

    def _cut(self, arrays: Any, first: int, period: int, at: int, length: int) -> Any:
        def cut(array: Any) -> Any:
            whole = array[first : first + self.repeats * period]
            periods = whole.reshape(self.repeats, period, *array.shape[1:])
            return periods if period == length else periods[:, at : at + length]

        return jax.tree.map(cut, arrays)


def schedule(stacks: Mapping[str, Stack]) -> tuple[Part, ...]:
    """The parts of a model in order. Blocks at its end that fill no period are a part, too."""
    of_layer = {layer: name for name, stack in stacks.items() for layer in stack.layers}
    kinds = [of_layer[layer] for layer in sorted(of_layer)]
    parts, first = [], 0
    while rest := kinds[first:]:
        period = shortest_cycle(rest)
        if len(period) in (1, len(rest)):  # alike blocks are a part: one loop, not two
            period = next(_alike(rest))
        cycles = [
            rest[i : i + len(period)] == list(period) for i in range(0, len(rest), len(period))
        ]
        repeats = [*cycles, False].index(False)
        first_of = {name: kinds[:first].count(name) for name in stacks}
        parts.append(Part(_runs(period), repeats, first, first_of))
        first += repeats * len(period)
    return tuple(parts)


def _runs(period: Sequence[str]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for alike in _alike(period):
        before = [kind for run in runs for kind in [run.stack] * run.length]
        runs.append(Run(alike[0], len(alike), len(before), before.count(alike[0])))
    return tuple(runs)


def _alike(kinds: Sequence[str]) -> Any:
    """The runs of equal entries."""
    return (list(group) for _, group in groupby(kinds))


def _joined(*outputs: Any) -> Any:
    together = jnp.concatenate(outputs, axis=1)
    return together.reshape(-1, *together.shape[2:])
