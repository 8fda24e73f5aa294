"""Bounds of numbers: every field of every command has them, and a value outside touches no file."""

import dataclasses
import importlib
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from decant.__main__ import main
from decant.command_line.checks import ANY, Bounds, Command, bounds_of, walk
from decant.command_line.menu import CACHES, STUDENTS
from decant.command_line.result import LongCommand
from decant.trainer.__main__ import TrainOrSweep
from decant.trainer.config import Data, Train
from decant.trainer.results.sweep import read_sweep

HOMES = ("pipelines.commands", "pipelines.config", "trainer.config", "trainer.results.sweep")
for home in HOMES:
    importlib.import_module(f"decant.{home}")


def commands() -> Iterator[type[Command]]:
    """The settings of every command of decant; of `train` without the flag --sweep."""
    above = [Command]
    while above:
        for below in above.pop().__subclasses__():
            ours = below.__module__.startswith("decant.")
            if ours and below not in (LongCommand, TrainOrSweep):
                yield below
            above.append(below)


def numbers(settings: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of every numeric field; `loss.hidden.0.weight` is of a list's first entry."""
    for name, hint in typing.get_type_hints(settings, include_extras=True).items():
        kinds = parts(hint)
        inside = [kind for kind in kinds if dataclasses.is_dataclass(kind) and kind is not Train]
        for kind in inside:
            index = ".0" if get_origin(hint) is tuple else ""
            yield from numbers(kind, f"{prefix}{name}{index}.")
        if not inside and kinds & {int, float}:
            yield prefix + name, hint


def parts(hint: Any) -> set[Any]:
    if get_origin(hint) is Annotated:
        return parts(hint.__origin__)
    if get_origin(hint) is Literal:
        return set()
    return set().union(*map(parts, get_args(hint))) if get_args(hint) else {hint}


FIELDS = [(command, *number) for command in commands() for number in numbers(command)]
EDGED = [row for row in FIELDS if bounds_of(row[2]) is not ANY]


def named(rows: list[tuple[type, str, Any]]) -> Any:
    ids = [f"{command.__name__}-{name}" for command, name, _ in rows]
    return pytest.mark.parametrize(("command", "name", "hint"), rows, ids=ids)


def at_the_edge(hint: Any) -> list[Any]:
    bounds, real = bounds_of(hint), float in parts(hint)
    edges = [bounds.least, bounds.most]
    if bounds.above != -math.inf:
        edges[0] = math.nextafter(bounds.above, math.inf)
    if bounds.below != math.inf:
        edges[1] = math.nextafter(bounds.below, -math.inf)
    return list(map(float, edges)) if real else edges


def outside(hint: Any) -> list[Any]:
    """The nearest numbers that are out of bounds, and the floats that never are within."""
    if float not in parts(hint):
        least, most = at_the_edge(hint)
        return [least - 1, most + 1]
    least, most = at_the_edge(hint)
    near = [math.nextafter(least, -math.inf), math.nextafter(most, math.inf)]
    return [*near, math.nan, math.inf, -math.inf]


def with_value(settings: type, name: str, value: Any) -> Any:
    """Default settings but for one value; ValueError if it is refused."""
    first, _, rest = name.partition(".")
    if not rest:
        needed = {
            "cache": Path("c"),
            "tokenizer": "t",
            "source": "a",
            "run": Path("r"),
            "students": {},
        }
        required = {
            f.name: needed[f.name]
            for f in dataclasses.fields(settings)
            if f.default is f.default_factory is dataclasses.MISSING
        }
        kind = typing.get_type_hints(settings)[name]
        alone = get_origin(kind) is tuple
        many = alone or (tuple in map(get_origin, get_args(kind)) and int not in get_args(kind))
        return settings(**required, **{name: (value,) if many else value})
    kind = typing.get_type_hints(settings)[first]
    if get_origin(kind) is tuple:
        entry = with_value(get_args(kind)[0], rest.removeprefix("0."), value)
        return settings(**{first: (entry,)})
    return settings(**{first: with_value(kind, rest, value)})


def test_every_command_has_settings_that_are_checked():
    # `--sweep` is a flag of train with a file of its own, and `plan` has settings for a capture,
    # inherited from Precompute, and for a model.
    assert len(set(commands())) == len(CACHES) + len(STUDENTS) + 2


@named(FIELDS)
def test_every_number_has_bounds(command, name, hint):
    """`ANY` says that each is right."""
    assert bounds_of(hint) is not None


@named(EDGED)
def test_a_number_is_refused_just_outside_its_bounds_and_not_at_the_edge(command, name, hint):
    for value in at_the_edge(hint):
        with_value(command, name, value)
    shown = re.escape(name.replace(".0.", "[0]."))
    for value in outside(hint):
        with pytest.raises(ValueError, match=rf"^{shown} is .*; expected a (whole )?number, "):
            with_value(command, name, value)


CALLED = [row for row in EDGED if row[0].__name__ not in ("Sweep", "Plan")]


@named(CALLED)
def test_a_number_outside_is_refused_before_any_file_is_touched(
    command, name, hint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    called = {"CollectGarbage": "gc"}.get(command.__name__, command.__name__.lower())
    of_a_cache = ("Verify", "Inspect", "Forget", "CollectGarbage", "Align")
    arguments = ["cache"] if command.__name__ in of_a_cache else []
    needed = {"Forget": "--source=a", "Align": "--tokenizer=t"}
    arguments += [needed[command.__name__]] if command.__name__ in needed else []
    flag = f"--{name.replace('_', '-')}={outside(hint)[0]}"
    assert main([called, *arguments, flag]) in (1, 2)
    assert f"error: {name.replace('.0.', '[0].')} is " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sweep_checks_the_settings_of_its_students_and_its_own(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text("heldout_rows = 0")
    with pytest.raises(ValueError, match="heldout_rows is 0; expected a whole number, 1 or more"):
        read_sweep(file)
    file.write_text("[grid.optimiser]\nlearning_rate = [1e-3, nan]")
    with pytest.raises(ValueError, match=r"student learning_rate=nan: optimiser.learning_rate is"):
        read_sweep(file)


def test_help_shows_bounds(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = re.sub(r"[^\w.;:()]+", " ", capsys.readouterr().out)
    assert "(0 to 1; default: 0.1)" in text
    assert "(above 0 at most 1; default: 0.2)" in text


def test_a_number_that_64_bits_cannot_hold_is_refused_everywhere():
    Train(data=Data(seed=2**63 - 1))
    with pytest.raises(ValueError, match=r"data.seed is 9223372036854775808; .* any finite number"):
        Train(data=Data(seed=2**63))


@dataclass(frozen=True)
class Inner:
    sizes: Annotated[tuple[int, ...], Bounds(1)] = ()
    word: Annotated[int | Literal["all"] | None, Bounds(above=0, below=9)] = None


@dataclass(frozen=True)
class Outer(Command):
    inner: Inner = Inner()
    listed: tuple[Inner, ...] = ()
    named: dict[str, Inner] = field(default_factory=dict)


def test_values_are_named_wherever_they_are_nested():
    settings = Outer(listed=(Inner(), Inner(sizes=(2,))), named={"a": Inner(word="all")})
    values = {name: value for name, _, value in walk(settings)}
    assert values["listed[1].sizes"] == (2,)
    assert values["named.a.word"] == "all"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner": Inner(sizes=(3, 0))}, r"inner.sizes is 0; expected a whole number, 1 or more"),
        ({"listed": (Inner(), Inner(word=9))}, r"listed\[1\].word is 9; .* above 0, below 9"),
        ({"named": {"a": Inner(word="al")}}, r"named.a.word is 'al'; expected a whole number"),
        ({"inner": Inner(word=2.5)}, r"inner.word is 2.5; expected a whole number"),
        ({"inner": Inner(sizes=(None,))}, r"inner.sizes is None"),
    ],
)
def test_nested_values_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Outer(**settings)
