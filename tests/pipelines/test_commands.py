"""The command line itself, before any command runs."""

import pytest

from decant.pipelines.__main__ import COMMANDS, main


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_help_is_no_error_and_names_every_command(asked, capsys):
    assert main([asked]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert all(name in printed.out for name in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["precomput"], ["nothing", "--help"]])
def test_without_a_command_the_usage_is_an_error(arguments, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "precompute" in printed.err
