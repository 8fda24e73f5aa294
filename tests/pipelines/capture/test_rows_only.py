"""`tokenise`: rows without a teacher, made, verified and shown by the commands."""

import json
import re
import shutil

import pytest

from decant.pipelines.__main__ import main
from decant.schemas import open_cache
from tests.making.caches import write_corpus


@pytest.fixture(scope="module")
def made(grown, tmp_path_factory):
    root = tmp_path_factory.mktemp("rows-only")
    corpus = write_corpus(root / "corpus", files=3, words=300)
    (corpus / "again.txt").write_text((corpus / "document-001.txt").read_text())
    (corpus / "broken.txt").write_bytes(b"ab\xff")
    flags = [f"--corpus.files={corpus}/*.txt", "--corpus.heldout=0.2", "--corpus.on-error=skip"]
    told = ["tokenise", f"--like={grown.cache.path}", *flags, f"--output={root / 'rows'}"]
    assert main(told) == 0
    return open_cache(root / "rows")


@pytest.fixture
def path(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made.path, tmp_path / "rows")


def verified(path, capsys):
    status = main(["verify", str(path), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_left_out_documents_are_counted_and_listed(made):
    (part,) = made.manifest.parts
    assert part.duplicates == 1
    assert [skipped.source for skipped in part.skipped] == ["broken.txt"]


@pytest.mark.parametrize(
    ("name", "flag", "why"),
    [
        ("a.txt", "--corpus.sequence-length=32", "is 32, but .* has rows of 64"),
        ("a.jsonl", "--corpus.heldout=0", "a.jsonl holds chats, but there is no chat template"),
    ],
)
def test_rows_that_do_not_fit_the_cache_are_refused(grown, tmp_path, name, flag, why, capsys):
    message = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    }
    (tmp_path / name).write_text(json.dumps(message) + "\n")
    told = [f"--like={grown.cache.path}", f"--corpus.files={tmp_path / name}", flag]
    assert main(["tokenise", *told, f"--output={tmp_path / 'rows'}"]) == 1
    assert re.search(why, capsys.readouterr().err)
    assert not (tmp_path / "rows").exists()


def test_verify_checks_every_file_without_a_teacher(made, capsys):
    status, report = verified(made.path, capsys)
    assert (status, report["problems"], report["left_over"]) == (0, [], [])
    assert (report["unable"], report["content"]) == (None, {})
    assert report["files"] == sum(
        path.is_file() and path.suffix != ".lock" for path in made.path.rglob("*")
    )


def test_verify_names_damaged_rows(path, capsys):
    file = path / "parts/0000/rows/unit-00000.array_record"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    status, report = verified(path, capsys)
    assert status == 1
    assert [(p["unit"], p["signal"]) for p in report["problems"]] == [(0, "rows")]


def test_verify_says_that_it_cannot_repair_rows(path, capsys):
    (path / "parts/0000/rows/unit-00000.array_record").unlink()
    assert main(["verify", str(path), "--repair"]) == 1
    assert "not repaired" in capsys.readouterr().out


def test_inspect_counts_rows_and_tokens_by_split(made, capsys):
    assert main(["inspect", str(made.path)]) == 0
    printed = capsys.readouterr().out
    assert "rows without targets" in printed
    for split in ("train", "heldout"):
        (line,) = [line for line in printed.splitlines() if line.startswith(f" {split} ")]
        rows = made.rows(split=split)
        batch = made.read(rows, signals=())
        counts = (len(rows), (batch["segment_ids"] > 0).sum(), batch["loss_mask"].sum())
        assert line.split()[1:4] == [f"{n:,}" for n in counts]


@pytest.mark.parametrize("asked", [["--row=0"], ["--html=page.html"]])
def test_inspect_has_no_row_to_show(made, asked, capsys):
    assert main(["inspect", str(made.path), *asked]) == 1
    assert "rows without targets" in capsys.readouterr().err
