"""The example with a home-made student: it learns, and is judged."""

import importlib.util

from tests.paths import ROOT


def test_the_example_learns(cache, capsys):
    spec = importlib.util.spec_from_file_location("own", ROOT / "examples" / "own_student.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    flags = ("--width=16", "--batch-rows=4", "--learning-rate=0.03")
    before = example.main([str(cache.path), "--updates=1", *flags])
    after = example.main([str(cache.path), "--updates=40", *flags])
    assert after["heldout_kl"] < 0.8 * before["heldout_kl"]
    assert "held out: KL" in capsys.readouterr().out
