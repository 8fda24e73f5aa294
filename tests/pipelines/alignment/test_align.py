"""`align` of a tiny capture, from the command to a trained student."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import decant
from decant.__main__ import main
from decant.models.families import config_from_json
from decant.models.text.tokenizer import Tokenizer, tokenizer_of
from decant.pipelines.alignment import job
from decant.pipelines.alignment.job import align
from decant.pipelines.alignment.rows import AlignedRow, Aligner
from decant.pipelines.alignment.targets import TargetMaker
from decant.pipelines.config import Align, Sketch
from decant.pipelines.runners.worker_error import WorkerError
from decant.pipelines.upkeep.copy import copy
from decant.pipelines.upkeep.forget import forget
from decant.pipelines.upkeep.merge import merge
from decant.pipelines.verification.verify import verify
from decant.schemas import open_cache
from decant.trainer.run.saved_initial import open_initial
from tests.making.caches import tiny_cache, tokenizer_files, write_corpus
from tests.paths import GOLDEN

LENGTH = 192
"""No segment of 64 of the teacher's tokens is cut."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A capture of a teacher with 512 tokens, in which all signals are exact."""
    root = tmp_path_factory.mktemp("align")
    write_corpus(root / "corpus", files=5, words=120)
    sketch = Sketch(rank="full", step=0.0)
    tiny_cache(root, counts=20, sketch=sketch, k=6)
    write_tokenizer(root / "student", 300)
    return root


def write_tokenizer(directory, vocabulary):
    directory.mkdir()
    for name, data in tokenizer_files(vocabulary).items():
        (directory / name).write_bytes(data)
    return directory


def settings(root, output="aligned", **changes):
    given = {"cache": root / "cache", "tokenizer": str(root / "student"), "quiet": True}
    given |= {"sequence_length": LENGTH, **changes}
    return Align(**given, output=root / output if isinstance(output, str) else output)


@pytest.fixture(scope="module")
def aligned(root):
    align(settings(root))
    return open_cache(root / "aligned")


def test_rows_are_the_texts_in_the_other_tokens(root, aligned):
    source = open_cache(root / "cache")
    manifest = aligned.manifest
    assert manifest.vocabulary_size == 300
    assert [unit.split for _, unit, _ in aligned.units()] == [u.split for _, u, _ in source.units()]
    text = [texts_of(cache) for cache in (aligned, source)]
    assert text[0] == text[1]
    batch = aligned.read(aligned.rows())
    assert batch["tokens"].max() < 300
    some = np.isfinite(batch["topk_logprobs"]).any(-1)
    assert 0.4 < some.sum() / batch["loss_mask"].sum() <= 1
    assert not (some & ~batch["loss_mask"]).any()
    assert np.isfinite(batch["label_logprobs"][some]).all()
    whole = np.exp(batch["topk_logprobs"]).sum(-1) + np.exp(batch["tail_logmass"][..., -1])
    np.testing.assert_allclose(whole[some], 1, atol=1e-4)
    assert (batch["counts"].sum(-1)[some] == 20).all()
    assert manifest.parts[0].aligned.rows_id == source.manifest.rows_id


def texts_of(cache):
    """The text of each segment with its place, sorted: packing may put them into other rows."""
    tokenizer, texts = tokenizer_of(cache), []
    for row in cache.rows().tolist():
        batch = cache.read([row], signals=())
        for segment, place in enumerate(cache.origins(row), start=1):
            ids = batch["tokens"][0, batch["segment_ids"][0] == segment]
            texts.append((place, tokenizer.decode(ids)))
    return sorted(texts)


def test_the_same_tokenizer_gives_the_plain_loss(root, monkeypatch):
    monkeypatch.setattr(job, "require_other", lambda aligner: None)
    align(settings(root, "same", tokenizer=str(root / "teacher")))
    table = np.random.default_rng(0).normal(size=(512, 512))
    losses = [loss_by_token(open_cache(root / name), table) for name in ("cache", "same")]
    for plain, again in zip(*losses, strict=True):
        np.testing.assert_allclose(again, plain, rtol=1e-6)


def loss_by_token(cache, table, temperature=2.0):
    """Σ KL at T = 1 and T with the tail as one, of a student whose logits are a row of `table`."""
    batch = cache.read(cache.rows())
    mask = batch["loss_mask"]
    for t in (1.0, temperature):
        node = cache.manifest.betas.index(1 / t)
        logp = np.concatenate([batch["topk_logprobs"], batch["tail_logmass"][..., [node]] * t], -1)
        logp = logp[mask].astype(np.float64) / t
        logp -= np.logaddexp.reduce(logp, axis=1, keepdims=True)
        q = table[batch["tokens"][mask]] / t
        q -= np.logaddexp.reduce(q, axis=1, keepdims=True)
        head = np.take_along_axis(q, batch["topk_ids"][mask], 1)
        tail = np.log1p(-np.exp(head).sum(1, keepdims=True))
        logq = np.concatenate([head, tail], 1)
        p = np.exp(logp)
        yield (p * (logp - logq)).sum()
    drawn = np.take_along_axis(table[batch["tokens"][mask]], batch["count_ids"][mask], 1)
    yield (drawn * batch["counts"][mask]).sum()
    yield batch["label_logprobs"][mask].sum()


def test_verify_makes_the_targets_again(root, aligned, tmp_path):
    checked = verify(aligned.path, rows=6, teacher=None, memory=tmp_path / "digests")
    assert checked.status == 0, checked
    content = checked.content["parts/0000"]
    assert content.positions > 100
    elsewhere = tmp_path / "cache"
    shutil.copytree(root / "cache", elsewhere)
    checked = verify(aligned.path, rows=2, teacher=str(elsewhere), memory=tmp_path / "digests")
    assert checked.status == 0
    checked = verify(aligned.path, rows=2, teacher=str(tmp_path), memory=tmp_path / "digests")
    assert checked.status == 2
    assert "say --teacher" in checked.unable


def test_a_second_run_does_nothing_and_another_one_is_refused(root, aligned, capsys):
    before = aligned.manifest.cache_id
    assert align(settings(root)).cache_id == before
    with pytest.raises(ValueError, match="holds another capture"):
        align(settings(root, sequence_length=32))
    with pytest.raises(ValueError, match="targets: there projected, asked for matched"):
        align(settings(root, targets="matched"))


def test_rows_of_which_no_label_is_known_have_no_target(root, aligned):
    """The label ends inside a teacher's token, whose first student token is another one."""
    cache, tokenizer = open_cache(root / "cache"), tokenizer_of(aligned)
    aligner = Aligner(cache, tokenizer, length=LENGTH, special_tokens={})
    maker = TargetMaker(aligner, logits=aligned.manifest.logits, draws=20)
    one = aligner.rows(0)[0]
    at = np.flatnonzero(one.source >= 0)[0]
    row, place = divmod(int(one.source[at]), cache.manifest.sequence_length)
    following = cache.read([row], signals=())["tokens"][0, place + 1]
    tokens, source = one.row.tokens.copy(), np.full_like(one.source, -1)
    tokens[at + 1], source[at] = (aligner.first[following] + 1) % 300, one.source[at]
    changed = dataclasses.replace(one.row, tokens=tokens)
    (made,) = maker.of_rows([AlignedRow(changed, source, np.zeros_like(one.spans))])
    assert not made.taught.any()
    assert len(made.targets) == len(made.counts) == 0


def test_matched_targets_are_the_teachers_own(root, aligned):
    align(settings(root, "matched", targets="matched"))
    cache, source = open_cache(root / "matched"), open_cache(root / "cache")
    logits, matched = cache.manifest.logits, cache.matched_ids()
    assert logits.unmatched >= 6
    assert set(cache.manifest.signals) == {"logits"}
    batch, own = cache.read(cache.rows()), source.read(source.rows(), targets=())
    # Each head is one of the teacher's: its probabilities are unmerged.
    heads = {np.sort(row).tobytes() for row in own["topk_logprobs"][own["loss_mask"]]}
    both = np.concatenate([batch["topk_logprobs"], batch["unmatched_logprobs"]], -1)
    some = np.isfinite(both).any(-1)
    stored = np.sort(both[some])[:, -6:]
    assert all(row.tobytes() in heads for row in stored)
    known = np.isfinite(batch["topk_logprobs"][some])
    assert matched[batch["topk_ids"][some][known]].all()
    assert known.any()
    assert not known.all()
    checked = verify(cache.path, rows=4, teacher=None, memory=root / "digests")
    assert checked.status == 0, checked
    with pytest.raises(ValueError, match="no matched targets"):
        aligned.matched_ids()


def test_what_cannot_be_aligned_is_refused_and_nothing_is_written(root, aligned, tmp_path, capsys):
    def refused(match, **changes):
        out = tmp_path / "out"
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            align(settings(root, **{"output": out, **changes}))
        assert not out.exists()

    refused("no align is needed", tokenizer=str(root / "teacher"))
    refused("one lies in the other", output=root / "cache" / "inside")
    refused("align the cache that it was made from", cache=aligned.path)
    refused("no such cache directory", cache=tmp_path / "none")
    refused("has no token '<nothing>'", special_tokens=("<nothing>=<end>",))
    refused("is not token=token", special_tokens=("x",))
    shutil.copytree(root / "cache", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    refused("tokenizer", cache=tmp_path / "bare")
    flags = ["--tokenizer", str(root / "teacher"), "--output", str(tmp_path / "out")]
    assert main(["align", str(root / "cache"), *flags]) == 1
    assert "no align is needed" in capsys.readouterr().err


def test_text_that_cannot_be_spelt_is_refused_with_its_document(root, tmp_path):
    few = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "the": 1}, "<unk>"))
    few.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    few.decoder = tokenizers.decoders.Metaspace()
    few.add_special_tokens(["<end>"])
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "tokenizer.json").write_text(few.to_str())
    (tmp_path / "few" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises((ValueError, WorkerError), match=r"document-\d+.txt|unknown|<unk>"):
        align(settings(root, tokenizer=str(tmp_path / "few"), output=tmp_path / "out"))


@pytest.mark.slow
def test_what_was_forgotten_stays_out(root, tmp_path):
    shutil.copytree(root / "cache", tmp_path / "cache")
    name = open_cache(tmp_path / "cache").origins(0)[0][0]
    forget(tmp_path / "cache", source=name, documents=())
    align(settings(tmp_path, tokenizer=str(root / "student")))
    cache = open_cache(tmp_path / "aligned")
    names = {origin[0] for row in cache.rows().tolist() for origin in cache.origins(row)}
    assert names
    assert name not in names
    gone = sorted(names)[0]
    forget(tmp_path / "aligned", source=gone, documents=())
    cache = open_cache(tmp_path / "aligned")
    assert gone not in {o[0] for row in cache.rows().tolist() for o in cache.origins(row)}
    assert main(["gc", str(tmp_path / "aligned"), "--quiet"]) == 0
    checked = verify(tmp_path / "aligned", rows=4, teacher=None, memory=tmp_path / "digests")
    assert checked.status == 0, checked


def test_without_a_sketch_the_tail_is_known_at_1_and_other_temperatures_are_refused(tmp_path):
    write_corpus(tmp_path / "corpus", files=2, words=60)
    tiny_cache(tmp_path, counts=16)
    write_tokenizer(tmp_path / "student", 300)
    align(settings(tmp_path))
    cache = open_cache(tmp_path / "aligned")
    assert cache.manifest.logits.tail_at_1
    batch = cache.read(cache.rows())
    some = np.isfinite(batch["topk_logprobs"]).any(-1)
    whole = np.exp(batch["topk_logprobs"]).sum(-1) + np.exp(batch["tail_logmass"][..., -1])
    np.testing.assert_allclose(whole[some], 1, atol=1e-5)
    flags = ["train", "--cache", str(cache.path), "--student.init", "scratch", "--quiet"]
    flags += ["--run", str(tmp_path / "run"), "--data.steps", "1"]
    assert main([*flags, "--loss.temperature", "2"]) == 1
    with pytest.raises(ValueError, match="at T = 1 only, but temperature is 2"):
        decant.evaluate(cache, lambda *_: None, temperature=2.0)
    with decant.batches(cache, batch_rows=1) as batches:
        assert next(batches).tail_at_1
    with pytest.raises(ValueError, match="a sketch"):
        align(settings(tmp_path, "other", draws=4))


def test_it_is_copied_and_merged_as_any_cache(root, aligned, bucket, tmp_path):
    expected = aligned.read(aligned.rows())
    copy(aligned.path, tmp_path / "copy")
    copy(str(aligned.path), f"{bucket}/copy")
    made = merge(tmp_path / "merged", [aligned.path, tmp_path / "copy"])
    assert len(made.left_out) == 1
    for place in (tmp_path / "copy", f"{bucket}/copy", tmp_path / "merged"):
        cache = open_cache(place)
        assert cache.manifest.parts[0].aligned == aligned.manifest.parts[0].aligned
        for name, array in cache.read(cache.rows()).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=f"{place} {name}")
    for place in (tmp_path / "copy", tmp_path / "merged"):
        checked = verify(place, rows=1, teacher=None, memory=tmp_path / "digests")
        assert checked.status == 0, checked


@pytest.mark.parametrize("init", ["scratch", "cut"])
def test_students_are_trained_from_it(root, aligned, tmp_path, init, capsys):
    run = tmp_path / "run"
    flags = ["train", "--cache", str(aligned.path), "--run", str(run), "--student.init", init]
    flags += ["--student.source", str(root / "teacher"), "--student.layers", "1", "--quiet"]
    status = main([*flags, "--data.steps", "3"])
    assert status == 0, capsys.readouterr().err
    initial = open_initial(run)
    assert initial.config.vocab_size == 300
    assert initial.config.num_layers == 1
    assert initial.tokenizer().difference(tokenizer(root)) is None


def test_a_teacher_with_inputs_of_blocks_gets_the_vocabulary_for_them_too():
    config = (GOLDEN / "families" / "gemma4" / "config.json").read_bytes()
    changed = config_from_json(json.loads(job._with_vocabulary(config, size=300)))
    assert changed == config_from_json(json.loads(config)).with_vocabulary(300)


def tokenizer(root):
    return Tokenizer.from_files(root / "student")


@pytest.mark.slow
def test_from_a_bucket_and_into_one_gives_the_same_cache(root, aligned, bucket):
    copy(str(root / "cache"), f"{bucket}/cache")
    there = settings(root, cache=Path(f"{bucket}/cache"), output=Path(f"{bucket}/aligned"))
    assert align(there).cache_id == aligned.manifest.cache_id
    cache = open_cache(f"{bucket}/aligned")
    ours, theirs = (one.read(one.rows()[:2]) for one in (aligned, cache))
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[name], array, err_msg=name)
