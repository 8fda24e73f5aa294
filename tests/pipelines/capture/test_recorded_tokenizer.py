"""Caches that an older release began: read, resumed and grown under the digest they record.

Releases before 0.8 took the tokenizer's digest from the spelling of tokenizer.json.
"""

import dataclasses
import json
import shutil
from unittest import mock

import pytest
from rich.console import Console

from decant.models import open_checkpoint
from decant.models.text.tokenizer import Tokenizer, tokenizer_of
from decant.pipelines.capture.job import Capture, precompute
from decant.pipelines.capture.rows_only import tokenise_only
from decant.pipelines.config import Corpus, Tokenise
from decant.pipelines.upkeep.merge import merge
from decant.pipelines.verification.structure import check_structure
from decant.schemas import open_cache
from decant.schemas.manifest.manifest import read_manifest
from decant.trainer.config import Student
from decant.trainer.run.initial_student import build_student
from tests.making.caches import tiny_settings, write_corpus


def by_the_old_release():
    return mock.patch.object(Tokenizer, "digest", Tokenizer.digest_before_0_8)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The settings of a cache that was captured by the old release."""
    root = tmp_path_factory.mktemp("old")
    write_corpus(root / "corpus", files=3, words=100)
    config = tiny_settings(root, heldout=0.0)
    with by_the_old_release():
        precompute(config)
    return config


@pytest.fixture
def copied(old, tmp_path):
    """The settings of a copy that a test may change."""
    root = old.output.parent
    for name in ("corpus", "teacher", "cache"):
        shutil.copytree(root / name, tmp_path / name)
    return tiny_settings(tmp_path, heldout=0.0)


def quiet():
    return Console(quiet=True)


def save_again(teacher):
    """Write the teacher's tokenizer in another spelling."""
    file = teacher / "tokenizer.json"
    definition = json.loads(file.read_text())
    model = definition["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    del model["ignore_merges"], model["fuse_unk"]
    definition["decoder"] = None
    file.write_text(json.dumps(definition))
    return Tokenizer.from_files(teacher)


def test_it_is_read_and_verified_and_its_student_may_come_from_the_teacher(old):
    cache = open_cache(old.output)
    tokenizer = tokenizer_of(cache)
    assert cache.manifest.tokenizer == tokenizer.digest_before_0_8 != tokenizer.digest
    assert check_structure(old.output, cache.manifest).problems == []
    source = Student(init="checkpoint", source=old.teacher.model)
    build_student(source, cache=cache, dtype="float32", seed=0)


@pytest.mark.parametrize("saved_again", [False, True])
def test_it_grows_under_its_digest(copied, saved_again):
    before = read_manifest(copied.output)
    if saved_again:
        save_again(copied.output.parent / "teacher")
    assert precompute(copied) == before
    write_corpus(copied.output.parent / "corpus", files=4, words=100)
    with by_the_old_release():
        expected = Capture(tiny_settings(copied.output.parent, heldout=0.0), quiet())
    rows_ids = [part.rows_id for part in expected.parts]
    after = precompute(copied)
    if not saved_again:
        assert list(after.rows_ids) == rows_ids
    assert after.tokenizer == before.tokenizer
    assert after.rows_ids[0] == before.rows_id
    assert check_structure(copied.output, after).problems == []


def test_it_is_resumed_before_and_after_it_was_calibrated(copied):
    first = read_manifest(copied.output)
    (copied.output / "manifest.json").unlink()
    assert precompute(copied) == first
    (copied.output / "manifest.json").unlink()
    part = copied.output / "parts" / "0000"
    for path in part.iterdir():
        if path.name != "request.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(copied.output / "tokenizer")
    (resumed,) = Capture(copied, quiet()).parts
    assert resumed.rows_id == first.rows_id
    resumed.claim(sealed=False)


def test_a_teacher_of_another_tokenizer_is_another_capture(copied):
    file = copied.output.parent / "teacher" / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    file.write_text(json.dumps(definition))
    with pytest.raises(ValueError, match="this directory holds another capture"):
        precompute(copied)


def test_text_beside_it_and_a_merge_with_a_new_cache(old, tmp_path):
    for path in write_corpus(tmp_path / "corpus", files=3, words=77).iterdir():
        path.write_text(path.read_text()[::-1])
    shutil.copytree(old.output.parent / "teacher", tmp_path / "teacher")
    tokenizer = save_again(tmp_path / "teacher")
    new = precompute(tiny_settings(tmp_path, heldout=0.0))
    assert new.tokenizer == tokenizer.digest
    for order in ((old.output, tmp_path / "cache"), (tmp_path / "cache", old.output)):
        merged = tmp_path / "merged" / order[0].name / "both"
        merge(merged, order)
        assert check_structure(merged, read_manifest(merged)).problems == []
        shutil.rmtree(merged.parent)
    corpus = Corpus(files=(str(tmp_path / "corpus" / "*.txt"),), heldout=0.0)
    asked = Tokenise(like=old.output, corpus=corpus, output=tmp_path / "text")
    with by_the_old_release():
        expected = tokenise_only(asked, console=quiet()).rows_id
    assert tokenise_only(asked, console=quiet()).rows_id == expected
    again = dataclasses.replace(asked, output=tmp_path / "again")
    assert tokenise_only(again, console=quiet()).rows_id == expected


def test_the_digests_of_the_embedded_tokenizer_stay_as_recorded():
    """The first is release 0.7's, noted then. Caches would be unreadable if either changed."""
    tokenizer = open_checkpoint("embedded").tokenizer()
    assert tokenizer.digest_before_0_8 == (
        "b57e93e4c244eb2b33987f2627a2c240ac5284f58533c1ec7253ad8ce1a3d0c3"
    )
    assert tokenizer.digest == ("f0de2dbc93cf1a6a541f3d14876eb6236aa1c8446e16747152db913244536c8f")
