"""The menu, and what every command answers before its job is imported."""

import os
import re
import resource
import subprocess
import sys

import pytest

import decant
from decant.__main__ import main
from decant.command_line import menu
from decant.command_line.settings import parse
from decant.pipelines import __main__ as pipelines_main
from decant.pipelines.__main__ import COMMANDS as PIPELINES
from decant.pipelines.config import Precompute
from decant.trainer import __main__ as trainer_main
from decant.trainer.__main__ import COMMANDS as TRAINER
from decant.trainer.config import Generate
from tests.making.caches import tiny_cache
from tests.paths import environment

ALL = menu.CACHES | menu.STUDENTS


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "decant", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def test_the_menu_names_every_command_once():
    assert list(menu.CACHES) == list(PIPELINES)
    assert list(menu.STUDENTS) == list(TRAINER)
    assert not set(PIPELINES) & set(TRAINER)


def test_the_menu_answers_in_under_half_a_second():
    """Of processor time, the least of three, because other tests run beside this one."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in ALL)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("name", ALL)
def test_help_of_a_command_is_no_error_and_needs_no_jax(name):
    code = (
        "import sys; from decant.__main__ import main\n"
        f"try: main([{name!r}, '--help'])\n"
        "except SystemExit as done: assert not done.code\n"
        "sys.exit(str({'jax', 'flax', 'apache_beam', 'tensorstore'} & set(sys.modules) or ''))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert f"usage: decant {name}" in done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("tiny")).path


@pytest.mark.parametrize(
    "command",
    [
        "decant --help",
        "decant --version",
        "decant train --help",
        "decant inspect CACHE",
        "decant inspect CACHE --row 0",
        "decant.pipelines merge --help",
        "decant.trainer --help",
    ],
)
def test_a_reader_that_leaves_early_is_no_error(command, cache):
    """Its end of the pipe is closed before the command begins, so the first write fails."""
    reader, writer = os.pipe()
    os.close(reader)
    module, *arguments = command.replace("CACHE", str(cache)).split()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141


def test_a_broken_pipe_to_another_process_is_an_error(capsys, monkeypatch):
    def broken(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    for package, command in ((pipelines_main, "gc"), (trainer_main, "train")):
        monkeypatch.setitem(package.COMMANDS, command, broken)
        assert main([command]) == 1
        assert "error: [Errno 32] Broken pipe" in capsys.readouterr().err


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"decant {decant.__version__}\n"


@pytest.mark.parametrize("help_flag", ["-h", "--help"])
def test_help_is_no_error(help_flag, capsys):
    assert main([help_flag]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("asked", "near"), [("precomput", "precompute"), ("trian", "train")])
def test_an_unknown_command_is_told_the_nearest_one(asked, near, capsys):
    assert main([asked]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"unknown command {asked!r}; did you mean {near}?" in printed.err


@pytest.mark.parametrize(
    ("package", "asked", "error"),
    [
        (pipelines_main, "verfy", "unknown command 'verfy'; did you mean verify?"),
        (trainer_main, "evalute", "unknown command 'evalute'; did you mean evaluate?"),
        (trainer_main, "precompute", "another package: `decant precompute` finds it"),
    ],
)
def test_a_package_too_is_told_the_nearest_command(package, asked, error, capsys):
    assert package.main([asked]) == 2
    assert error in capsys.readouterr().err


def test_without_a_command_the_menu_is_an_error(capsys):
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "precompute" in printed.err


@pytest.mark.parametrize("package", ["pipelines", "trainer"])
def test_a_package_runs_its_own_commands(package):
    command = [sys.executable, "-m", f"decant.{package}"]
    for arguments, status in ((["--help"], 0), ([], 2), (["nothing", "--help"], 2)):
        done = subprocess.run(
            [*command, *arguments], env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == status
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["forget", "cache"],
        ["verify"],
        ["gc", "--dry-run"],
        ["merge", "out"],
        ["remove", "cache"],
        ["remove", "cache", "--signals"],
    ],
)
def test_a_missing_argument_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert re.fullmatch(
        r"error: (CACHE|CACHES|SIGNALS|SOURCE|--signals) (is missing|needs a value: .*)\. "
        rf"`decant {arguments[0]} --help` tells more\n",
        capsys.readouterr().err,
    )


def test_a_negative_number_of_rows_cannot_be_verified(capsys):
    assert main(["verify", "cache", "--rows", "-1"]) == 2
    assert "rows is -1" in capsys.readouterr().err


def test_a_document_flag_without_a_number_does_not_forget_the_whole_file(capsys):
    assert main(["forget", "cache", "--source", "a.txt", "--document"]) == 2
    assert "--document needs at least one number" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--json", "none.toml"], ["none.toml", "--json"]])
def test_plan_takes_json_before_and_after_the_config_file(arguments, capsys):
    assert main(["plan", *arguments]) == 1
    assert "none.toml: no such config file" in capsys.readouterr().err


ADDRESSES = [
    (["precompute", "--output", "az://b/c"], "output"),
    (["precompute", "--corpus.files", "a.txt", "ftp://b/*.txt"], "corpus.files"),
    (["plan", "--teacher.model", "https://host/owner/name"], "teacher.model"),
    (["tokenise", "--like", "az://b"], "like"),
    (["verify", "az://b/c"], "cache"),
    (["verify", "here", "--teacher", "hf://b/c"], "teacher"),
    (["inspect", "here", "--html", "file:///tmp/row.html"], "html"),
    (["merge", "here", "there", "az://b/c"], "caches"),
    (["train", "--run", "hdfs://b/c"], "run"),
    (["train", "gs://b/c.toml"], "the config file"),
    (["train", "--student.source", "https://b/c"], "student.source"),
    (["train", "--student.config", "s3://b/c.json"], "student.config"),
    (["report", "gs://b/run"], "runs"),
    (["export", "--output", "az://b/c"], "output"),
]


@pytest.mark.parametrize(("arguments", "name"), ADDRESSES, ids=lambda value: " ".join(value))
def test_an_address_in_place_of_a_path_is_refused_and_makes_no_folder(
    arguments, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert main(arguments) == (2 if arguments[0] == "verify" else 1)
    address = next(argument for argument in arguments if "://" in argument)
    assert f"error: {name} is {address.replace(':///', '://')}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_text_that_is_no_path_may_hold_an_address():
    scheduler = "dask_client_address=tcp://10.0.0.1:8786"
    config = parse(Precompute, ["--runner-options", scheduler], program="p")
    assert config.runner_options == (scheduler,)
    assert parse(Generate, ["--prompt", "https://host/"], program="p").prompt == "https://host/"
