"""The table of bytes runs on a small cache, and what it measures with is right."""

import numpy as np
import pytest

from benchmarks import fields
from decant.pipelines.config import Sketch
from tests.making.caches import tiny_cache


def test_entropies_are_in_bytes_a_position():
    counts = np.array([[4, 4, 0], [2, 2, 4]])
    assert fields.entropies(counts) == pytest.approx((1 + 1.5) / 8)


def test_the_tables_name_every_head_count_and_sketch(tmp_path, monkeypatch, capsys):
    sketch = Sketch(rank="full", step=0.0)
    cache = tiny_cache(tmp_path, k=12, profile="lossless", sketch=sketch)
    options = "--k 0 12 --counts 8 --ranks 4 full --steps 1 --calibration 900 --positions 500"
    monkeypatch.setattr("sys.argv", ["fields", str(cache.path), *options.split()])
    fields.main()
    printed = capsys.readouterr().out
    for text in ("12, mass 0.95", "labels", "bytes an id", "32 dithered", "above it"):
        assert text in printed
    # The labels' log-probabilities are those that the capture stored.
    (number,) = cache.rows()[:1]
    (row,) = fields.rows_of(cache, np.array([number]), draws=[8])
    stored = cache.read([int(number)])
    expected = stored["label_logprobs"][0][stored["loss_mask"][0]]
    np.testing.assert_allclose(row.targets.label_logprobs, expected, atol=1e-4)
    assert (row.counts[8].counts.sum(1) == 8).all()
