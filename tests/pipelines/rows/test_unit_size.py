"""A unit holds at least one batch, so that a small corpus does not run on padding."""

import dataclasses
import shutil
from collections import Counter

import pytest

from decant.pipelines.capture import part, step_inputs
from decant.pipelines.capture.job import precompute
from decant.pipelines.rows.rules import choose_unit_rows
from decant.pipelines.rows.sources import SourceFile
from decant.schemas.disk.layout import part_layout
from tests.making.caches import tiny_settings, write_corpus


def unit_rows(size: int, **more: int) -> int:
    return choose_unit_rows([SourceFile("a", "a", size, "")], length=512, **more)


def test_units_are_no_smaller_than_a_batch_and_still_a_power_of_two():
    assert unit_rows(20_000) == 1
    assert unit_rows(20_000, batch_rows=4) == 4
    assert unit_rows(20_000, batch_rows=5) == 8
    assert unit_rows(300_000, batch_rows=4) == unit_rows(300_000) == 8  # as ever
    assert unit_rows(1 << 40, batch_rows=1 << 16) == 4096


def test_rows_made_again_lie_in_the_units_of_their_plan(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus", files=3, words=200)
    config = tiny_settings(tmp_path, heldout=0.4, batch_rows=4)
    with monkeypatch.context() as patch:
        patch.setattr(step_inputs, "choose_unit_rows", lambda *_, **__: 1)
        patch.setattr(part, "capture_remaining", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            precompute(config)
    layout = part_layout(config.output, 0)
    rows = layout.records("rows", 0).parent
    planned = sorted(path.name for path in rows.iterdir())
    (rows / planned[1]).unlink()
    shutil.rmtree(layout.work)
    sealed = precompute(config)
    assert sealed.parts[0].unit_rows == 1
    assert sorted(path.name for path in rows.iterdir()) == planned
    anew = precompute(dataclasses.replace(config, output=tmp_path / "anew"))
    assert anew.rows_id == sealed.rows_id
    sizes = Counter(unit.rows for unit in anew.parts[0].units)
    assert anew.parts[0].unit_rows == 4
    assert sizes.total() - sizes[4] <= 2  # at most one short unit a split
