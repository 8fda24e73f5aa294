"""An exported student: the same bytes for the same seed, a model card, usable as a teacher."""

import dataclasses
import hashlib
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from decant.models import open_checkpoint
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Teacher
from decant.schemas import open_cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.config import Data, Evaluate, Export
from decant.trainer.results.evaluate import evaluate
from decant.trainer.results.export import export
from decant.trainer.run.data_facts import read_data_facts
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import load_student, student_digest
from tests.formulas.dense import log_softmax
from tests.making.caches import tiny_settings


@pytest.fixture(scope="module")
def exported(noisy_run, drawn_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "student"
    return export(Export(run=noisy_run.run, cache=drawn_cache.path, output=out))


def digests(directory):
    files = sorted(directory.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes(exported, noisy_run, drawn_cache, tmp_path):
    """Trained again in another directory: weights, card and all other files."""
    again = dataclasses.replace(noisy_run, run=tmp_path / "again")
    train(again)
    out = export(Export(run=again.run, cache=drawn_cache.path, output=tmp_path / "student"))
    assert digests(out) == digests(exported)
    other = dataclasses.replace(
        noisy_run, run=tmp_path / "other", data=Data(batch_rows=2, steps=2, seed=1)
    )
    train(other)
    out = export(Export(run=other.run, cache=drawn_cache.path, output=tmp_path / "third"))
    names = ("model.safetensors", "README.md")
    assert all(digests(out)[name] != digests(exported)[name] for name in names)
    assert digests(out)["config.json"] == digests(exported)["config.json"]


def test_the_exported_student_is_the_next_teacher(exported, noisy_run, root, tmp_path):
    settings = tiny_settings(root, output=tmp_path / "next")
    precompute(dataclasses.replace(settings, teacher=Teacher(model=str(exported), batch_rows=2)))
    cache = open_cache(tmp_path / "next")
    batch = cache.read(cache.rows()[:2])
    graph, params = load_student(noisy_run.run, dtype="float32")
    model = nnx.merge(graph, params)
    hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    ours = log_softmax(np.asarray(hidden, np.float64) @ np.asarray(model.unembedding()))
    mask = batch["loss_mask"]
    stored = np.take_along_axis(ours, batch["topk_ids"], axis=-1)[mask]
    np.testing.assert_allclose(batch["topk_logprobs"][mask], stored, atol=2e-5)


def test_an_exported_student_has_the_digest_that_it_had_in_its_run(exported, noisy_run):
    graph, params = load_student(noisy_run.run, dtype="float32")
    ours = student_digest(nnx.merge(graph, params))
    assert ours == student_digest(open_checkpoint(exported).load())
    params["final_norm"] = params["final_norm"] * 1.001
    assert ours != student_digest(nnx.merge(graph, params))


def test_the_card_names_the_data_and_the_held_out_metrics(
    exported, noisy_run, drawn_cache, tmp_path
):
    text = (exported / "README.md").read_text("utf-8")
    manifest = drawn_cache.manifest
    logits = manifest.logits
    for name in (manifest.cache_id, manifest.rows_id, logits.teacher_id, logits.signal_id):
        assert name in text
    assert "| loss.temperature_end | 2 |" in text
    assert "| student.source | source |" in text
    assert text.startswith("---\nlibrary_name: transformers\n")
    last = [line for line in read_metrics(noisy_run.run) if "heldout_ce" in line][-1]
    assert f"| cross-entropy, nats a token | {last['heldout_ce']:.5g} |" in text
    assert str(tmp_path.parent) not in text  # no absolute path
    assert "speculative" not in text  # only an evaluation measures it


def test_an_evaluation_of_the_same_checkpoint_is_in_the_card(noisy_run, drawn_cache, tmp_path):
    run = shutil.copytree(noisy_run.run, tmp_path / "run")
    evaluation = evaluate(Evaluate(run=run, cache=drawn_cache.path, batch_rows=3))
    out = export(Export(run=run, cache=drawn_cache.path, output=tmp_path / "out"))
    text = (out / "README.md").read_text("utf-8")
    low, high = evaluation["heldout_acceptance"]
    assert f"speculative decoding keeps | {low:.5g} – {high:.5g} |" in text
    assert f"| expected calibration error | {evaluation['heldout_ece']:.5g} |" in text
    judged_on = f"{evaluation['rows']} held-out rows of cache {evaluation['cache_id'][:12]}"
    assert f"| judged on | {judged_on} |" in text


def test_an_evaluation_of_other_weights_is_not_in_the_card_and_another_teacher_is_marked(
    noisy_run, drawn_cache, tmp_path
):
    run = shutil.copytree(noisy_run.run, tmp_path / "run")
    evaluation = evaluate(Evaluate(run=run, cache=drawn_cache.path, batch_rows=3))

    def card(**changes):
        write_json(run / "evaluation.json", {**evaluation, **changes})
        return (export(Export(run=run, output=tmp_path / "out")) / "README.md").read_text("utf-8")

    trained = card(weights="0" * 64)  # as if the run had been deleted and trained again
    assert "while training" in trained
    assert "speculative" not in trained
    marked = card(other_teacher=True, teacher_id="e" * 64)
    assert f"against ANOTHER TEACHER than the student's: {'e' * 12} |" in marked


def test_the_generation_config_names_the_end_token(exported):
    settings = json.loads((exported / "generation_config.json").read_text())
    assert settings == {"eos_token_id": 0}  # `<end>`; the tokenizer has no BOS


def test_all_end_tokens_of_the_teacher_are_exported(noisy_run, drawn_cache, tmp_path):
    run = shutil.copytree(noisy_run.run, tmp_path / "run")
    teachers = {"eos_token_id": [7, 0], "temperature": 0.6}
    (run / "initial" / "generation_config.json").write_text(json.dumps(teachers))
    out = export(Export(run=run, cache=drawn_cache.path, output=tmp_path / "student"))
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [0, 7]}
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [0, 7]
    assert open_checkpoint(out).tokenizer().end_ids == (0, 7)


def test_a_run_of_an_older_release_takes_its_card_from_the_cache(
    exported, noisy_run, drawn_cache, tmp_path
):
    run = shutil.copytree(noisy_run.run, tmp_path / "run")
    (run / "data.json").unlink()
    assert read_data_facts(run) == []
    out = export(Export(run=run, cache=drawn_cache.path, output=tmp_path / "student"))
    assert digests(out) == digests(exported)
    settings = read_json(run / "run.json")
    write_json(run / "run.json", {**settings, "rows_id": "0" * 64})
    with pytest.raises(ValueError, match=r"learned from 000000000000; name the run's own cache"):
        export(Export(run=run, cache=drawn_cache.path, output=tmp_path / "wrong"))


def test_facts_count_rows_and_bytes(noisy_run, drawn_cache):
    (facts,) = read_data_facts(noisy_run.run)
    rows = drawn_cache.read(drawn_cache.rows(split="train"))
    assert facts["train"] == {
        "rows": len(rows["tokens"]),
        "tokens": int((rows["segment_ids"] > 0).sum()),
        "targets": int(rows["loss_mask"].sum()),
    }
    everything = drawn_cache.read(drawn_cache.rows())["loss_mask"].sum()
    files = (drawn_cache.path / "parts" / "0000" / "logits").glob("*")
    size = sum(path.stat().st_size for path in files)
    assert facts["bytes_per_token"]["logits"] == size / everything
    assert facts["bytes_per_token"].keys() == {"rows", "logits"}


def test_a_failed_export_leaves_the_earlier_one_and_what_else_is_there(
    exported, noisy_run, tmp_path
):
    """The system refuses a file as large as the weights, after the card was made."""
    out = shutil.copytree(exported, tmp_path / "student")
    (out / "notes.txt").write_text("mine")
    before = digests(out)
    card = out / "README.md"
    card.write_text(card.read_text() + "old\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            export(Export(run=noisy_run.run, output=out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert card.read_text().endswith("old\n")
    assert digests(out).keys() == before.keys()
    export(Export(run=noisy_run.run, output=out))
    assert digests(out) == before


def test_at_no_time_are_weights_beside_files_of_another_export(
    exported, noisy_run, tmp_path, monkeypatch
):
    """Looked at before and after every file that is moved, as a kill there would leave it."""
    out = shutil.copytree(exported, tmp_path / "student")
    for path in out.iterdir():
        path.write_bytes(b"old")
    move, seen = Path.replace, []

    def look():
        return {path.read_bytes() == b"old" for path in out.glob("*.*") if path.is_file()}

    def replace(path, target):
        moved = move(path, target)
        if out in (path.parent, Path(target).parent):
            seen.append((look(), (out / "model.safetensors").exists()))
        return moved

    monkeypatch.setattr(Path, "replace", replace)
    export(Export(run=noisy_run.run, output=out))
    assert any(kinds == {True, False} for kinds, _ in seen), "files are moved one by one"
    assert not any(weights for kinds, weights in seen if len(kinds) == 2)
    assert digests(out) == digests(exported)


def test_the_card_has_one_headline_the_teachers_row_and_the_other_kls_folded_away(
    exported, noisy_run
):
    text = (exported / "README.md").read_text("utf-8")
    last = [line for line in read_metrics(noisy_run.run) if "heldout_ce" in line][-1]
    shown, folded = text.split("<details>")
    assert "| KL (draws): " in shown
    assert f"| {last['heldout_kl']:.5g} |" in shown
    assert f"| the teacher's own cross-entropy | {last['heldout_teacher_ce']:.4f} |" in shown
    assert "KL (bound)" not in shown
    assert f"as one token | {last['heldout_kl_bound']:.5g} |" in folded
