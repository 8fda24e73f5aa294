"""What a command prints at its end: for people, in one line, or as JSON."""

import json
import math
from pathlib import Path

import pytest

from decant.command_line.menu import CACHES, STUDENTS
from decant.command_line.result import LongCommand, Result, show
from decant.pipelines import commands
from decant.trainer import config

RESULT = Result(
    "made runs/a",
    {"output": Path("runs/a"), "loss": math.nan, "parts": ({"bytes": 3},)},
    details=lambda console: console.print("a table"),
    next=[["decant", "inspect", "runs/my cache"], ["decant", "train"]],
    status=1,
)


def test_people_see_the_details_the_line_and_what_to_type_next(capsys):
    assert show(RESULT, LongCommand()) == 1
    assert capsys.readouterr().out.splitlines() == [
        "a table",
        "made runs/a",
        "next: decant inspect 'runs/my cache'",
        "      decant train",
    ]


def test_quiet_leaves_the_line(capsys):
    assert show(RESULT, LongCommand(quiet=True)) == 1
    assert capsys.readouterr() == ("made runs/a\n", "")


@pytest.mark.parametrize("quiet", [False, True])
def test_json_is_one_object_and_nothing_else(quiet, capsys):
    assert show(RESULT, LongCommand(quiet=quiet, json=True)) == 1
    printed = capsys.readouterr()
    expected = {"output": "runs/a", "loss": None, "parts": [{"bytes": 3}]}
    assert json.loads(printed.out) == expected
    assert printed.err == ""


def test_every_command_but_inspect_and_generate_can_be_quiet():
    def is_long(command: type) -> bool:
        return issubclass(command, LongCommand)

    homes = {**vars(commands), **vars(config)}
    names = {name.replace("gc", "collectgarbage"): name for name in CACHES | STUDENTS}
    classes = {
        names[n.lower()]: c for n, c in homes.items() if isinstance(c, type) and n.lower() in names
    }
    others = {"inspect", "generate"}
    assert {name for name, command in classes.items() if not is_long(command)} == others
    assert classes.keys() == CACHES.keys() | STUDENTS.keys()
