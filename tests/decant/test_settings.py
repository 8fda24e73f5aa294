"""Settings: a config file means the same as a saved command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from decant.command_line.checks import TABLE
from decant.command_line.settings import parse


@dataclass(frozen=True)
class Inner:
    length: int = 5
    names: tuple[str, ...] = ("a",)
    quick: bool = False
    limit: int | None = None
    maybe: bool | None = None
    variables: tuple[str, ...] = field(default=(), metadata=TABLE)
    blocks: int | tuple[int, ...] = 8


@dataclass(frozen=True)
class Term:
    weight: float = 1.0
    layers: tuple[int, ...] = ()
    mean: bool = False
    blocks: int | tuple[int, ...] = 8


@dataclass(frozen=True)
class Loss:
    alpha: float = 0.5
    terms: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    loss: Loss = field(default_factory=Loss)
    output: Path = Path("out")


@pytest.fixture(autouse=True)
def in_the_folder(tmp_path, monkeypatch):
    """Beside the config files: their paths are as they are written, whether there or not."""
    monkeypatch.chdir(tmp_path)


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "c.toml").write_text(text)
    return str(tmp_path / "c.toml")


@pytest.mark.parametrize("value", [True, False])
def test_a_switch_that_may_be_unset_is_on_or_off_in_a_file(tmp_path, value):
    file = write(tmp_path, f"[inner]\nmaybe = {str(value).lower()}\n")
    assert parse(Outer, [file], program="p").inner.maybe is value
    flag = f"--inner.maybe={not value}"
    assert parse(Outer, [file, flag], program="p").inner.maybe is not value
    assert parse(Outer, [], program="p").inner.maybe is None


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = write(tmp_path, 'output = "x"\n[inner]\nlength = 7\nnames = ["b", "c"]\nquick = true\n')
    config = parse(Outer, [file, "--inner.length", "9"], program="p")
    assert config == Outer(Inner(9, ("b", "c"), quick=True), output=Path("x"))


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("[3]", (3,)), ("[3, 5]", (3, 5))])
def test_a_list_of_one_is_not_the_number_in_it(text, value, tmp_path):
    file = write(tmp_path, f"[inner]\nblocks = {text}\n[[loss.terms]]\nblocks = {text}\n")
    config = parse(Outer, [file], program="p")
    assert (config.inner.blocks, config.loss.terms[0].blocks) == (value, value)
    assert parse(Outer, [file, "--inner.blocks", "4"], program="p").inner.blocks == 4


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


def test_a_file_that_is_no_config_though_it_was_read_as_one_gets_the_reason(tmp_path):
    weights = tmp_path / "model.bin"
    weights.write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"model\.bin: not valid TOML.*name it behind its flag"):
        parse(Outer, [str(weights)], program="p")


def test_a_table_of_variables_is_a_list_of_names_with_values_which_a_flag_replaces(tmp_path):
    file = write(tmp_path, '[inner.variables]\nslow = false\nmode = "low"\nn = [1, 2.5]\n')
    parsed = parse(Outer, [file], program="test").inner.variables
    assert parsed == ("slow=false", 'mode="low"', "n=[1, 2.5]")
    flags = ["--inner.variables", "slow=true", "mode=low"]
    assert parse(Outer, [file, *flags], program="test").inner.variables == tuple(flags[1:])
    with pytest.raises(ValueError, match="write it as a string"):
        parse(Outer, [write(tmp_path, "[inner.variables]\nday = 2026-01-31\n")], program="test")


def test_false_in_the_file_is_false(tmp_path):
    file = write(tmp_path, "[inner]\nquick = false\n")
    assert not parse(Outer, [file], program="p").inner.quick


TWO_TERMS = """
output = "x"
[loss]
alpha = 0.25
[[loss.terms]]
weight = 2
layers = [-1, 3]
[[loss.terms]]
"""


def test_a_list_of_tables_is_a_tuple_of_dataclasses(tmp_path):
    """The second table is empty, so its entry has the defaults."""
    config = parse(Outer, [write(tmp_path, TWO_TERMS)], program="p")
    assert config == Outer(loss=Loss(0.25, (Term(2.0, (-1, 3)), Term())), output=Path("x"))
    assert parse(Outer, [write(tmp_path, "")], program="p") == Outer()
    assert parse(Outer, [], program="p") == Outer()


def test_flags_change_an_entry_and_add_the_next(tmp_path):
    flags = ["--loss.terms.0.weight=9", "--loss.terms.1.mean", "--loss.terms.2.layers", "-2", "4"]
    config = parse(Outer, [write(tmp_path, TWO_TERMS), *flags], program="p")
    expected = (Term(9.0, (-1, 3)), Term(mean=True), Term(layers=(-2, 4)))
    assert config.loss == Loss(0.25, expected)
    assert parse(Outer, flags[:1], program="p").loss.terms == (Term(9.0),)


@pytest.mark.parametrize("flag", ["--loss.terms.1.weight", "--loss.terms.0.wieght"])
def test_an_entry_after_a_gap_and_a_typo_in_one_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Outer, [flag, "9"], program="p")
    assert stopped.value.code == 2
    assert flag in capsys.readouterr().err


def test_a_typo_in_an_entry_is_named_by_its_number(tmp_path):
    text = TWO_TERMS + "wieght = 3\n"
    with pytest.raises(
        ValueError,
        match=r"unknown key loss.terms\[1\].wieght; did you mean loss.terms\[1\].weight\?",
    ):
        parse(Outer, [write(tmp_path, text)], program="p")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[loss.terms]\nweight = 2", r"loss.terms is a list of tables: write \[\[loss.terms\]\]"),
        ("[loss]\nterms = [1, 2]", r"loss.terms is a list of tables: write \[\[loss.terms\]\]"),
        ("[[loss]]\nalpha = 1", "loss is not a list of tables"),
        ("[[output]]\nalpha = 1", "output is not a list of tables"),
        ("[output]\nalpha = 1", "output is a single value, not a table"),
        ('[inner]\nnames = ["a", "--b=1"]', "inner.names has '--b=1': write it without the dashes"),
    ],
)
def test_a_value_of_another_shape_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse(Outer, [write(tmp_path, text)], program="p")


@dataclass(frozen=True)
class Kinds:
    count: int = 1
    share: float = 0.5
    name: str = "a"
    path: Path = Path("p")
    quick: bool = False
    limit: int | None = 3
    codec: Literal["fast", "small"] = "fast"
    rows: int | Literal["auto"] | None = None
    layers: tuple[int, ...] | Literal["all"] = ()
    weights: tuple[float, ...] = ()
    sources: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('count = "16"', 'count is "16", a string; expected an integer$'),
        ("count = true", "count is true; expected an integer$"),
        ("count = 16.0", "count is 16.0; expected an integer$"),
        ("count = [16]", r"count is \[16\]; expected an integer$"),
        ('share = "0.5"', 'share is "0.5", a string; expected a number$'),
        ("share = false", "share is false; expected a number$"),
        ("name = 7", "name is 7; expected a string$"),
        ("name = 2026-01-31", "name is 2026-01-31; expected a string$"),
        ("path = 7", "path is 7; expected a string$"),
        ('quick = "false"', 'quick is "false", a string; expected true or false$'),
        ("quick = 0", "quick is 0; expected true or false$"),
        ('limit = "3"', 'limit is "3", a string; expected an integer or "None"$'),
        ('codec = "slow"', 'codec is "slow", a string; expected "fast" or "small"$'),
        ('rows = "4"', 'rows is "4", a string; expected an integer or "auto" or "None"$'),
        ('layers = ["1"]', 'layers is .*; expected a list, each an integer or "all"$'),
        ("weights = [1, true]", "weights is .*; expected a list, each a number$"),
        ("sources = [1]", "sources is .*; expected a list, each a string$"),
    ],
)
def test_a_value_of_another_type_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=r"c\.toml: " + message):
        parse(Kinds, [write(tmp_path, text)], program="p")


def test_values_of_the_right_types_mean_themselves(tmp_path):
    text = """
    count = -16
    share = 2
    path = "x"
    quick = true
    limit = "None"
    codec = "small"
    rows = "auto"
    layers = [-1, 3]
    weights = [1, 2.5]
    sources = "one"
    """
    assert parse(Kinds, [write(tmp_path, text)], program="p") == Kinds(
        count=-16,
        share=2.0,
        path=Path("x"),
        quick=True,
        limit=None,
        codec="small",
        rows="auto",
        layers=(-1, 3),
        weights=(1.0, 2.5),
        sources=("one",),
    )
