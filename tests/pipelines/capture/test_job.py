"""`precompute` from text to sealed cache, with a tiny real teacher."""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decant.models import Decoder, open_checkpoint, save_directory
from decant.pipelines.capture import unit as capture
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Hidden, Sketch
from decant.pipelines.runners.worker_error import WorkerError
from decant.pipelines.teacher.loaded import loaded_teacher
from decant.schemas import Cache, open_cache
from decant.schemas.manifest.plan import read_plan, write_plan
from decant.schemas.records.rows import next_tokens
from decant.schemas.signals import SketchSignal
from tests.making.caches import tiny_cache, tiny_settings, write_corpus, write_teacher


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("precompute")


@pytest.fixture(scope="module")
def cache(root) -> Cache:
    return tiny_cache(root, k=8)


def with_corpus(config, **changes):
    return dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, **changes))


def dense_logprobs(teacher: Path, batch: dict) -> np.ndarray:
    """The teacher's log-probabilities at every position, float64, from its float32 logits."""
    model = open_checkpoint(teacher).load()
    arrays = (jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions"))
    hidden, _ = model(*arrays)
    logits = np.asarray(hidden, np.float64) @ np.asarray(model.unembedding(), np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_stored_targets_are_those_of_the_teacher(root, cache):
    batch = cache.read(cache.rows())
    logprobs = dense_logprobs(root / "teacher", batch)
    mask = batch["loss_mask"]
    stored = np.take_along_axis(logprobs, batch["topk_ids"].astype(np.int64), -1)[mask]
    np.testing.assert_allclose(batch["topk_logprobs"][mask], stored, atol=2e-5)
    best = -np.sort(-logprobs, axis=-1)[mask]
    np.testing.assert_allclose(batch["topk_logprobs"][mask], best[:, :8], atol=2e-5)
    tail = np.stack([np.log(np.exp(b * best[:, 8:]).sum(-1)) for b in cache.manifest.betas], -1)
    np.testing.assert_allclose(batch["tail_logmass"][mask], tail, atol=2e-5)


def test_positions_without_a_target_hold_nothing(cache):
    batch = cache.read(cache.rows())
    mask = batch["loss_mask"]
    assert not mask.all()
    assert np.isfinite(batch["topk_logprobs"][mask]).all()
    assert np.isneginf(batch["topk_logprobs"][~mask]).all()
    assert np.isneginf(batch["tail_logmass"][~mask]).all()
    assert not batch["topk_ids"][~mask].any()


def test_every_token_of_every_document_is_scored_once(root, cache):
    batch = cache.read(cache.rows())
    scored = next_tokens(batch["tokens"])[batch["loss_mask"]]
    tokenizer = open_checkpoint(root / "teacher").tokenizer()
    texts = [path.read_text() for path in sorted((root / "corpus").glob("*.txt"))]
    expected = [[*ids, tokenizer.eos_id][1:] for ids in tokenizer.encode_batch(texts)]
    np.testing.assert_array_equal(np.sort(scored), np.sort(np.concatenate(expected)))


def test_no_document_is_both_trained_on_and_held_out(root, cache):
    train, heldout = cache.rows("train"), cache.rows("heldout")
    assert len(train) > 0
    assert len(heldout) > 0
    assert sorted([*train, *heldout]) == list(range(len(cache)))
    assert {unit.split for unit in cache.manifest.parts[0].units} == {"train", "heldout"}


def test_rows_are_read_in_the_order_asked_for(cache):
    some = [len(cache) - 1, 0, 3, 3]
    batch, every = cache.read(some), cache.read(cache.rows())
    for name, array in batch.items():
        np.testing.assert_array_equal(array, every[name][some])


def test_a_missing_row_or_signal_is_an_error(cache):
    with pytest.raises(IndexError, match=f"row {len(cache)} asked for"):
        cache.read([len(cache)])
    with pytest.raises(ValueError, match="no signal 'hidden/3'; this cache holds logits"):
        cache.read([0], signals=("hidden/3",))


def test_rerunning_a_sealed_capture_changes_nothing(root, cache, capsys):
    before = {path: path.stat().st_mtime_ns for path in cache.path.rglob("*") if path.is_file()}
    manifest = precompute(tiny_settings(root, k=8))
    assert manifest.cache_id == cache.manifest.cache_id
    assert "nothing to do" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in cache.path.rglob("*") if path.is_file()}
    del before[cache.path / ".seal.lock"], after[cache.path / ".seal.lock"]
    assert before == after


def test_only_missing_units_are_captured_again(root, cache, capsys, monkeypatch):
    copy = root / "partly"
    shutil.copytree(cache.path, copy)
    layout = capture.PartLayout(copy / "parts" / "0000")
    (copy / "manifest.json").unlink()
    layout.records("logits", 2).unlink()
    layout.commit("logits", 5).unlink()
    done: list[int] = []
    original = capture.write_records

    def counting(path, records, **kind):
        done.append(int(path.stem.removeprefix("unit-")))
        return original(path, records, **kind)

    monkeypatch.setattr(capture, "write_records", counting)
    # Sealing deleted the scratch files, so rows are tokenised again, to equal bytes.
    manifest = precompute(dataclasses.replace(tiny_settings(root, k=8), output=copy))
    assert sorted(done) == [2, 5]
    assert manifest.cache_id == cache.manifest.cache_id
    assert "units" in capsys.readouterr().err


def test_a_unit_captured_twice_leaves_the_same_cache(root, cache):
    config = tiny_settings(root, k=8, output=root / "twice")
    twice = dataclasses.replace(config, runner_options=("--direct_runner_bundle_repeat=2",))
    assert precompute(twice).cache_id == cache.manifest.cache_id


def test_after_an_error_the_next_unit_gets_the_devices_though_the_error_is_held(root, monkeypatch):
    """A worker of a cluster may keep the error of a unit, with its frames, while it tries again."""
    config = tiny_settings(root, k=8, output=root / "failing")

    def fails(worker, number, rows, outputs, *, writers):
        next(outputs)
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(capture, "_encode", fails)
        with pytest.raises(Exception, match="no space") as held:
            precompute(config)
    plan = read_plan(next(config.output.glob("parts/*/plan.json")))
    assert held.tb
    assert not loaded_teacher(plan.teacher)._running.locked()
    assert precompute(config).cache_id


def test_no_id_depends_on_paths_or_batch(root, cache):
    moved = root / "another place, with ümlauts"
    shutil.copytree(root / "corpus", moved / "corpus")
    shutil.copytree(root / "teacher", moved / "teacher")
    assert precompute(tiny_settings(moved, k=8)).cache_id == cache.manifest.cache_id
    other_batch = tiny_settings(root, k=8, output=root / "batch")
    other_batch = dataclasses.replace(
        other_batch, teacher=dataclasses.replace(other_batch.teacher, batch_rows=3)
    )
    signals = precompute(other_batch).signals
    assert signals["logits"].teacher_id == cache.manifest.signals["logits"].teacher_id


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: with_corpus(c, sequence_length=32), r"corpus: there 12 files.*rows of 64"),
        (lambda c: with_corpus(c, heldout=0.5), "rows_id"),
        (
            lambda c: dataclasses.replace(c, signals=tiny_settings(c.output.parent, k=4).signals),
            r"signals.logits.k: there 8, asked for 4\nTo go on",
        ),
    ],
)
def test_a_directory_that_holds_another_capture_is_refused_naming_both(root, cache, change, named):
    with pytest.raises(ValueError, match=named):
        precompute(change(tiny_settings(root, k=8)))


def test_another_teacher_in_the_same_directory_is_refused(root, cache):
    write_teacher(root / "other", seed=1)
    config = tiny_settings(root, k=8)
    other = dataclasses.replace(
        config, teacher=dataclasses.replace(config.teacher, model=str(root / "other"))
    )
    with pytest.raises(ValueError, match=r"teacher: there teacher, .* asked for other,"):
        precompute(other)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: with_corpus(c, sequence_length=257), "trained for 2 to 256 positions"),
        (lambda c: with_corpus(c, heldout=1.0), "heldout is 1.0"),
        (
            lambda c: dataclasses.replace(c, signals=tiny_settings(c.output.parent, k=513).signals),
            "k is 513, but teacher has 512 tokens",
        ),
    ],
)
def test_settings_that_the_teacher_does_not_allow_are_refused_before_anything_runs(
    root, change, problem
):
    config = dataclasses.replace(tiny_settings(root, k=8), output=root / "never")
    with pytest.raises(ValueError, match=problem):
        precompute(change(config))
    assert not (root / "never").exists()


def test_a_failing_worker_gives_its_reason_without_a_traceback(tmp_path):
    config = tiny_settings(tmp_path)
    (tmp_path / "corpus" / "broken.txt").write_bytes(b"ab\xff")
    with pytest.raises(WorkerError) as raised:
        precompute(config)
    assert str(raised.value) == (
        f"{tmp_path / 'corpus' / 'broken.txt'}: not UTF-8 at byte 2. Repair it, or set "
        'corpus.on_error = "skip".'
    )


def test_skipped_and_duplicate_documents_are_counted_and_listed(tmp_path, root, cache):
    config = tiny_settings(tmp_path)
    plain = precompute(dataclasses.replace(config, output=tmp_path / "plain"))
    (tmp_path / "corpus" / "broken.txt").write_bytes(b"ab\xff")
    first = (tmp_path / "corpus" / "document-000.txt").read_text()
    (tmp_path / "corpus" / "zzz.txt").write_text(first)
    part = precompute(with_corpus(config, on_error="skip")).parts[0]
    assert [(s.source, s.reason) for s in part.skipped] == [("broken.txt", "not UTF-8 at byte 2")]
    assert part.duplicates == 1
    tokens = [sum(unit.tokens for unit in p.units) for p in (part, plain.parts[0])]
    assert tokens[0] == tokens[1]


def poison(teacher: Path, token: int) -> None:
    """Make the teacher give NaN wherever the input has `token`."""
    checkpoint = open_checkpoint(teacher)
    model = checkpoint.load()
    model.embedding.set_value(model.embedding[...].at[token].set(jnp.nan))
    save_directory(nnx.clone(model), teacher, checkpoint.tokenizer().files())


def test_rows_with_nan_are_named_and_stop_the_capture_unless_it_may_skip_them(tmp_path):
    config = tiny_settings(tmp_path, k=4, hidden=Hidden(layers=(1,)))
    # Only one document has the word, so only its rows get NaN.
    (tmp_path / "corpus" / "odd.txt").write_text("Zebra " * 10)
    tokenizer = open_checkpoint(tmp_path / "teacher").tokenizer()
    (odd,) = tokenizer.encode_batch(["Z"])
    # A tied head would give NaN everywhere, so the poisoned teacher has a head of its own.
    untie(tmp_path / "teacher")
    poison(tmp_path / "teacher", int(odd[0]))
    with pytest.raises(WorkerError, match=r"gave NaN in rows \[\d+.*nothing of this unit"):
        precompute(config)
    skipping = with_corpus(dataclasses.replace(config, output=tmp_path / "skip"), on_error="skip")
    manifest = precompute(skipping)
    cache = open_cache(tmp_path / "skip")
    assert sum(len(unit.skipped_rows) for unit in manifest.parts[0].units) >= 1
    batch = cache.read(cache.rows())
    assert np.isfinite(batch["topk_logprobs"][batch["loss_mask"]]).all()
    has_odd = (batch["tokens"] == odd[0]).any(-1)
    assert has_odd.any()
    assert not batch["loss_mask"][has_odd].any()
    # In every signal: the row has no target, and zeros for values that were NaN.
    hidden = cache.read(cache.rows(), signals=("hidden/1",))
    np.testing.assert_array_equal(hidden["loss_mask"], batch["loss_mask"])
    assert (hidden["hidden/1"][has_odd] == 0).all()
    assert (hidden["hidden/1"][~has_odd] != 0).any()


def test_a_row_with_nan_keeps_no_other_row_out_of_a_sketch(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=2, words=60)
    (corpus / "odd.txt").write_text("Zebra " * 10)
    # One batch holds the whole sample.
    config = tiny_settings(tmp_path, batch_rows=64, heldout=0.0, sketch=Sketch(6))
    tokenizer = open_checkpoint(tmp_path / "teacher").tokenizer()
    (odd,) = tokenizer.encode_batch(["Z"])
    untie(tmp_path / "teacher")
    poison(tmp_path / "teacher", int(odd[0]))
    part = precompute(with_corpus(config, on_error="skip")).parts[0]
    assert sum(len(unit.skipped_rows) for unit in part.units) == 1
    sketch = part.signals["sketch"]
    assert isinstance(sketch, SketchSignal)
    assert (sketch.rank, sketch.asked_rank) == (6, None)
    read = open_cache(config.output).read(range(part.units[0].rows))
    assert np.isfinite(read["sketch"][read["loss_mask"]]).all()


def untie(teacher: Path) -> None:
    """Give the teacher a head that is not its embedding."""
    checkpoint = open_checkpoint(teacher)
    tied = checkpoint.load()
    config = dataclasses.replace(checkpoint.config, tie_embeddings=False)
    model = Decoder(config, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.state(tied))
    model.head.set_value(tied.unembedding())
    save_directory(model, teacher, checkpoint.tokenizer().files())


def test_a_worker_with_other_weights_is_refused_before_it_writes(root, cache):
    copy = root / "canary"
    shutil.copytree(cache.path, copy)
    (copy / "manifest.json").unlink()
    layout = capture.PartLayout(copy / "parts" / "0000")
    layout.commit("logits", 0).unlink()
    plan = capture.read_plan(layout.plan)
    other = write_teacher(root / "imposter", seed=9)
    planned = dataclasses.replace(plan.teacher, model=str(other))
    write_plan(layout.plan, dataclasses.replace(plan, teacher=planned))
    with pytest.raises(RuntimeError, match="differ from the plan's by a KL of"):
        capture.capture_unit(0, layout.root, layout.plan)
    assert not layout.commit("logits", 0).exists()


def test_swapped_files_are_found_when_read(root, cache):
    copy = root / "swapped"
    shutil.copytree(cache.path, copy)
    layout = capture.PartLayout(copy / "parts" / "0000")
    units = cache.manifest.parts[0].units
    pairs = [
        (a, b)
        for a in range(len(units))
        for b in range(a)
        if units[a].files["logits"].bytes == units[b].files["logits"].bytes
        and units[a].rows == units[b].rows
    ]
    a, b = (layout.records("logits", n) for n in pairs[0])
    swap = a.read_bytes(), b.read_bytes()
    a.write_bytes(swap[1])
    b.write_bytes(swap[0])
    swapped = open_cache(copy)
    with pytest.raises(ValueError, match=r"logits/unit-\d+.*expected fingerprint .* exchanged"):
        swapped.read(swapped.rows())
