"""Who may put things into the directory for locks and sockets, and how long its path may be."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from decant.pipelines.capture.private_directory import private_directory, socket_address
from tests.open_files import is_open
from tests.paths import environment

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The temporary directory of this process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def ours(temporary: Path) -> Path:
    return temporary / f"decant-{os.getuid()}"


def test_it_is_made_for_this_user_alone_whatever_the_umask(temporary):
    before = os.umask(0)
    try:
        directory = private_directory()
    finally:
        os.umask(before)
    assert directory == ours(temporary)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert private_directory() == directory


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o701, 0o1777])
def test_one_that_is_open_to_others_is_refused(temporary, mode):
    ours(temporary).mkdir()
    ours(temporary).chmod(mode)
    with pytest.raises(PermissionError, match=r"decant-\d+: is open to others \(mode "):
        private_directory()


def test_a_link_or_a_file_in_its_place_is_refused(temporary):
    (temporary / "elsewhere").mkdir(mode=0o700)
    ours(temporary).symlink_to(temporary / "elsewhere")
    with pytest.raises(PermissionError, match="is a link or a file"):
        private_directory()
    ours(temporary).unlink()
    ours(temporary).symlink_to(temporary / "dangling")
    with pytest.raises(PermissionError, match="is a link or a file"):
        private_directory()
    ours(temporary).unlink()
    ours(temporary).write_text("")
    with pytest.raises(PermissionError, match="is a link or a file"):
        private_directory()
    assert sorted(path.name for path in temporary.iterdir()) == [ours(temporary).name, "elsewhere"]


def test_a_temporary_directory_in_which_others_may_rename_is_refused(temporary):
    temporary.chmod(0o777)
    with pytest.raises(PermissionError, match=r"\(mode 777, not sticky\); set TMPDIR"):
        private_directory()
    temporary.chmod(0o1777)
    assert private_directory() == ours(temporary)


@root_only
def test_one_of_another_user_is_refused(temporary):
    ours(temporary).mkdir(mode=0o700)
    os.chown(ours(temporary), 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        private_directory()


STRANGER = """
import os, socket, sys
os.setgroups([])
os.setgid(12345)
os.setuid(12345)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
"""


@root_only
def test_another_user_cannot_connect():
    with tempfile.TemporaryDirectory(dir="/tmp") as above, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", above)
        Path(above).chmod(0o1777)
        path = private_directory() / "a.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            path.chmod(0o777)
            command = [sys.executable, "-c", STRANGER, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert "PermissionError" in done.stderr
            path.parent.chmod(0o711)  # the stranger fails at the directory and at nothing else
            assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize("length", [80, 107, 108, 180])
def test_a_path_of_any_length_has_an_address(temporary, length):
    directory = temporary / "d" / ("x" * max(1, length - len(str(temporary)) - 3))
    directory.mkdir(parents=True)
    path = directory / "0123456789abcdef.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as asker:
        with socket_address(path) as address:
            listener.bind(address)
        listener.listen()
        assert path.is_socket()
        with socket_address(path) as address:
            asker.connect(address)
    assert not is_open(directory)


def test_processes_meet_below_a_long_temporary_directory(tmp_path):
    """The holder is asked to leave, and the asker gets the lease."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    code = (
        "import sys; from pathlib import Path; from types import SimpleNamespace as N\n"
        "from decant.pipelines.capture.teacher_lease import with_teacher\n"
        "with_teacher(N(part=Path(sys.argv[1])), lambda job: print('held', flush=True))\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "part")]
    options = {"env": environment() | {"TMPDIR": str(long)}, "stdin": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    second = None
    try:
        assert first.stdout.readline() == "held\n"
        second = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
        assert second.stdout.readline() == "held\n"
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.communicate()
