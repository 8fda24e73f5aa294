"""The tables of `inspect`, compared with the sizes of files and the counts of units."""

import pytest

from decant.pipelines.__main__ import main


def test_the_bytes_of_all_signals_are_those_on_disk(cache, capsys):
    assert main(["inspect", str(cache.path)]) == 0
    printed = capsys.readouterr().out
    units = [unit for part in cache.manifest.parts for unit in part.units]
    scored = sum(unit.scored for unit in units)
    for name in ("rows", "logits", "hidden/1", "attention/0"):
        size = sum(unit.files[name].bytes for unit in units)
        (line,) = [x for x in printed.splitlines() if x.startswith(f"│ {name} ")]
        assert f"│ {size / scored:,.1f} " in line
    assert f"│ {len(cache.rows(split='train'))} " in printed
    of_fields = [
        float(x.split("│")[4].replace(",", ""))
        for x in printed.splitlines()
        if x.startswith("│  ") and "│   " in x
    ]
    logits = sum(unit.files["logits"].bytes for unit in units) / scored
    assert sum(of_fields) == pytest.approx(logits, abs=0.3)
