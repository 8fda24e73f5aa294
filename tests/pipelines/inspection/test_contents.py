"""The tables of `inspect`, compared with the sizes of files and the counts of units."""

import re

import pytest

from decant.pipelines.__main__ import main


def test_the_bytes_of_all_signals_are_those_on_disk(cache, capsys):
    assert main(["inspect", str(cache.path)]) == 0
    printed = capsys.readouterr().out
    units = [unit for part in cache.manifest.parts for unit in part.units]
    scored = sum(unit.scored for unit in units)
    for name in ("rows", "logits", "hidden/1", "attention/0"):
        size = sum(unit.files[name].bytes for unit in units)
        (line,) = [x for x in printed.splitlines() if x.startswith(f" {name} ")]
        assert line.split()[-1] == f"{size / scored:,.1f}"
    assert re.search(rf"^ train +{len(cache.rows(split='train'))} ", printed, re.M)
    fields = re.findall(r"^ {11,}\S.* ([\d,.]+) *$", printed, re.M)
    logits = sum(unit.files["logits"].bytes for unit in units) / scored
    assert sum(float(x.replace(",", "")) for x in fields) == pytest.approx(logits, abs=0.3)


def test_the_first_screen_fits_80_columns_and_says_what_next(cache, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(cache.path.parent)
    assert main(["inspect", cache.path.name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 48
    assert "decant inspect cache --row 0" in "\n".join(lines)
    assert "llama, 35 thousand parameters, float32" in " ".join(" ".join(lines).split())
