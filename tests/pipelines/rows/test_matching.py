"""Which files a glob matches, by which names; and that nothing is left out without a word."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from decant.pipelines.capture.job import precompute
from decant.pipelines.capture.step_inputs import corpus_sources
from decant.pipelines.config import Corpus
from decant.pipelines.rows.matching import matching_files
from decant.pipelines.rows.sources import find_sources
from decant.schemas import open_cache
from decant.schemas.manifest.manifest import Skipped
from tests.making.caches import tiny_settings
from tests.paths import environment


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def names(pattern: Path | str) -> list[str]:
    def refuse(path: str, problem: str) -> None:
        raise AssertionError(f"{path}: {problem}")

    return [match.name for match in matching_files(str(pattern), refuse=refuse)]


def refused(pattern: Path | str) -> dict[str, str]:
    problems: dict[str, str] = {}
    matching_files(str(pattern), refuse=problems.__setitem__)
    return problems


FILES = ("a.txt", "b.md", "x/a.txt", "x/y/a.txt", ".hidden/a.txt", ".c.txt", "x/b1.txt")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "x/a.txt", "x/b1.txt", "x/y/a.txt"]),
        ("**", ["a.txt", "b.md", "x/a.txt", "x/b1.txt", "x/y/a.txt"]),
        ("**/**/a*", ["a.txt", "x/a.txt", "x/y/a.txt"]),
        ("x/**", ["a.txt", "b1.txt", "y/a.txt"]),
        ("**/y/*", ["x/y/a.txt"]),
        ("*/a.txt", ["x/a.txt"]),
        ("**/[b]*", ["b.md", "x/b1.txt"]),
        ("x/?.txt", ["a.txt"]),
        ("x/../*.md", ["b.md"]),
        ("./a.txt", ["a.txt"]),
        (".*", [".c.txt"]),
        (".hidden/*", ["a.txt"]),
        ("no*", []),
        ("no/*.txt", []),
        ("a.txt/*", []),
        ("x", []),
    ],
)
def test_globs_mean_what_they_mean_in_python(tmp_path, monkeypatch, pattern, expected):
    write(tmp_path, *FILES)
    monkeypatch.chdir(tmp_path)
    assert names(pattern) == expected


def test_a_link_keeps_its_own_name_and_suffix(tmp_path):
    """As in a hub's cache, whose blobs have no suffix."""
    write(tmp_path, "blobs/abc")
    (tmp_path / "blobs" / "abc").write_text(json.dumps({"text": "one"}))
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "snapshots" / "1" / "data.jsonl").symlink_to("../../blobs/abc")
    for pattern in ("snapshots/1/*", "snapshots/1/data.jsonl", "snapshots/**/*.jsonl"):
        (source,) = find_sources([str(tmp_path / pattern)], max_bytes=None, memory=tmp_path / "m")
        assert source.format == "jsonl"
        assert source.name.endswith("data.jsonl")
        assert source.path.endswith("snapshots/1/data.jsonl")
        source.require_unchanged()


def test_a_folder_may_be_a_link_and_moving_the_corpus_changes_no_name(tmp_path):
    write(tmp_path, "far/en/a.txt", "far/b.txt")
    (tmp_path / "corpus").symlink_to("far")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "en").symlink_to("../far/en")
    assert names(tmp_path / "corpus/**/*.txt") == names(tmp_path / "far/**/*.txt")
    assert names(tmp_path / "other/*/*.txt") == ["en/a.txt"]


def test_a_file_with_two_names_is_taken_once_by_the_name_without_a_link(tmp_path):
    write(tmp_path, "z/a.txt")
    (tmp_path / "b.txt").symlink_to("z/a.txt")
    (tmp_path / "c.txt").symlink_to("z/a.txt")
    (tmp_path / "d").symlink_to("z")

    def found(pattern: str) -> list[str]:
        sources = find_sources([str(tmp_path / pattern)], max_bytes=None, memory=tmp_path / "m")
        return [source.name for source in sources]

    assert found("**/*.txt") == ["z/a.txt"]
    assert found("*.txt") == ["b.txt"]


def test_links_that_lead_round_in_a_circle_end(tmp_path):
    write(tmp_path, "x/y/a.txt")
    (tmp_path / "x" / "y" / "up").symlink_to("..")
    (tmp_path / "x" / "here").symlink_to(".")
    sources = find_sources([str(tmp_path / "**/*.txt")], max_bytes=None, memory=tmp_path / "m")
    assert [source.name for source in sources] == ["x/y/a.txt"]


def test_what_matches_and_is_no_file_is_named(tmp_path):
    write(tmp_path, "a.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "gone-folder").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.txt"))
    problems = refused(tmp_path / "*.txt")
    assert {Path(path).name for path in problems} == {
        "gone.txt", "self.txt", "pipe.txt", "socket.txt"
    }  # fmt: skip
    assert problems[str(tmp_path / "gone.txt")] == "this link leads nowhere"
    assert "a pipe, a socket or a device" in problems[str(tmp_path / "pipe.txt")]
    for pattern in ("**/*.txt", "*/a.txt"):  # the link may have led to a folder of such files
        assert str(tmp_path / "gone-folder") in refused(tmp_path / pattern)
    assert refused(tmp_path / "a*") == {}


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    write(tmp_path, "a.txt")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.txt")).write_text("b")
    with pytest.raises(ValueError, match=r"b\\xff\.txt: this name is not UTF-8; rename the file"):
        corpus_sources(Corpus(files=(str(tmp_path / "*.txt"),)))
    sources, skipped = corpus_sources(Corpus(files=(str(tmp_path / "*.txt"),), on_error="skip"))
    assert [source.name for source in sources] == ["a.txt"]
    assert [item.source for item in skipped] == [str(tmp_path / "b\\xff.txt")]


AS_NOBODY = """
import os, sys
from decant.pipelines.rows.matching import matching_files
if os.geteuid() == 0:  # permissions do not bind this user
    os.setuid(65534)
matching_files(sys.argv[1], refuse=lambda path, why: print(path, why, sep="|"))
"""


def test_folders_and_files_without_permission_are_named():
    modes = {"shut": 0o000, "open/secret.txt": 0o000, "closed": 0o644}
    seen = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        root.chmod(0o755)
        write(root, "open/a.txt", "shut/a.txt", "open/secret.txt", "closed/a.txt")
        for name, mode in modes.items():
            (root / name).chmod(mode)
        for pattern in ("**/*.txt", "*/a.txt"):
            command = [sys.executable, "-c", AS_NOBODY, str(root / pattern)]
            output = subprocess.check_output(command, env=environment(), text=True)
            lines = (line.removeprefix(f"{root}/").split("|") for line in output.splitlines())
            seen[pattern] = dict(lines)
        for name in modes:
            (root / name).chmod(0o755)
    assert "this folder cannot be read" in seen["**/*.txt"]["shut"]
    assert "no permission" in seen["**/*.txt"]["open/secret.txt"]
    assert "Permission denied" in seen["**/*.txt"]["closed/a.txt"]
    assert set(seen["*/a.txt"]) == {"shut/a.txt", "closed/a.txt"}


def test_what_cannot_be_read_stops_a_capture_or_is_listed_in_its_manifest(tmp_path):
    config = tiny_settings(tmp_path)
    corpus = dataclasses.replace(config.corpus, files=(str(tmp_path / "corpus" / "*"),))
    (tmp_path / "corpus" / "gone.txt").symlink_to("nowhere")
    bad = [json.dumps({"\ud800": 1}), "[" * 100_000, json.dumps({"text": "one word after another"})]
    (tmp_path / "corpus" / "lines.jsonl").write_text("\n".join(bad))
    with pytest.raises(ValueError, match=r"gone\.txt: this link leads nowhere.*on_error"):
        precompute(dataclasses.replace(config, corpus=corpus))
    assert not (tmp_path / "cache").exists()
    corpus = dataclasses.replace(corpus, on_error="skip")
    precompute(dataclasses.replace(config, corpus=corpus))
    (part,) = open_cache(tmp_path / "cache").manifest.parts
    link, *lines = part.skipped
    assert link == Skipped(str(tmp_path / "corpus" / "gone.txt"), "this link leads nowhere")
    assert {item.source for item in lines} == {"lines.jsonl"}
    assert lines[0].reason.startswith("line 1: no field 'text' (has: \\ud800)")
    assert lines[1].reason == "line 2: nested too deeply"
