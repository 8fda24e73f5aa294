"""What stands on a command line: a config file, what the command is about, and flags."""

import pytest

from decant.__main__ import main
from decant.command_line.settings import parse
from decant.pipelines import commands
from decant.trainer import __main__ as trainer


class Parsed(Exception):
    """The settings that a command line comes to."""


def meant(line, monkeypatch):
    """The settings with which the command would begin."""

    def parsed(*arguments, **options):
        raise Parsed(parse(*arguments, **options))

    for module in (commands, trainer):
        monkeypatch.setattr(module, "parse", parsed)
    with pytest.raises(Parsed) as stopped:
        main(line.split())
    return stopped.value.args[0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            "precompute --sequence-lenght 9",
            "no flag --sequence-lenght; did you mean --corpus.sequence-length",
        ),
        ("precompute --corpus.sequence_lenght 9", "did you mean --corpus.sequence-length"),
        ("precompute --k 16", "no flag --k; did you mean --signals.logits.k?"),
        ("train --loss.hidden.0.wieght 1", "did you mean --loss.hidden.0.weight"),
        ("train --layers 1", "did you mean --student.layers?"),
        ("train --xyzzy 1", "there is no flag --xyzzy. `decant train --help` tells more"),
        ("verify c --rows many", "--rows is 'many'; expected an integer"),
        ("train --loss.tail buckets", """--loss.tail is 'buckets'; expected "bucket" or """),
        ("train --student.layers a", "--student.layers is 'a'; expected an integer or a list"),
        ("train --run", "--run needs a value: a string"),
        ("train --quiet=yes", "--quiet takes no value; to turn it off: --no-quiet"),
        ("train a.toml b.toml", "two config files, a.toml and b.toml: the command takes one"),
        ("evaluate a.toml runs/a b.toml", "two config files, a.toml and b.toml"),
        ("evaluate runs/a --run runs/b", "run is given twice: runs/a and with --run"),
        ("report runs/a --runs runs/b", "runs is given twice"),
        ("export runs/a out more", "unexpected 'more': the command takes RUN OUTPUT"),
        ("gc cache more", "unexpected 'more'"),
    ],
)
def test_a_wrong_flag_or_word_is_told_in_one_line(arguments, error, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert error in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("evaluate runs/a", "evaluate --run runs/a"),
        ("evaluate --table runs/a", "evaluate --run=runs/a --table"),
        ("generate --samples 1 runs/a --chat", "generate --run runs/a --chat --samples 1"),
        ("export runs/a out", "export --run runs/a --output out"),
        ("export runs/a --output out", "export --run runs/a --output out"),
        ("report runs/a runs/b", "report --runs runs/a runs/b"),
        ("report --output out runs/a", "report --output out --runs runs/a"),
        ("gc c --dry-run", "gc --dry-run --cache c"),
        ("verify --rows 1 c", "verify --cache c --rows=1"),
        ("inspect c --row 3", "inspect --cache c --row 3"),
        ("forget c --source a", "forget --cache c --source a"),
        ("remove c hidden/1 hidden/2", "remove --cache c --signals hidden/1 hidden/2"),
        ("merge all a b", "merge --output all --caches a b"),
    ],
)
def test_what_a_command_is_about_needs_no_flag(words, flags, monkeypatch):
    assert meant(words, monkeypatch) == meant(flags, monkeypatch)


def test_a_config_file_may_stand_anywhere_and_a_run_that_ends_like_one_is_a_run(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.toml").write_text("heldout_rows = 3\n")
    (tmp_path / "settings").write_text("heldout_rows = 4\n")
    (tmp_path / "run.toml").mkdir()
    for line, rows in (
        ("evaluate e.toml run.toml --table", 3),
        ("evaluate run.toml e.toml --table", 3),
        ("evaluate --table --run run.toml e.toml", 3),
        ("evaluate --heldout-rows 5 e.toml run.toml --table", 5),
        ("evaluate run.toml settings --table", 4),
    ):
        config = meant(line, monkeypatch)
        assert (config.run.name, config.heldout_rows, config.table) == ("run.toml", rows, True)


def test_a_tilde_is_the_home_directory_after_an_equals_sign_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(meant("export ~/a --output=~/b", monkeypatch).output) == "/home/me/b"
    assert str(meant("export ~/a --output=~/b", monkeypatch).run) == "/home/me/a"
