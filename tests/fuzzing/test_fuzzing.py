"""Readers of foreign files refuse damaged ones in words. `make fuzz` looks longer, by coverage."""

import random

import pytest

from tests.fuzzing.mutations import mutated
from tests.fuzzing.targets import TARGETS

TRIES = 60


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_read_or_refused_in_words(name, tmp_path):
    target, draw = TARGETS[name], random.Random(0)
    (tmp_path / "seeds").mkdir()
    (tmp_path / "file").mkdir()
    seeds = target.seeds(tmp_path / "seeds")
    for seed in seeds:
        target.read_honest(seed, tmp_path / "file")
    for _ in range(TRIES):
        target.check(mutated(draw.choice(seeds), draw, is_json=target.is_json), tmp_path / "file")
