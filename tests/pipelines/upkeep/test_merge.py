"""`merge`: the merged cache reads as its parts do, copies nothing and notices changes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from decant.models.text.tokenizer import Tokenizer, tokenizer_of
from decant.pipelines.__main__ import main
from decant.pipelines.capture.job import precompute
from decant.pipelines.upkeep.forget import forget
from decant.pipelines.upkeep.garbage import unnamed
from decant.pipelines.upkeep.merge import merge
from decant.pipelines.upkeep.remove import remove_signals
from decant.pipelines.verification.structure import check_structure
from decant.pipelines.verification.verify import verify
from decant.schemas import open_cache
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.identity import digest_memory
from decant.schemas.manifest.manifest import read_manifest, write_manifest
from tests.making.caches import write_corpus
from tests.making.grown import Grown, hashes, settings

NAMES = ("logits", "attention/1")


@pytest.fixture(scope="module")
def other(grown, tmp_path_factory) -> Path:
    """A cache of another text, by the same teacher."""
    root = tmp_path_factory.mktemp("other")
    shutil.copytree(grown.root / "teacher", root / "teacher")
    for path in write_corpus(root / "corpus", files=3, words=90).iterdir():
        path.write_text(path.read_text()[::-1])
    precompute(settings(root))
    return root / "cache"


@pytest.fixture
def place(grown, other, tmp_path) -> Path:
    """A directory with the caches `one`, `two` and `merged`, which is merged from both."""
    shutil.copytree(grown.root / "cache", tmp_path / "one")
    shutil.copytree(other, tmp_path / "two")
    merge(tmp_path / "merged", [tmp_path / "one", tmp_path / "two"])
    return tmp_path


def test_it_reads_as_its_caches_one_after_the_other_and_copies_nothing(place):
    cache, *others = (open_cache(place / name) for name in ("merged", "one", "two"))
    assert len(cache.manifest.parts) == 3
    arrays = cache.read(range(len(cache)), NAMES)
    expected = [o.read(range(len(o)), NAMES) for o in others]
    for name, array in arrays.items():
        joined = np.concatenate([read[name] for read in expected])
        np.testing.assert_array_equal(array, joined, err_msg=name)
    first, second = (o.rows("heldout") for o in others)
    assert cache.rows("heldout").tolist() == [*first, *(second + len(others[0]))]
    assert not (place / "merged/parts").exists()
    assert read_json(place / "merged/manifest.json")["version"] == 2


def test_caches_move_together(place):
    shutil.move(place, place.with_name("elsewhere"))
    place = place.with_name("elsewhere")
    cache = open_cache(place / "merged")
    cache.read(cache.rows(), NAMES)
    (place / "two").rename(place / "three")
    with pytest.raises(ValueError, match=r"refers to a part of another cache, .*two.* is missing"):
        open_cache(place / "merged")


def test_another_capture_at_the_path_of_a_part_is_named(place, grown):
    shutil.rmtree(place / "two")
    shutil.copytree(grown.root / "cache", place / "two")
    with pytest.raises(
        ValueError, match=r"two/parts/0000/plan\.json: .*it now holds another capture"
    ):
        open_cache(place / "merged")


def test_a_merged_cache_notices_what_its_caches_forget_or_lose(place):
    before = open_cache(place / "merged")
    forget(place / "two", source="document-001.txt")
    after = open_cache(place / "merged")
    assert after.manifest.forgotten_id != before.manifest.forgotten_id
    rows = before.rows()
    gone = before.read(rows)["loss_mask"].sum() - after.read(rows)["loss_mask"].sum()
    assert gone > 0
    sources = {s.name: s.sha256 for s in after.manifest.parts[2].sources}
    with pytest.raises(ValueError, match="forget it there"):
        forget(place / "merged", source=sources["document-001.txt"])
    with pytest.raises(ValueError, match=r"2 sources are called document-001\.txt; name one by"):
        forget(place / "merged", source="document-001.txt")
    remove_signals(place / "one", ["attention/1"])
    with pytest.raises(ValueError, match=r"refers to attention/1 of .*one/parts/0000, .* removed"):
        open_cache(place / "merged")
    merged = merge(place / "merged", [place / "one", place / "two"])
    assert merged.lost == {
        "attention/1": f"{place / 'one'} does not hold it",
        "hidden/1": "it was projected onto other directions in each",
    }
    assert open_cache(place / "merged").manifest.signals.keys() == {"logits"}


def test_parts_with_the_same_rows_are_taken_once(place, grown):
    shutil.copytree(place / "one", place / "copy")
    merged = merge(place / "more", [place / "one", place / "two", place / "copy"])
    assert [text.split(",")[0] for text in merged.left_out] == [
        str(place / "copy/parts/0000"),
        str(place / "copy/parts/0001"),
    ]
    assert len(open_cache(place / "more")) == len(open_cache(place / "merged"))


def test_parts_that_share_some_rows_are_refused(place):
    manifest = read_manifest(place / "two")
    (part,) = manifest.parts
    shutil.copytree(place / "two", place / "half")
    half = dataclasses.replace(
        part, units=part.units[:1], numbers=(0,), planned_units=len(part.units)
    )
    write_manifest(
        place / "half", dataclasses.replace(manifest, parts=(half,)), replaces=manifest.cache_id
    )
    with pytest.raises(
        ValueError, match=r"two/parts/0000: 1 of its .* units have the rows of .*half"
    ):
        merge(place / "more", [place / "half", place / "two"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sequence_length": 128}, "tokens a row: 64, and 128"),
        ({"teacher_id": "e" * 64}, r"teacher_id of logits: [0-9a-f]{12}, and eeeeeeeeeeee"),
        ({"k": 4}, "k of logits: 8, and 4"),
    ],
)
def test_caches_that_do_not_match_are_refused_naming_both_sides(place, change, named):
    manifest = read_manifest(place / "two")
    (part,) = manifest.parts
    if change.keys() & {"teacher_id", "k"}:
        logits = dataclasses.replace(part.signals["logits"], **change)
        part = dataclasses.replace(part, signals={**part.signals, "logits": logits})
        change = {"parts": (part,)}
    other = dataclasses.replace(manifest, **change)
    write_manifest(place / "two", other, replaces=manifest.cache_id)
    with pytest.raises(ValueError, match=rf"one and .*two cannot be one cache:\n(.*\n)*  {named}"):
        merge(place / "more", [place / "one", place / "two"])


def respelt(place, **changes):
    """Change the tokenizer of the cache "two": `changes` replace fields of its model."""
    manifest, file = read_manifest(place / "two"), place / "two" / "tokenizer" / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["model"] |= changes
    file.write_text(json.dumps(definition, indent=1))
    digest = Tokenizer.from_files(file.parent).digest_before_0_8
    other = dataclasses.replace(manifest, tokenizer=digest)
    write_manifest(place / "two", other, replaces=manifest.cache_id)
    return definition["model"]


def test_caches_of_other_tokenizers_are_refused_by_what_differs(place):
    respelt(place, merges=[])
    with pytest.raises(ValueError, match=r"cannot be one cache:\n  tokenizer \(id 257: 'he' in "):
        merge(place / "more", [place / "one", place / "two"])


def test_a_cache_that_spells_its_tokenizer_otherwise_fits_one_of_this_release(place):
    """As releases before 0.8 recorded it: by the spelling of its files."""
    respelt(place, ignore_merges=False)
    assert read_manifest(place / "one").tokenizer != read_manifest(place / "two").tokenizer
    merge(place / "more", [place / "one", place / "two"])
    assert tokenizer_of(open_cache(place / "more")).digest == read_manifest(place / "one").tokenizer


def test_caches_may_differ_in_rows_per_shard_file(place):
    manifest = read_manifest(place / "two")
    (part,) = manifest.parts
    maps = dataclasses.replace(part.signals["attention/1"], shard_rows=1 << 12)
    part = dataclasses.replace(part, signals={**part.signals, "attention/1": maps})
    two = dataclasses.replace(manifest, parts=(part,))
    write_manifest(place / "two", two, replaces=manifest.cache_id)
    assert merge(place / "more", [place / "one", place / "two"]).lost.keys() == {"hidden/1"}


def test_rows_without_a_teacher_cannot_be_merged(place):
    manifest = read_manifest(place / "two")
    bare = tuple(dataclasses.replace(part, signals={}) for part in manifest.parts)
    rows_only = dataclasses.replace(manifest, parts=bare)
    write_manifest(place / "two", rows_only, replaces=manifest.cache_id)
    with pytest.raises(ValueError, match="two: holds rows without a teacher's targets"):
        merge(place / "more", [place / "one", place / "two"])


def test_an_output_with_parts_of_its_own_is_refused(place):
    (place / "begun/parts").mkdir(parents=True)
    for output, why in (
        ("begun", "holds a capture that is not sealed"),
        ("one", "is one of the caches to merge"),
    ):
        with pytest.raises(ValueError, match=f"{output}: {why}; choose another output"):
            merge(place / output, [place / "one", place / "two"])


def test_a_merged_cache_can_be_verified_but_not_captured_into_repaired_or_collected(
    place, grown: Grown, capsys
):
    before = {name: hashes(place / name) for name in ("one", "two")}
    assert verify(place / "merged", rows=6, teacher=None, memory=digest_memory()).status == 0
    assert list(unnamed(place / "merged")) == []
    assert main(["gc", str(place / "merged")]) == 0
    assert {name: hashes(place / name) for name in ("one", "two")} == before
    with pytest.raises(ValueError, match="Capture into that cache, then merge again"):
        precompute(settings(grown.root, output=place / "merged"))
    file = place / "two/parts/0000/logits/unit-00000.array_record"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert main(["verify", str(place / "merged"), "--rows", "0", "--repair"]) == 1
    assert f"`verify --repair` that one, {place / 'two'}" in capsys.readouterr().out


def test_canaries_that_gc_deletes_leave_the_merged_cache_too(place):
    assert any(name.startswith("canary-") for name in statistics(place / "merged"))
    for source in open_cache(place / "two").manifest.parts[0].sources:
        forget(place / "two", source=source.name, documents=())
    assert main(["gc", str(place / "two")]) == 0
    assert not any(name.startswith("canary-") for name in statistics(place / "two"))
    merged = open_cache(place / "merged").manifest
    assert check_structure(place / "merged", merged).problems == []
    tables = [name for name in statistics(place / "merged") if name.startswith("logits-")]
    assert tables == [name for name in statistics(place / "two") if name.startswith("logits-")]


def statistics(cache: Path) -> list[str]:
    """Names of the statistics of the cache's last part."""
    return sorted(open_cache(cache).manifest.parts[-1].statistics)


def test_the_command_prints_what_it_merged(place, capsys):
    arguments = [str(place / name) for name in ("by-hand", "one", "two")]
    assert main(["merge", *arguments]) == 0
    assert f"{place / 'by-hand'}: " in capsys.readouterr().out
    by_hand, merged = (open_cache(place / name) for name in ("by-hand", "merged"))
    assert by_hand.manifest.parts == merged.manifest.parts
    assert main(["merge", str(place / "one"), str(place / "two")]) == 1
    assert "parts of its own; choose another output" in capsys.readouterr().err
