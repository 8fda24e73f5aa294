"""All commands at once on one cache; `make stress` does the same for minutes."""

import pytest

from tests.stress import prepare, report, stress


@pytest.mark.slow
def test_all_commands_at_once_with_kills_lose_change_and_remember_nothing(tmp_path):
    prepare(tmp_path)
    result = stress(tmp_path, seconds=15, actors=3, seed=1)
    print(report(result, 15))
    assert result.faults == []
    assert result.counts.total() > 3
