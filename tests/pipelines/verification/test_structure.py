"""`verify` finds damage to every kind of file, and `--repair` captures damaged units again."""

import json
import shutil
from pathlib import Path

import pytest

from decant.pipelines.calibration import heads
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Hidden, Sketch
from decant.pipelines.upkeep.remove import remove_signals
from decant.pipelines.verification.repair import repair
from decant.pipelines.verification.structure import SURPLUS, Structure, check_structure
from decant.schemas import Cache, open_cache
from decant.schemas.disk.array_record import write_records
from decant.schemas.disk.atomic import write_json
from decant.schemas.disk.identity import digest_memory
from decant.schemas.disk.layout import COUNTS, SKETCH, PartLayout
from tests.making.arrays import flip, same_bits
from tests.making.caches import tiny_cache, tiny_settings, write_corpus
from tests.making.resealed import records_of

SIGNALS = {
    "hidden": Hidden(layers=(1,), dtype="int8", width=6),
    "attention": Attention(layers=(0,)),
    "profile": "compact",
    "draws": 2,
}
PART = "parts/0000"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("structure")
    write_corpus(root / "corpus", files=8, words=220)
    return root


@pytest.fixture(scope="module")
def sealed(root) -> Cache:
    """A sealed cache; its attention maps were added later."""
    first = {**SIGNALS, "attention": Attention()}
    precompute(tiny_settings(root, **first))
    return tiny_cache(root, **SIGNALS)


@pytest.fixture
def path(sealed, tmp_path) -> Path:
    return shutil.copytree(sealed.path, tmp_path / "cache")


def structure(path: Path) -> Structure:
    return check_structure(path, open_cache(path).manifest)


def problems(path: Path) -> list[tuple]:
    return [(p.unit, p.signal, p.file) for p in structure(path).problems]


def repaired(path: Path):
    cache = open_cache(path)
    return repair(cache, structure(path), teacher=None, memory=digest_memory())


def state(path: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of each file."""
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in path.rglob("*")
        if file.is_file() and file.suffix != ".lock"
    }


def damage_truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def damage_flipped(file: Path) -> None:
    flip(file, file.stat().st_size // 2)


DAMAGES = {"deleted": Path.unlink, "truncated": damage_truncated, "flipped": damage_flipped}
KINDS = {
    f"{PART}/rows/unit-00001.array_record": (1, "rows"),
    f"{PART}/logits/unit-00001.array_record": (1, "logits"),
    f"{PART}/commits/logits-unit-00001.json": (1, "logits"),
    f"{PART}/commits/attention-0-unit-00002.json": (2, "attention/0"),
    f"{PART}/hidden/1/zarr.json": (None, "hidden/1"),
    f"{PART}/statistics/logits-order.npy": (None, ""),
    f"{PART}/statistics/canary-ids.npy": (None, ""),
    f"{PART}/plan.json": (None, ""),
    f"{PART}/request.json": (None, ""),
    "tokenizer/tokenizer.json": (None, ""),
    "tokenizer/tokenizer_config.json": (None, ""),
    "tokenizer/config.json": (None, ""),
}


def test_a_sealed_cache_has_no_problem_and_names_each_of_its_files(path):
    report = structure(path)
    assert report.problems == []
    assert report.left_over == []
    assert report.files == len(state(path))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", KINDS)
def test_damage_to_any_file_is_listed_with_its_unit_and_signal(path, file, damage):
    DAMAGES[damage](path / file)
    # Problems that follow from the damaged file may be listed too.
    unit, signal = KINDS[file]
    assert (unit, signal, file) in [
        (u, s, "tokenizer/tokenizer.json" if f == "tokenizer" else f) for u, s, f in problems(path)
    ]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("array", ["hidden/1", "hidden/1-scale", "attention/0"])
def test_damage_to_a_shard_is_listed_with_its_unit_and_signal(path, array, damage):
    shards = sorted((path / PART / array).glob("c.*"))
    DAMAGES[damage](shards[-1])
    ((unit, signal, file),) = problems(path)
    assert signal == array.removesuffix("-scale")
    assert file == f"{PART}/{array}/{shards[-1].name}"
    assert unit is not None


def test_every_problem_is_listed_with_what_was_expected(path):
    layout = PartLayout(path / PART)
    layout.records("logits", 0).unlink()
    damage_truncated(layout.records("rows", 3))
    layout.commit("hidden/1", 2).unlink()
    problems = {(p.unit, p.signal): (p.expected, p.got) for p in structure(path).problems}
    size = layout.records("rows", 3).stat().st_size
    assert problems == {
        (0, "logits"): (f"{size + 1} bytes", "no file"),  # the least size of an ArrayRecord file
        (3, "rows"): (f"{size + 1} bytes", f"{size} bytes"),
        (2, "hidden/1"): ("the unit's commit", "no file"),
    }


def test_a_commit_of_another_unit_is_a_problem(path):
    commits = path / PART / "commits"
    shutil.copy(commits / "logits-unit-00002.json", commits / "logits-unit-00001.json")
    assert (1, "logits", f"{PART}/commits/logits-unit-00001.json") in problems(path)
    shutil.copy(commits / "hidden-1-unit-00002.json", commits / "hidden-1-unit-00003.json")
    assert (3, "hidden/1", f"{PART}/commits/hidden-1-unit-00003.json") in problems(path)


def test_a_manifest_that_was_edited_with_its_checksum_is_a_problem(path):
    file = path / "manifest.json"
    value = json.loads(file.read_bytes())
    del value["checksum"]
    value["parts"][0]["units"][0]["scored"] -= 1
    write_json(file, value)
    problems = structure(path).problems
    assert any(p.file == "manifest.json" and p.expected.startswith("cache_id") for p in problems)
    assert any(p.unit == 0 and p.signal == "rows" for p in problems)


@pytest.mark.parametrize(
    "file", ["notes.txt", f"{PART}/logits/unit-09999.array_record", f"{PART}/hidden/1/c.999.0.0"]
)
def test_a_file_that_nothing_names_is_a_problem(path, file):
    (path / file).write_bytes(b"x")
    assert [(p.file, p.got) for p in structure(path).problems] == [(file, SURPLUS)]


def test_files_of_a_removed_signal_are_no_problem(path):
    remove_signals(path, ["attention/0"])
    report = structure(path)
    assert report.problems == []
    assert f"{PART}/attention/0" in report.left_over


def test_repair_restores_the_sealed_bytes_and_touches_nothing_else(path):
    layout = PartLayout(path / PART)
    shards = sorted(layout.array("hidden/1").glob("c.*"))
    damaged = [
        layout.records("logits", 1),
        layout.commit("logits", 2),
        layout.commit("attention/0", 3),  # added later, in another capture
        shards[0],
        layout.array("hidden/1") / "zarr.json",
    ]
    whole = state(path)
    damage_truncated(damaged[0])
    damaged[1].unlink()
    damage_flipped(damaged[2])
    damage_flipped(shards[0])
    damaged[4].write_text("{}")
    done = repaired(path)
    assert all(one.done for one in done), done
    assert {one.where for one in done} == {
        f"{PART}/hidden/1/zarr.json",
        f"{PART}, unit 0, hidden/1",
        f"{PART}, unit 1, logits",
        f"{PART}, unit 2, logits",
        f"{PART}, unit 3, attention/0",
    }
    assert structure(path).problems == []
    after = state(path)
    assert after.keys() == whole.keys()
    names = {str(file.relative_to(path)) for file in damaged}
    for name, (written, content) in after.items():
        assert content == whole[name][1], name
        assert (written == whole[name][0]) == (name not in names), name


def test_a_unit_that_is_captured_to_other_bytes_replaces_nothing(path, monkeypatch):
    """As on another machine, or with other code."""
    original = heads.encode_logits

    def other(targets, **settings):
        return original(targets, **{**settings, "profile": "fast"})

    monkeypatch.setattr(heads, "encode_logits", other)
    layout = PartLayout(path / PART)
    damage_flipped(layout.records("logits", 1))
    before = state(path)
    (refused,) = repaired(path)
    assert not refused.done
    assert "other bytes" in refused.why
    assert state(path) == before


def test_repair_says_that_rows_and_statistics_cannot_be_repaired(path):
    layout = PartLayout(path / PART)
    damage_truncated(layout.records("rows", 1))
    damage_truncated(layout.records("logits", 1))
    (path / "notes.txt").write_text("x")
    before = state(path)
    done = repaired(path)
    assert not any(one.done for one in done)
    assert any("come from the sources" in one.why for one in done)
    assert state(path) == before

    (layout.statistics / "logits-order.npy").unlink()
    damage_truncated(layout.records("logits", 2))
    assert any("statistics are damaged too" in one.why for one in repaired(path))


def test_repair_captures_nothing_if_nothing_is_damaged(path, monkeypatch):
    monkeypatch.setattr(
        "decant.pipelines.verification.repair.capture_unit", lambda *_: pytest.fail("captured")
    )
    assert repaired(path) == []


BOTH = {"counts": 20, "sketch": Sketch(rank=6, dither=True)}


@pytest.fixture(scope="module", params=["captured", "added"])
def companions(root, request) -> Cache:
    """A cache with counts and a sketch, captured at once or added later."""
    settings = {"profile": "compact", "draws": 2, "output": root / request.param}
    if request.param == "added":
        precompute(tiny_settings(root, **settings))
    return tiny_cache(root, **settings, **BOTH)


def damage_exchanged(file: Path) -> None:
    """The file with its first two records exchanged: each is of another row."""
    number = int(file.stem.removeprefix("unit-"))
    first, second, *rest = records_of(file.parents[3], number, signal=file.parent.name)
    write_records(file, [second, first, *rest])


OF_COMPANIONS = {**DAMAGES, "exchanged": damage_exchanged}


def test_damaged_counts_and_sketches_are_named_found_and_repaired_to_the_sealed_bytes(
    companions, tmp_path
):
    path = shutil.copytree(companions.path, tmp_path / "cache")
    layout, whole = PartLayout(path / PART), state(path)
    kinds, damaged = list(OF_COMPANIONS.values()), {}
    for number in range(len(kinds)):
        for shift, signal in enumerate((COUNTS, SKETCH)):
            file = layout.records(signal, number)
            kinds[number - shift](file)
            damaged[f"{PART}, unit {number}, {signal}"] = str(file.relative_to(path))
    found = problems(path)
    assert {(f"{PART}, unit {unit}, {signal}", file) for unit, signal, file in found} == set(
        damaged.items()
    )
    done = repaired(path)
    assert all(one.done for one in done), done
    assert {one.where for one in done} == damaged.keys()
    assert structure(path).problems == []
    for name, (written, content) in state(path).items():
        assert content == whole[name][1], name
        assert (written == whole[name][0]) == (name not in damaged.values()), name


@pytest.mark.parametrize("signal", [COUNTS, SKETCH])
@pytest.mark.parametrize("damage", OF_COMPANIONS)
def test_a_reader_names_a_damaged_file_of_counts_or_sketches_and_can_do_without_it(
    companions, tmp_path, signal, damage
):
    path = shutil.copytree(companions.path, tmp_path / "cache")
    file = PartLayout(path / PART).records(signal, 1)
    if damage == "flipped":
        # A byte of the first record; the middle of so small a file is padding.
        flip(file, file.read_bytes().index(records_of(path, 1, signal=signal)[0]) + 40)
    else:
        OF_COMPANIONS[damage](file)
    cache, rows = open_cache(path), companions.rows()
    with pytest.raises(ValueError, match=file.name) as refused:
        cache.read(rows)
    assert str(file) in str(refused.value)
    (other,) = {COUNTS, SKETCH} - {signal}
    for targets in ((), (other,)):
        read, whole = cache.read(rows, targets=targets), companions.read(rows, targets=targets)
        assert all(same_bits(read[name], whole[name]) for name in whole)
