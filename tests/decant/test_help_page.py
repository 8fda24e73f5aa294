"""`decant COMMAND --help`: first what somebody needs in the first hour, at any width."""

import re
import shlex

import pytest

from decant.__main__ import main
from decant.command_line.arguments import sorted_arguments
from decant.command_line.fields import field_of, options_of
from decant.command_line.guide import GUIDE
from decant.command_line.menu import CACHES, STUDENTS
from decant.pipelines import commands as caches
from decant.pipelines.config import Align, Precompute, Tokenise
from decant.trainer import __main__ as students
from decant.trainer.config import Evaluate, Export, Generate, Report

KINDS = {
    "init": caches.Init,
    "plan": caches.Plan,
    "precompute": Precompute,
    "tokenise": Tokenise,
    "align": Align,
    "verify": caches.Verify,
    "inspect": caches.Inspect,
    "merge": caches.Merge,
    "copy": caches.Copy,
    "forget": caches.Forget,
    "remove": caches.Remove,
    "gc": caches.CollectGarbage,
    "train": students.TrainOrSweep,
    "evaluate": Evaluate,
    "report": Report,
    "generate": Generate,
    "export": Export,
}
ABOUT = {
    "init": ("teacher", "corpus"),
    "merge": ("output", "caches"),
    "copy": ("source", "target"),
    "remove": ("cache", "signals"),
    "export": ("run", "output"),
    "report": ("runs",),
    **dict.fromkeys(("align", "verify", "inspect", "forget", "gc"), ("cache",)),
    **dict.fromkeys(("evaluate", "generate"), ("run",)),
}


WITH_FILE = ("plan", "precompute", "tokenise", "align")


def help_of(name, capsys, monkeypatch, columns="80"):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert not stopped.value.code
    return capsys.readouterr().out


def test_every_command_has_a_guide():
    assert set(GUIDE) == set(CACHES | STUDENTS) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("columns", ["40", "80", "120"])
def test_no_line_is_wider_than_the_terminal_unless_it_is_one_word(
    name, columns, capsys, monkeypatch
):
    for line in help_of(name, capsys, monkeypatch, columns).splitlines():
        is_long = len(line) > min(int(columns), 100)
        # A command, or a flag with its choices, stays whole, so that it can be copied.
        assert not is_long or re.match(r"usage: |  (decant|--)|\s*\S+$", line), line
        assert columns == "40" or len(line) <= 100


@pytest.mark.parametrize("name", KINDS)
def test_the_order_serves_the_first_hour(name, capsys, monkeypatch):
    text = help_of(name, capsys, monkeypatch)
    assert text.startswith(f"usage: decant {name}")
    titles = ("usage: ", "\n\nExamples\n", "\n\nFlags to begin with\n", "\n\nMore flags\n")
    places = [text.index(title) for title in titles if title in text]
    assert places == sorted(places)
    assert len(places) >= 2
    assert text.count("\n  decant ") == 3


@pytest.mark.parametrize("name", KINDS)
def test_every_flag_is_there_once(name, capsys, monkeypatch):
    text = help_of(name, capsys, monkeypatch)
    shown = re.findall(r"^  (?:\S+, or )?--([\w.-]+)", text, re.M)
    expected = [option for option, _ in options_of(KINDS[name])]
    # A switch that is on by default is shown by the flag that turns it off.
    positive = [one if one in expected else one.replace("no-", "", 1) for one in shown]
    assert sorted(positive) == sorted(expected)


def test_lists_of_tables_are_there_with_their_fields(capsys, monkeypatch):
    text = help_of("train", capsys, monkeypatch)
    for table in ("loss.hidden", "loss.attention", "data.caches"):
        assert f"\n[[{table}]]: " in text
    assert "--loss.hidden.0.student-layers INT…" in text
    text = help_of("precompute", capsys, monkeypatch)
    assert "\n[[corpus.sources]]: " in text
    assert "--corpus.sources.0.files" in text


EXAMPLES = [(name, line) for name in GUIDE for line, _ in GUIDE[name].examples]


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_an_example_is_understood(name, line):
    program, command, *arguments = shlex.split(line)
    assert (program, command in KINDS) == ("decant", True)
    sorted_arguments(
        KINDS[command],
        arguments,
        program=command,
        about=ABOUT.get(command, ()),
        with_file=command not in ("init", *CACHES) or command in WITH_FILE,
    )


@pytest.mark.parametrize("name", KINDS)
def test_the_flags_to_begin_with_exist(name):
    assert all(field_of(KINDS[name], option) for option in GUIDE[name].flags)
