"""`merge` and `tokenise` in a bucket: what they make there is read as on the disk."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from decant.pipelines.__main__ import main
from decant.pipelines.capture.rows_only import tokenise_only
from decant.pipelines.config import Corpus, Tokenise
from decant.pipelines.upkeep.copy import copy
from decant.pipelines.upkeep.merge import merge
from decant.schemas import open_cache
from decant.store import open_store
from tests.making.caches import tiny_cache, write_corpus


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> tuple[Path, Path]:
    """Two caches of one teacher, of different texts."""
    root = tmp_path_factory.mktemp("two")
    write_corpus(root / "corpus", files=3, words=90)
    one = tiny_cache(root, output=root / "one").path
    for path in (root / "corpus").iterdir():
        path.write_text(path.read_text()[::-1])
    return one, tiny_cache(root, output=root / "two").path


@pytest.fixture(autouse=True)
def mirror(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DECANT_MIRROR", str(tmp_path / "mirror"))


@pytest.fixture
def there(caches, bucket) -> str:
    """A folder of the bucket with copies of both, `one` and `deep/two`."""
    for cache, name in zip(caches, ("one", "deep/two"), strict=True):
        copy(cache, f"{bucket}/{name}")
    return bucket


def merged(there: str, output: str = "merged", *more: str) -> int:
    return main(["merge", f"{there}/{output}", f"{there}/one", f"{there}/deep/two", *more])


def test_a_merged_cache_in_a_bucket_reads_as_its_caches_and_has_the_id_of_one_on_the_disk(
    caches, there, tmp_path, capsys
):
    shutil.copytree(caches[0], tmp_path / "one")
    shutil.copytree(caches[1], tmp_path / "deep/two")
    here = merge(tmp_path / "merged", [tmp_path / "one", tmp_path / "deep/two"]).manifest
    capsys.readouterr()
    assert merged(there, "merged", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    cache = open_cache(f"{there}/merged")
    assert told["cache_id"] == cache.manifest.cache_id == here.cache_id
    assert cache.address == f"{there}/merged"
    assert cache.manifest == dataclasses.replace(here, by_content=True)
    expected = [open_cache(path).read(range(len(open_cache(path)))) for path in caches]
    for name, array in cache.read(range(len(cache))).items():
        np.testing.assert_array_equal(array, np.concatenate([read[name] for read in expected]))
    assert cache.tokenizer_files() == open_cache(caches[0]).tokenizer_files()
    np.testing.assert_array_equal(cache.tail_prior(), open_cache(tmp_path / "merged").tail_prior())
    assert json.loads(cache.plan_path(cache.manifest.parts[1]).read_text())["teacher"]
    assert {key.partition("/")[0] for key, _ in open_store(f"{there}/merged").list()} == {
        "manifest.json",
        "tokenizer",
        "tokenizer.json",
    }


def test_it_forgets_what_they_forget_and_misses_what_is_gone(there, capsys):
    assert merged(there) == 0
    before = len(open_cache(f"{there}/merged").rows())
    assert main(["forget", f"{there}/deep/two", "--source=document-001.txt"]) == 0
    assert len(open_cache(f"{there}/merged").rows()) < before
    assert merged(there) == 0, "the same again takes in what they are now"
    assert main(["gc", f"{there}/merged", "--grace-hours=0"]) == 0
    capsys.readouterr()
    place = f"{there}/one/parts/0000"
    source = open_cache(f"{there}/one").manifest.parts[0].sources[0].sha256
    assert main(["forget", f"{there}/merged", f"--source={source}"]) == 1
    assert f"part of another cache, {place}; forget it there" in capsys.readouterr().err
    assert main(["verify", f"{there}/merged", "--rows=0"]) == 2
    assert f"part {place} lies in another cache. Verify the caches" in capsys.readouterr().err
    store = open_store(f"{there}/one")
    plan = store.get("parts/0000/plan.json")
    store.put("parts/0000/plan.json", plan + b" ")
    with pytest.raises(ValueError, match=f"{place}/plan.json: sha256 .* another capture"):
        open_cache(f"{there}/merged")
    store.put("parts/0000/plan.json", plan)
    assert len(open_cache(f"{there}/merged").rows()) < before
    store.delete("manifest.json")
    with pytest.raises(ValueError, match=f"another cache, {place}, which is missing"):
        open_cache(f"{there}/merged")


def test_caches_elsewhere_and_copies_of_merged_ones_are_refused_with_the_way_out(
    caches, there, tmp_path, capsys
):
    for output, cache in (
        (f"{there}/merged", caches[0]),
        (tmp_path / "merged", f"{there}/one"),
        ("s3://other-bucket/merged", f"{there}/one"),
    ):
        assert main(["merge", str(output), str(cache)]) == 1
        assert f"error: {cache}: a merged cache refers to its" in capsys.readouterr().err
    assert main(["merge", f"{there}/one", f"{there}/one"]) == 1
    assert "is one of the caches to merge" in capsys.readouterr().err
    assert main(["merge", f"{there}/one", f"{there}/deep/two"]) == 1
    assert f"{there}/one: is a cache with parts of its own" in capsys.readouterr().err
    assert merged(there) == 0
    with pytest.raises(ValueError, match="Copy the caches that it was merged from"):
        copy(f"{there}/merged", tmp_path / "copy")


def test_rows_without_a_teacher_are_those_of_the_disk(caches, there, tmp_path, capsys):
    corpus = Corpus(files=(f"{caches[0].parent}/corpus/*.txt",))
    made = Tokenise(like=caches[0], corpus=corpus, output=tmp_path / "text")
    tokenise_only(made)
    far = dataclasses.replace(made, like=Path(f"{there}/one"), output=Path(f"{there}/text"))
    tokenise_only(far)
    here, away = open_cache(tmp_path / "text"), open_cache(f"{there}/text")
    assert away.manifest.cache_id == here.manifest.cache_id
    expected = here.read(here.rows(), [])
    for name, array in away.read(away.rows(), []).items():
        np.testing.assert_array_equal(array, expected[name])
    capsys.readouterr()
    tokenise_only(far)
    assert f"{there}/text: sealed already, nothing to do" in capsys.readouterr().err
