"""The tables of bytes and of drift run on a small cache; what they measure with is right."""

import re

import numpy as np
import pytest

from benchmarks import drift, fields
from decant.pipelines.config import Sketch
from tests.making.caches import tiny_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    sketch = Sketch(rank="full", step=0.0)
    root = tmp_path_factory.mktemp("fields")
    return tiny_cache(root, k=12, profile="lossless", sketch=sketch)


def test_entropies_are_in_bytes_a_position():
    counts = np.array([[[4, 4, 0], [2, 2, 4]]])
    assert fields.entropies(counts) == pytest.approx((1 + 1.5) / 8)
    # Another bin with as many positions, in which all is known.
    known = np.array([[[8, 0, 0], [0, 8, 0]]])
    assert fields.entropies(np.concatenate([counts, known])) == pytest.approx((1 + 1.5) / 16)


def test_entropies_of_dithered_levels_are_those_that_the_way_to_the_edge_leaves_open():
    sizes, how = fields.Sizes(), fields.Quantised(1, 1.0, dither=True)
    dither = np.arange(1 << 16, dtype=np.uint16)
    # A number at 0.2 steps: level 1 where u > 0.3. Both edges are one bin, so that a bin nearer
    # than 0.2 holds as many zeros as ones, and all others zeros: 12.8 of 32 bins.
    levels = ((dither + 0.5) / 65536 - 0.5 > 0.3).astype(float)[:, None]
    fields._count_levels(sizes, how, levels, dither)
    in_part = -(0.4 * np.log2(0.4) + 0.6 * np.log2(0.6))
    expected = (12 + in_part) / 32 / 8
    assert fields.entropies(sizes.levels[how]) == pytest.approx(expected, rel=1e-3)


def test_the_tables_name_every_head_count_and_sketch(cache, monkeypatch, capsys):
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


def test_drift_compares_tables_that_saw_a_domain_with_tables_that_did_not(
    cache, monkeypatch, capsys
):
    of_domain = drift.shares(cache, "document-000.txt")
    assert 0 < np.count_nonzero(of_domain > 0.9) < len(of_domain) / 4
    options = "--k 8 --counts 8 --rank 4 --calibration 600"
    monkeypatch.setattr("sys.argv", ["drift", str(cache.path), "document-00*", *options.split()])
    drift.main()
    printed = capsys.readouterr().out
    pairs = [(float(a), float(b)) for a, b in re.findall(r"([\d.]+) → ([\d.]+)", printed)]
    assert len(pairs) == 4
    # All is the sum of the others, each rounded.
    for side in zip(*pairs, strict=True):
        assert side[3] == pytest.approx(sum(side[:3]), abs=0.2)
    (difference,) = map(float, re.findall(r"([+-][\d.]+) ", printed))
    assert difference == pytest.approx(pairs[3][1] - pairs[3][0], abs=0.11)
    assert pairs[0][0] < pairs[0][1]
    monkeypatch.setattr("sys.argv", ["drift", str(cache.path), "nothing-*"])
    with pytest.raises(SystemExit, match=r"nothing-\*: no row outside the sample"):
        drift.main()
