"""Rollouts through the whole house: captured, read, forgotten, merged, verified, shown."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.pipelines.__main__ import main
from decant.pipelines.capture import part
from decant.pipelines.capture.job import precompute
from decant.pipelines.inspection.contents import writer_lines
from decant.pipelines.rows.rollouts import rollout, tokens_of
from decant.pipelines.rows.rules import RowRules
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.forget import forget
from decant.pipelines.upkeep.merge import merge
from decant.pipelines.verification.verify import verify
from decant.schemas import Cache, open_cache
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.identity import digest_memory
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.manifest import SPLITS, Split
from decant.trainer.data.mixture import MixtureReader
from decant.trainer.own_loop.batches import batches
from decant.trainer.results.prompts import Prompt
from decant.trainer.results.rollouts import record_of
from decant.trainer.results.sampling import Completion
from tests.killing import killer
from tests.making.caches import command_of, tiny_cache, write_corpus
from tests.making.rollouts import FILE, rollout_settings
from tests.making.tokenizers import byte_level, sentencepiece, unigram, word_piece
from tests.schemas import page_reader

W = "writer_logprobs"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rollouts")


@pytest.fixture(scope="module")
def cache(root) -> Cache:
    config = rollout_settings(root)
    precompute(config)
    return open_cache(config.output)


@pytest.fixture(scope="module")
def texts(root, tmp_path_factory) -> Cache:
    """A cache of texts by the same teacher."""
    place = tmp_path_factory.mktemp("texts")
    write_corpus(place / "corpus", files=4, words=60)
    shutil.copytree(root / "teacher", place / "teacher")
    return tiny_cache(place, batch_rows=8)


def written(root: Path) -> dict[int, dict]:
    """The records of the corpus, by the byte at which they begin."""
    records, at = {}, 0
    for line in (root / "corpus" / FILE).read_bytes().splitlines(keepends=True):
        records[at] = json.loads(line)
        at += len(line)
    return records


def test_each_token_has_the_log_probability_in_the_file(root, cache):
    tokenizer, records = open_checkpoint(str(root / "teacher")).tokenizer(), written(root)
    for number in cache.rows().tolist():
        row = {name: array[0] for name, array in cache.read([number]).items()}
        assert row[W].dtype == np.float32
        np.testing.assert_array_equal(np.isnan(row[W]), ~row["loss_mask"])
        for segment, (_, document, start) in enumerate(cache.origins(number), start=1):
            record = records[document]
            prompt, completion = tokenizer.encode_batch([record["prompt"], record["completion"]])
            ids = record.get("prompt_ids", prompt)
            whole = np.array([*ids, *record.get("completion_ids", [*completion, tokenizer.eos_id])])
            places = np.flatnonzero((row["segment_ids"] == segment) & row["loss_mask"])
            # The token after position t of a piece is number start + t + 1 of its document.
            follow = start + row["positions"][places] + 1
            np.testing.assert_array_equal(row["tokens"][places + 1], whole[follow])
            expected = np.array(record["logprobs"], np.float32)[follow - len(ids)]
            np.testing.assert_array_equal(row[W][places], expected)
    assert cache.manifest.writers == {"": 12, "writer-0": 12, "writer-1": 12}


def test_the_teacher_scores_each_written_token(root, cache):
    """Against one pass over the rows' first segments, which lie alone in a batch."""
    rows = cache.read(cache.rows())
    first = rows["segment_ids"] == 1
    tokens = np.where(first, rows["tokens"], 0)  # causal: what follows a segment changes nothing
    model = open_checkpoint(str(root / "teacher")).load()
    time = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    states, _ = model(jnp.asarray(tokens), jnp.ones_like(time), time)
    logits = np.asarray(states, np.float64) @ np.asarray(model.unembedding(), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.nonzero(first & rows["loss_mask"])
    expected = logprobs[(*at, rows["tokens"][at[0], at[1] + 1])]
    assert len(expected) > 500
    np.testing.assert_allclose(rows["label_logprobs"][at], expected, atol=2e-3)


def prompts(root: Path, cache: Cache, split: Split) -> list[str]:
    """Of the rollouts in a split."""
    places = {origin[:2] for row in cache.rows(split) for origin in cache.origins(int(row))}
    records = written(root)
    return [records[at]["prompt"] for _, at in places]


def test_all_answers_to_a_prompt_are_in_one_split_and_both_have_some(root, cache):
    train, heldout = (prompts(root, cache, split) for split in SPLITS)
    assert not set(train) & set(heldout)
    assert min(len(train), len(heldout)) > 1


def test_a_capture_that_0_13_began_is_finished_in_its_own_splits(root, tmp_path, monkeypatch):
    begun, config = tmp_path / "begun", rollout_settings(root, output=tmp_path / "older")
    with monkeypatch.context() as then:
        then.setattr(part, "RowRules", functools.partial(RowRules, rollouts=1))
        older = precompute(config)
    train, heldout = (prompts(root, open_cache(config.output), split) for split in SPLITS)
    assert set(train) & set(heldout)
    assert precompute(config) == older  # sealed: nothing is made anew
    shutil.copytree(config.output, begun)
    for path in (begun / "manifest.json", begun / "parts" / "0000" / "plan.json"):
        path.unlink()
    shutil.rmtree(begun / "parts" / "0000" / "rows")
    assert precompute(dataclasses.replace(config, output=begun)) == older


@pytest.mark.parametrize("kind", [byte_level, sentencepiece, unigram, word_piece])
def test_what_generate_writes_of_any_tokenizer_is_read_as_it_was_written(kind):
    """Completions that begin within a word, end within a character, or end with EOS."""
    tokenizer = kind()
    for text in ("the row keeps its key, the unit its rows ü", "a cache is written once  and read"):
        (ids,) = (one.tolist() for one in tokenizer.encode_batch([text]))
        for cut in range(1, len(ids) - 1):
            prompt = Prompt(0, "here", tokenizer.decode(ids[:cut]), ids[:cut])
            for written in (ids[cut:-1], [*ids[cut:], tokenizer.eos_id]):
                done = Completion(np.array(written, np.int32), np.full(len(written), -1, "f4"))
                record = record_of(prompt, done, tokenizer=tokenizer, writer="a")
                one = rollout(record["prompt"], record["completion"], record)
                (made,) = tokens_of([one], tokenizer)
                assert made.tokens.tolist() == ids[:cut] + written


@pytest.mark.slow
def test_killed_and_rerun_the_bytes_are_the_same(root, cache, tmp_path):
    config = rollout_settings(root, output=tmp_path / "cache")
    flags = command_of(config)
    with killer(tmp_path / "log") as dying:
        for step in (Step.ROWS_NAMED, Step.ROWS_GATHERED, Step.PLAN_NAMED, Step.COMMIT_NAMED):
            dying.kill(step, flags)
    assert main(flags) == 0
    assert open_cache(config.output).manifest.cache_id == cache.manifest.cache_id
    two = dataclasses.replace(config, output=tmp_path / "two", tokenise_workers=2)
    assert precompute(two).cache_id == cache.manifest.cache_id


def test_what_is_forgotten_has_no_log_probability_before_and_after_gc(root, cache, tmp_path):
    copy = Path(shutil.copytree(cache.path, tmp_path / "cache"))
    row = int(cache.rows("train")[0])
    (_, document, _), *_ = cache.origins(row)
    before = cache.read([row])
    gone = before["segment_ids"][0] == 1
    assert np.isfinite(before[W][0, gone]).any()
    forget(copy, source=FILE, documents=[document])
    for _ in range(2):
        after = open_cache(copy).read([row])
        assert np.isnan(after[W][0, gone]).all()
        np.testing.assert_array_equal(after[W][0, ~gone], before[W][0, ~gone])
        collect(copy)
    again = verify(copy, rows=4, teacher=str(root / "teacher"), memory=digest_memory())
    assert again.status == 0


def test_merged_with_a_cache_of_texts_its_rows_have_none(cache, texts, tmp_path):
    assert W not in texts.read(texts.rows()[:1])
    merge(tmp_path / "merged", [texts.path, cache.path])
    merged = open_cache(tmp_path / "merged")
    assert merged.manifest.writers == cache.manifest.writers
    read = merged.read(merged.rows())[W]
    assert np.isnan(read[: len(texts)]).all()
    np.testing.assert_array_equal(read[len(texts) :], cache.read(cache.rows())[W])


def test_a_mixture_and_a_loop_of_ones_own_have_them(cache, texts):
    reader = MixtureReader([texts, cache], signals=())
    read = reader.read(np.array([1, 0]), np.array([0, 0]))[W]
    np.testing.assert_array_equal(read[0], cache.read([0])[W][0])
    assert np.isnan(read[1]).all()
    with batches(cache, batch_rows=4, shuffle="global") as loop:
        batch = next(loop)
    assert np.isfinite(np.asarray(batch[W])[np.asarray(batch["loss_mask"])]).all()


def test_a_reader_written_from_the_format_page_reads_them(cache):
    ours, theirs = cache.read(cache.rows()), page_reader.read_cache(cache.path)
    np.testing.assert_array_equal(theirs[W], ours[W])
    np.testing.assert_array_equal(theirs["tokens"], ours["tokens"])


def test_only_a_cache_of_rollouts_has_a_format_that_older_releases_refuse(cache):
    assert read_json(cache.path / "manifest.json")["version"] == 4


def test_verify_finds_nothing_wrong_with_what_no_tokenizer_would_spell(root, cache):
    result = verify(cache.path, rows=6, teacher=str(root / "teacher"), memory=digest_memory())
    assert result.status == 0, result


def test_inspect_names_the_writers_and_shows_their_probability(cache, tmp_path, capsys):
    assert writer_lines(cache) == [
        "rollouts: 12 by a model without a name, 12 by writer-0, 12 by writer-1"
    ]
    row = int(cache.rows()[0])
    assert main(["inspect", str(cache.path), "--row", str(row)]) == 0
    shown = capsys.readouterr().out
    assert "writer: the probability that the model gave" in shown
    first = float(np.exp(np.nanmax(cache.read([row])[W])))
    assert f"{first:.3f}" in shown
    assert main(["inspect", str(cache.path), "--html", str(tmp_path / "pages")]) == 0
    assert "12 by writer-0" in (tmp_path / "pages" / "index.html").read_text()
    page = next((tmp_path / "pages" / "rows").glob("*.html")).read_text()
    assert "<th>writer" in page
