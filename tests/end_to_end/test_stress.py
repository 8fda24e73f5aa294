"""All commands at once on one cache; `make stress` does the same for minutes."""

import pytest

from tests.stress import differences, prepare, report, stress


@pytest.mark.slow
def test_all_commands_at_once_with_kills_lose_change_and_remember_nothing(tmp_path):
    prepare(tmp_path)
    result = stress(tmp_path, seconds=15, actors=3, seed=1)
    print(report(result, 15))
    assert result.faults == []
    assert result.counts.total() > 0


def test_the_stress_test_notices_what_is_lost_changed_or_remembered():
    place = ("parts/0000", 1, 0)
    then = {"place": [*place], "segments": [["a", 0, 0, "1"], ["b", 0, 0, "2"]], "logits": "3"}

    def after(first, second, logits):
        segments = [["a", 0, 0, first], ["b", 0, 0, second]]
        return differences(then, {place: then | {"segments": segments, "logits": logits}}, {"b"})

    assert after("1", None, None) == []
    assert after("9", None, None) == [f"row {place}: ['a', 0, 0, '1'] became ['a', 0, 0, '9']"]
    assert after("1", "2", None) == [f"row {place}: ['b', 0, 0, '2'] is forgotten, but there"]
    assert after("1", None, "4") == [f"row {place}: its logits changed"]
    assert differences(then, {}, set()) == [f"lost: row {place}"]
