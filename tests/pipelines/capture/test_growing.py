"""New files make a new part of a sealed cache; old files do not change."""

import hashlib

import numpy as np
import pytest
from rich.console import Console

from decant.models import open_checkpoint
from decant.pipelines.capture.estimate import estimate
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Hidden
from decant.pipelines.inspection.contents import splits_table
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.remove import remove_signals
from decant.pipelines.verification.repair import repair
from decant.pipelines.verification.structure import check_structure
from decant.pipelines.verification.verify import verify
from decant.schemas import open_cache
from decant.schemas.disk.identity import digest_memory
from decant.schemas.disk.layout import part_layout
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.rows import next_tokens
from tests.making.grown import COPY, LINES, NAMES, hashes, settings

HELDOUT = 0.2  # of tiny_settings


def test_no_file_of_the_old_part_changes_and_its_rows_keep_their_numbers(grown):
    after = hashes(grown.cache.path)
    assert {p for p, sha in grown.before.items() if after[p] != sha} == {"manifest.json"}
    assert all(path.startswith("parts/0001/") for path in after.keys() - grown.before.keys())
    arrays = grown.cache.read(range(len(grown.reader)), NAMES)
    for name, array in grown.old.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_a_cache_that_was_open_before_still_reads_the_same(grown):
    assert len(grown.reader) < len(grown.cache)
    for name, array in grown.reader.read(grown.reader.rows(), NAMES).items():
        np.testing.assert_array_equal(array, grown.old[name], err_msg=name)


def test_every_token_of_new_files_is_scored_once_and_copies_of_old_documents_are_left_out(grown):
    first, second = grown.cache.manifest.parts
    assert {s.name for s in second.sources} == {COPY, *(n.partition(":")[0] for n in grown.more)}
    assert not {s.name for s in first.sources} & {s.name for s in second.sources}
    assert (first.duplicates, second.duplicates) == (0, 1)
    batch = grown.cache.read(range(len(grown.reader), len(grown.cache)))
    scored = next_tokens(batch["tokens"])[batch["loss_mask"]]
    tokenizer = open_checkpoint(grown.root / "teacher").tokenizer()
    texts = list(grown.more.values())
    expected = [[*ids, tokenizer.eos_id][1:] for ids in tokenizer.encode_batch(texts)]
    np.testing.assert_array_equal(np.sort(scored), np.sort(np.concatenate(expected)))


def test_a_document_is_held_out_by_its_content_in_whichever_part_it_comes(grown):
    heldout = {"train": set(), "heldout": set()}
    for number, part in enumerate(grown.cache.manifest.parts):
        for unit_number, unit in part.numbered_units:
            root = part_layout(grown.cache.path, number).root
            for row in read_unit_rows(
                root, unit_number, unit, length=grown.cache.manifest.sequence_length
            ):
                names = {part.sources[source].name for source in row.origins[:, 0]}
                heldout[unit.split] |= names
    for split, names in heldout.items():
        for name in names - {LINES}:
            content = hashlib.sha256((grown.root / "corpus" / name).read_bytes()).digest()
            held = int.from_bytes(content[:8], "big") < HELDOUT * 2**64
            assert split == ("heldout" if held else "train"), name
    new = {name.partition(":")[0] for name in grown.more}
    assert new <= heldout["train"] | heldout["heldout"]
    assert new & heldout["train"]


def test_each_part_has_its_own_tables_and_the_prior_sums_both_parts(grown):
    roots = [part_layout(grown.cache.path, n).statistics for n in (0, 1)]
    sums, counts = (
        [np.load(root / f"tail-prior-{what}.npy") for root in roots] for what in ("sums", "counts")
    )
    assert not np.array_equal(*sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.log(sums[0] + sums[1]) - np.log(counts[0] + counts[1])
    prior = grown.cache.tail_prior()[1:]
    there = np.isfinite(expected)
    assert there.any()
    np.testing.assert_allclose(prior[there], expected[there], rtol=1e-6)


def test_states_of_all_parts_are_projected_onto_the_same_directions(grown):
    directions = grown.cache.directions("hidden/1")
    assert directions is not None
    for number in (0, 1):
        own = np.load(part_layout(grown.cache.path, number).statistics / "hidden-1-directions.npy")
        np.testing.assert_array_equal(own, directions)


def test_the_teacher_agrees_with_every_part(grown):
    report = verify(grown.cache.path, rows=12, teacher=None, memory=digest_memory())
    assert report.status == 0, report
    assert list(report.content) == ["parts/0000", "parts/0001"]


def test_a_damaged_unit_of_the_new_part_is_found_and_captured_again(grown, tmp_path):
    path = grown.copied(tmp_path) / "cache"
    file = part_layout(path, 1).records("logits", 0)
    sealed = file.read_bytes()
    file.write_bytes(sealed[:-1] + b"x")
    cache = open_cache(path)
    structure = check_structure(path, cache.manifest)
    assert [(p.part, p.unit, p.signal) for p in structure.problems] == [("parts/0001", 0, "logits")]
    done = repair(cache, structure, teacher=None, memory=digest_memory())
    assert [one.done for one in done] == [True], done
    assert file.read_bytes() == sealed


def test_inspect_counts_all_parts(grown):
    table = splits_table(grown.cache)
    units = [unit for part in grown.cache.manifest.parts for unit in part.units]
    rows = sum(int(cell.replace(",", "")) for cell in table.columns[1].cells)
    assert rows == len(grown.cache) == sum(unit.rows for unit in units)


def test_a_rerun_does_nothing(grown, capsys):
    before = hashes(grown.cache.path)
    precompute(settings(grown.root))
    assert "nothing to do" in capsys.readouterr().err
    assert hashes(grown.cache.path) == before


def test_a_changed_or_missing_old_file_is_named_and_nothing_is_captured(grown, tmp_path):
    root = grown.copied(tmp_path)
    config = settings(root)
    (root / "corpus" / "entirely-new.txt").write_text("students read rows " * 30)
    changed = root / "corpus" / "document-002.txt"
    text = changed.read_text()
    changed.write_text(text + " more")
    with pytest.raises(ValueError, match=r"files: document-002\.txt has changed\nBring"):
        precompute(config)
    changed.unlink()
    with pytest.raises(ValueError, match=r"document-002\.txt is missing"):
        precompute(config)
    changed.write_text(text)
    (root / "corpus" / "d-more-1.txt").unlink()  # a file of the second part
    with pytest.raises(ValueError, match=r"d-more-1\.txt is missing"):
        precompute(config)
    assert not (root / "cache/parts/0002").exists()
    assert open_cache(root / "cache").manifest.cache_id == grown.cache.manifest.cache_id


def test_a_wholly_different_corpus_is_another_capture(grown, tmp_path):
    root = grown.copied(tmp_path)
    for path in (root / "corpus").iterdir():
        path.unlink()
    (root / "corpus" / "other.txt").write_text("students read rows " * 30)
    with pytest.raises(ValueError, match=r"holds another capture\n(.|\n)*is missing(.|\n)*Bring"):
        precompute(settings(root))
    assert not (root / "cache/parts/0002").exists()


def test_a_new_part_without_a_signal_that_the_cache_holds_is_refused(grown, tmp_path):
    root = grown.copied(tmp_path)
    (root / "corpus" / "entirely-new.txt").write_text("students read rows " * 30)
    config = settings(root, hidden=Hidden())
    with pytest.raises(ValueError, match=r"holds hidden/1, which the config does not ask for"):
        precompute(config)


def test_plan_measures_only_the_new_files(grown, tmp_path):
    root = grown.copied(tmp_path)
    new = root / "corpus" / "entirely-new.txt"
    new.write_text("students read rows " * 300)
    result = estimate(settings(root), console=Console(quiet=True))
    assert (result.sources, result.source_bytes) == (1, new.stat().st_size)


def test_a_signal_is_added_to_every_part_and_taken_out_of_every_part(grown, tmp_path):
    root = grown.copied(tmp_path)
    before = hashes(root / "cache")
    more = Hidden(layers=(1, 2), dtype="int8", width=6)
    precompute(settings(root, hidden=more))
    after = hashes(root / "cache")
    assert {p for p, sha in before.items() if after.get(p) != sha} == {"manifest.json"}
    assert {p.split("/")[1] for p in after.keys() - before.keys()} == {"0000", "0001"}
    cache = open_cache(root / "cache")
    cache.read(cache.rows(), (*NAMES, "hidden/2"))
    cache.directions("hidden/2")  # an error if the parts differ
    report = verify(cache.path, rows=12, teacher=None, memory=digest_memory())
    assert report.status == 0, report
    remove_signals(cache.path, ["hidden/2"])
    collect(cache.path)
    assert hashes(cache.path) == before
