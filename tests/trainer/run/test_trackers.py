"""Trackers that are not installed; `tests/integrations` has the real ones."""

import importlib.util

import pytest

from decant.trainer.config import Log
from decant.trainer.run.trackers import check_trackers, trackers


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_with_the_extra(name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(ValueError, match=rf"{name} is not installed; .*decant-distill\[{name}\]"):
        check_trackers(Log(**{name: "project"}))


def test_without_a_tracker_nothing_is_asked_for(tmp_path):
    check_trackers(Log())
    with trackers(Log(), run=tmp_path, settings={}, quiet=True) as callbacks:
        assert callbacks == []
    assert list(tmp_path.iterdir()) == []
