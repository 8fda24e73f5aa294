"""`forget` and `gc`: forgotten documents are never read again, then overwritten."""

import dataclasses
import json
import time

import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.pipelines.__main__ import main
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Hidden
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.forget import _neighbours, forget
from decant.pipelines.verification.structure import check_structure
from decant.pipelines.verification.verify import verify
from decant.schemas import Cache, open_cache
from decant.schemas.disk import steps
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.identity import digest_memory
from decant.schemas.disk.layout import PartLayout
from decant.schemas.disk.steps import Step
from decant.schemas.reading.units import read_unit_rows
from decant.trainer.config import Data
from decant.trainer.data.batches import Batches
from tests.making.grown import COPY, LINES, NAMES, Grown, hashes, settings

WHOLE = "document-000.txt"


def line_offset(grown: Grown, number: int) -> int:
    text = (grown.root / "corpus" / LINES).read_bytes()
    return len(b"".join(text.splitlines(keepends=True)[:number]))


def places(cache: Cache) -> list[list[tuple[slice, str, int]]]:
    """For each row: positions, source and document of its segments, as captured."""
    rows = []
    for part in cache.manifest.parts:
        for number, unit in part.numbered_units:
            for row in read_unit_rows(
                cache.path / part.path, number, unit, length=cache.manifest.sequence_length
            ):
                ends = np.cumsum(
                    np.unique(row.segment_ids[row.segment_ids > 0], return_counts=True)[1]
                )
                starts = [0, *ends[:-1]]
                origins = row.origins.tolist()
                rows.append(
                    [
                        (slice(start, end), part.sources[source].name, document)
                        for start, end, (source, document, _) in zip(
                            starts, ends, origins, strict=True
                        )
                    ]
                )
    return rows


@pytest.fixture
def cache(grown, tmp_path) -> Cache:
    return open_cache(grown.copied(tmp_path) / "cache")


def expected_of(cache: Cache, forgotten) -> tuple[np.ndarray, dict[str, np.ndarray], list[int]]:
    """Forgotten positions [rows, S], the arrays to read without them, and rows without others."""
    rows = places(cache)
    gone = np.zeros((len(rows), cache.manifest.sequence_length), bool)
    empty = []
    for number, segments in enumerate(rows):
        for at, source, document in segments:
            gone[number, at] |= forgotten(source, document)
        if segments and all(forgotten(source, document) for _, source, document in segments):
            empty.append(number)
    read = cache.read(range(len(cache)), NAMES)
    for name, array in read.items():
        fill = -np.inf if name in LOGARITHMS else 0
        if name == "attention/1":
            for number in range(len(rows)):
                array[number][:, gone[number]] = 0
        else:
            array[gone] = fill
    return gone, read, empty


LOGARITHMS = ("topk_logprobs", "tail_logmass", "tail_logprobs", "tail_logweights", "label_logprobs")


def assert_same(
    arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray], *, nats: float = 0
) -> None:
    """Assert that arrays are equal; log-probabilities that were encoded again, within `nats`."""
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        off = nats if name in LOGARITHMS else 0
        np.testing.assert_allclose(arrays[name], array, rtol=0, atol=off, err_msg=name)
        if off:
            same_places = arrays[name] == array
            assert same_places.mean() > 0.99, name


def test_forgotten_documents_read_as_padding_and_all_others_are_unchanged(grown, cache):
    document = line_offset(grown, 2)

    def forgotten(source: str, at: int) -> bool:
        return source == WHOLE or (source, at) == (LINES, document)

    gone, expected, empty = expected_of(cache, forgotten)
    assert gone.any(1).sum() > len(empty) > 0  # whole rows, and rows that keep other documents
    before = cache.read(cache.rows(), NAMES)
    forget(cache.path, source=WHOLE)
    _, forgot = forget(cache.path, source=LINES, documents=[document])
    assert forgot.documents == {document}
    after = open_cache(cache.path)
    assert_same(after.read(range(len(after)), NAMES), expected)
    undecoded = after.read(range(len(after)), NAMES, decode=False)
    assert not undecoded["hidden/1"][gone].any()
    assert sorted(set(cache.rows().tolist()) - set(after.rows().tolist())) == empty
    assert set(after.rows("train")) | set(after.rows("heldout")) == set(after.rows().tolist())
    assert_same(cache.read(cache.rows(), NAMES), before)  # a cache opened before reads the same
    result = verify(cache.path, rows=8, teacher=None, memory=digest_memory())
    assert result.status == 0, result


def test_a_release_that_cannot_forget_refuses_the_cache(grown, cache):
    path = cache.path / "manifest.json"
    assert read_json(path)["version"] == 1
    forget(cache.path, source=WHOLE)
    assert read_json(path)["version"] == 2


def test_forgetting_again_changes_nothing(cache):
    manifest, forgot = forget(cache.path, source=WHOLE)
    file = cache.path / "manifest.json"
    written = file.stat().st_ino
    again, nothing = forget(cache.path, source=WHOLE)
    assert again.cache_id == manifest.cache_id != cache.manifest.cache_id
    assert file.stat().st_ino == written
    assert (forgot.tokens > 0, nothing.tokens) == (True, 0)


def test_a_missing_source_or_document_is_named(grown, cache):
    with pytest.raises(ValueError, match=r"no source is called document-00\.txt; did you mean doc"):
        forget(cache.path, source="document-00.txt")
    with pytest.raises(ValueError, match=rf"holds no document at 1 of {LINES}; .*inspect --row"):
        forget(cache.path, source=LINES, documents=[line_offset(grown, 1), 1])
    assert open_cache(cache.path).manifest.cache_id == cache.manifest.cache_id
    sha256 = next(s.sha256 for s in cache.manifest.parts[0].sources if s.name == WHOLE)
    _, forgot = forget(cache.path, source=sha256[:16])
    assert forgot.tokens > 0


def test_a_misspelt_name_is_found_among_a_million_in_seconds():
    names = {f"part-{n:04d}/shard-{n * 7919 % 999_983:06d}.jsonl" for n in range(1_000_000)}
    began = time.perf_counter()
    for right, asked in (
        ("part-1234/shard-772199.jsonl", "part-1234/shard-772199.jsnol"),
        ("part-1234/shard-772199.jsonl", "prat-1234/shard-772199.jsonl"),
    ):
        assert right in names
        assert right in _neighbours(asked, names)
    assert time.perf_counter() - began < 20  # comparing with each took two minutes


def test_of_a_copied_document_the_captured_original_is_forgotten(cache):
    _, forgot = forget(cache.path, source=COPY)
    assert forgot.tokens > 0
    _, of_the_first = forget(cache.path, source="document-001.txt")
    assert of_the_first.tokens == 0


def test_a_training_run_refuses_to_go_on_after_a_document_was_forgotten(cache):
    config = Data(batch_rows=2)
    batches = Batches(cache, config=config)
    state = batches.state()
    batches.close()
    # Rows that keep other documents keep their numbers.
    forget(cache.path, source=LINES, documents=[0])
    now = Batches(open_cache(cache.path), config=config)
    with pytest.raises(ValueError, match="forgotten: saved None, now"):
        now.restore(state)
    now.close()


def test_the_command_forgets_and_inspect_shows_it(grown, cache, capsys):
    assert main(["forget", str(cache.path), "--source", LINES, "--document", "0"]) == 0
    assert f"forgot 1 documents of {LINES}, " in capsys.readouterr().out
    assert main(["inspect", str(cache.path)]) == 0
    assert "forgotten: 1 document" in capsys.readouterr().out
    row = next(n for n, segments in enumerate(places(cache)) if segments[0][1] == LINES)
    assert main(["inspect", str(cache.path), "--row", str(row)]) == 0
    assert f"{LINES}, document {line_offset(grown, 0)}" not in capsys.readouterr().out
    row = next(
        n for n, segments in enumerate(places(cache)) if any(s[1] == WHOLE for s in segments)
    )
    assert main(["inspect", str(cache.path), "--row", str(row)]) == 0
    assert f"{WHOLE}, document 0" in capsys.readouterr().out


class Killed(BaseException):
    pass


def dying(step: Step, visit: int):
    """A `steps.reached` that raises `Killed` at this visit of the step."""
    left = visit

    def reached(here: Step) -> None:
        nonlocal left
        left -= here == step
        if here == step and not left:
            raise Killed

    return reached


STEPS_OF_GC = [
    (Step.JOURNAL_WRITTEN, 1),
    (Step.JOURNAL_NAMED, 1),
    *((Step.FILE_MOVED, n) for n in (1, 4, 9)),
    (Step.MANIFEST_LOCKED, 1),
    (Step.MANIFEST_FLUSHED, 1),
    (Step.MANIFEST_NAMED, 1),
    (Step.OVERWRITTEN, 1),
]


def test_gc_overwrites_forgotten_documents_and_nothing_else(grown, cache):
    document = line_offset(grown, 2)
    forget(cache.path, source=WHOLE)
    forget(cache.path, source=LINES, documents=[document])
    forgetting = open_cache(cache.path)
    expected = forgetting.read(range(len(forgetting)), NAMES)
    before, raw = hashes(cache.path), _raw_tokens(cache)
    counted = cache.read(range(len(cache)), ())["loss_mask"]
    assert main(["gc", str(cache.path), "--dry-run"]) == 0
    assert hashes(cache.path) == before
    assert main(["gc", str(cache.path)]) == 0
    after = open_cache(cache.path)
    assert_same(after.read(range(len(after)), NAMES), expected)
    np.testing.assert_array_equal(after.rows(), forgetting.rows())
    tokenizer = open_checkpoint(grown.root / "teacher").tokenizer()
    text = (grown.root / "corpus" / WHOLE).read_text()
    ids = tokenizer.encode_batch([text])[0].astype("<u2").tobytes()[:32]
    assert ids in raw
    assert ids not in _raw_tokens(after)
    gone = counted & ~expected["loss_mask"]
    assert gone.any()
    for name, array in _stored(after, ("hidden/1", "attention/1")).items():
        assert not np.moveaxis(array, -2, 1)[gone].any(), name
    assert check_structure(cache.path, after.manifest).problems == []
    assert verify(cache.path, rows=8, teacher=None, memory=digest_memory()).status == 0
    once = hashes(cache.path)
    assert collect(cache.path).units == 0
    assert hashes(cache.path) == once


def _stored(cache: Cache, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays as they are on disk, read as if nothing were forgotten."""
    manifest = cache.manifest
    parts = [dataclasses.replace(p, forgotten=(), forgotten_rows=()) for p in manifest.parts]
    bare = Cache(cache.path, dataclasses.replace(manifest, parts=tuple(parts)))
    read = bare.read(range(len(bare)), names, decode=False)
    return {name: read[name] for name in names}


def _raw_tokens(cache: Cache) -> bytes:
    """All tokens as they are on disk."""
    rows = [
        row.tokens
        for part in cache.manifest.parts
        for number, unit in part.numbered_units
        for row in read_unit_rows(
            cache.path / part.path, number, unit, length=cache.manifest.sequence_length
        )
    ]
    return np.concatenate(rows).astype("<u2").tobytes()


@pytest.mark.parametrize("step", STEPS_OF_GC, ids=[f"{step}-{n}" for step, n in STEPS_OF_GC])
def test_gc_killed_at_any_step_is_finished_by_the_next(grown, cache, monkeypatch, step):
    forget(cache.path, source=WHOLE)
    forgetting = open_cache(cache.path)
    expected = forgetting.read(range(len(forgetting)), NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "reached", dying(*step))
        with pytest.raises(Killed):
            collect(cache.path)
    if (cache.path / "gc.json").exists():
        with pytest.raises(ValueError, match=r"`gc` is overwriting what was forgotten"):
            open_cache(cache.path)
        with pytest.raises(ValueError, match=r"`gc` is overwriting what was forgotten"):
            precompute(settings(cache.path.parent))
        with pytest.raises(ValueError, match=r"`gc` is overwriting what was forgotten"):
            collect(cache.path, dry_run=True)  # a dry run finishes nothing
    collect(cache.path)
    after = open_cache(cache.path)
    assert_same(after.read(range(len(after)), NAMES), expected)
    assert check_structure(cache.path, after.manifest).problems == []
    assert not (cache.path / "gc").exists()


def test_signals_can_be_added_after_documents_were_overwritten(grown, cache):
    forget(cache.path, source=WHOLE)
    plan = json.loads(PartLayout(cache.path / "parts/0000").plan.read_text())
    canaries = {unit for unit, _ in plan["canary"]}
    assert collect(cache.path).units > 0
    statistics = open_cache(cache.path).manifest.parts[0].statistics
    assert canaries
    assert not any(name.startswith("canary-") for name in statistics)
    main(["gc", str(cache.path)])
    more = Hidden(layers=(1, 2), dtype="int8", width=6)
    precompute(settings(cache.path.parent, hidden=more))
    after = open_cache(cache.path)
    after.read(after.rows(), (*NAMES, "hidden/2"))
    assert verify(cache.path, rows=8, teacher=None, memory=digest_memory()).status == 0
