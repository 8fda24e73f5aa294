"""A config file is a saved command line."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from schemas.settings import parse


@dataclass(frozen=True)
class Inner:
    length: int = 5
    names: tuple[str, ...] = ("a",)
    quick: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    output: Path = Path("out")


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "c.toml").write_text(text)
    return str(tmp_path / "c.toml")


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = write(tmp_path, 'output = "x"\n[inner]\nlength = 7\nnames = ["b", "c"]\nquick = true\n')
    config = parse(Outer, [file, "--inner.length", "9"], program="p")
    assert config == Outer(Inner(9, ("b", "c"), quick=True), Path("x"))


def test_a_typo_in_the_file_suggests_the_name(tmp_path):
    with pytest.raises(ValueError, match=r"c\.toml: unknown key inner\.lenght; did you mean inner"):
        parse(Outer, [write(tmp_path, "[inner]\nlenght = 7")], program="p")


def test_a_typo_in_a_flag_suggests_the_name(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Outer, ["--inner.lenght", "7"], program="p")
    assert stopped.value.code == 2
    assert "--inner.length" in capsys.readouterr().err


def test_a_missing_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        parse(Outer, ["nowhere.toml"], program="p")
    with pytest.raises(ValueError, match=r"c\.toml: not valid TOML"):
        parse(Outer, [write(tmp_path, "[inner\n")], program="p")


def test_false_in_the_file_is_false(tmp_path):
    file = write(tmp_path, "[inner]\nquick = false\n")
    assert not parse(Outer, [file], program="p").inner.quick
