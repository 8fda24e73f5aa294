"""`--replace-changed`: a changed file in a sealed cache is forgotten and captured again."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from decant.pipelines.capture.estimate import estimate
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Precompute
from decant.pipelines.upkeep.forget import forget
from decant.progress import notices
from decant.schemas import open_cache
from decant.schemas.disk.steps import Step
from decant.schemas.reading.units import read_unit_rows
from tests.killing import killer
from tests.making.caches import tiny_settings, write_corpus

CHANGED = "document-001.txt"


def settings(root: Path, **changes) -> Precompute:
    return dataclasses.replace(tiny_settings(root, sequence_length=32), **changes)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("replacing")
    write_corpus(root / "corpus", files=5, words=60)
    precompute(settings(root))
    return root


def changed(root: Path, at: Path) -> Path:
    """A copy of the sealed cache and its corpus, one file of which has changed since."""
    shutil.copytree(root, at)
    path = at / "corpus" / CHANGED
    path.write_text(path.read_text()[::-1] * 2)
    return at


def sources_read(cache: Path) -> set[tuple[int, str, str]]:
    """(part, name, sha256) of the documents of all rows that readers get."""
    opened, found, first = open_cache(cache), set(), 0
    shown = set(opened.rows().tolist())
    for at, part in enumerate(opened.manifest.parts):
        gone = {place.source for place in part.forgotten}
        for number, unit in part.numbered_units:
            for row in read_unit_rows(cache / part.path, number, unit, length=32):
                if first in shown:
                    kept = set(row.origins[:, 0].tolist()) - gone
                    found |= {(at, part.sources[n].name, part.sources[n].sha256) for n in kept}
                first += 1
    return found


def test_the_refusal_names_the_flag(sealed, tmp_path):
    root = changed(sealed, tmp_path / "a")
    with pytest.raises(ValueError, match=f"(?s){CHANGED} has changed.*--replace-changed"):
        precompute(settings(root))


def test_the_old_document_is_forgotten_and_the_new_one_captured_once(sealed, tmp_path):
    root = changed(sealed, tmp_path / "a")
    before = sources_read(sealed / "cache")
    planned = estimate(settings(root, replace_changed=True), console=notices(quiet=True))
    assert planned.sources == 1
    assert open_cache(root / "cache").manifest == open_cache(sealed / "cache").manifest
    manifest = precompute(settings(root, replace_changed=True))
    after = sources_read(root / "cache")
    assert {name for _, name, _ in after} == {name for _, name, _ in before}
    assert {item for item in after if item[1] != CHANGED} == {
        item for item in before if item[1] != CHANGED
    }
    ((part, _, sha256),) = (item for item in after if item[1] == CHANGED)
    assert part == 1
    assert sha256 == manifest.parts[1].sources[0].sha256
    for flag in (True, False):
        assert precompute(settings(root, replace_changed=flag)) == manifest

    path = root / "corpus" / CHANGED
    path.write_text(path.read_text() + " more")
    (root / "corpus" / "new.txt").write_text("a new text beside it " * 30)
    again = precompute(settings(root, replace_changed=True))
    assert [len(part.sources) for part in again.parts] == [5, 1, 2]
    assert [part for part, name, _ in sources_read(root / "cache") if name == CHANGED] == [2]


def test_wrong_settings_forget_nothing(sealed, tmp_path):
    root = changed(sealed, tmp_path / "a")
    wrong = settings(root, replace_changed=True)
    wrong = dataclasses.replace(wrong, corpus=dataclasses.replace(wrong.corpus, heldout=0.5))
    with pytest.raises(ValueError, match=r"corpus.heldout: there 0.2, asked for 0.5"):
        precompute(wrong)
    assert open_cache(root / "cache").manifest == open_cache(sealed / "cache").manifest


def test_a_forgotten_file_may_be_deleted_and_the_cache_grow(sealed, tmp_path):
    root = changed(sealed, tmp_path / "a")
    forget(root / "cache", source=CHANGED)
    (root / "corpus" / CHANGED).unlink()
    (root / "corpus" / "new.txt").write_text("a new text beside it " * 30)
    assert [len(part.sources) for part in precompute(settings(root)).parts] == [5, 1]
    (root / "corpus" / "new.txt").unlink()
    with pytest.raises(ValueError, match=r"new.txt is missing"):
        precompute(settings(root))


def test_records_of_a_changed_file_are_replaced_too(sealed, tmp_path):
    shutil.copytree(sealed / "teacher", tmp_path / "teacher")
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(sorted((sealed / "corpus").glob("*.txt"))):
        lines = [json.dumps({"text": part}) for part in text.read_text().split(". ")]
        (tmp_path / "corpus" / f"{number}.jsonl").write_text("\n".join(lines))
    shutil.copy(tmp_path / "corpus" / "1.jsonl", tmp_path / "corpus" / "copy.jsonl")
    config = settings(tmp_path, replace_changed=True)
    files = (str(tmp_path / "corpus"),)
    config = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, files=files))
    precompute(config)
    for name in ("0.jsonl", "copy.jsonl"):
        text = json.dumps({"text": f"another text of {name} " * 40})
        (tmp_path / "corpus" / name).write_text(text)
    manifest = precompute(config)
    assert [source.name for source in manifest.parts[1].sources] == ["0.jsonl", "copy.jsonl"]
    read = {(part, name) for part, name, _ in sources_read(tmp_path / "cache")}
    # 1.jsonl is as it was, though a file with the same content has changed.
    assert {(0, "1.jsonl"), (1, "0.jsonl"), (1, "copy.jsonl")} <= read
    assert (0, "0.jsonl") not in read


KILLED_AT = [
    Step.MANIFEST_LOCKED,  # before the old file is forgotten
    Step.MANIFEST_NAMED,  # and behind it
    Step.ROWS_GATHERED,
    Step.UNIT_COMMITTED,
    Step.MANIFEST_LOCKED,  # before the new part is sealed
]


def test_killed_between_forgetting_and_capturing_a_rerun_ends_with_the_same_cache(sealed, tmp_path):
    whole = changed(sealed, tmp_path / "whole")
    expected = precompute(settings(whole, replace_changed=True))
    root = changed(sealed, tmp_path / "killed")
    config = settings(root)
    command = [
        "precompute",
        *("--corpus.files", *config.corpus.files),
        f"--corpus.sequence-length={config.corpus.sequence_length}",
        f"--corpus.heldout={config.corpus.heldout}",
        f"--corpus.shard-bytes={config.corpus.shard_bytes}",
        f"--teacher.model={config.teacher.model}",
        f"--teacher.batch-rows={config.teacher.batch_rows}",
        f"--signals.logits.k={config.signals.logits.k}",
        "--signals.logits.profile=lossless",
        "--signals.logits.draws=0",
        "--signals.logits.counts=0",
        "--signals.logits.sketch.rank=0",
        f"--output={config.output}",
        "--replace-changed",
    ]
    with killer(tmp_path / "log") as killing:
        for step in KILLED_AT:
            killing.kill(step, command)
            open_cache(config.output)
    assert precompute(settings(root)) == expected
