"""A student's predictions of rows, compared with its logits in float64."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decant.__main__ import main
from decant.schemas.records.rows import next_tokens
from decant.trainer.results.beside_teacher import open_student
from decant.trainer.run.trained_student import load_student
from tests.formulas.dense import log_softmax
from tests.making.caches import tiny_cache, write_teacher

TOP = 3


@pytest.fixture(scope="module")
def rows(drawn_cache):
    return drawn_cache.rows()[:3].tolist()


@pytest.fixture(scope="module")
def predicted(noisy_run, drawn_cache, rows):
    predict, note = open_student(
        noisy_run.run, drawn_cache, checkpoint="last", dtype="float32", top=TOP
    )
    assert note == f"student of {noisy_run.run} after 2 updates"
    return predict(rows)


@pytest.fixture(scope="module")
def dense(noisy_run, drawn_cache, rows):
    """The student's log-probabilities over the whole vocabulary, float64 [rows, positions, V]."""
    batch = {name: jnp.asarray(array) for name, array in drawn_cache.read(rows).items()}
    graph, params = load_student(noisy_run.run, dtype="float32")
    model = nnx.merge(graph, params)
    hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    logits = np.asarray(hidden, np.float64) @ np.asarray(model.unembedding(), np.float64)
    return log_softmax(logits)


def test_labels_stored_ids_and_the_likeliest_have_their_own_log_probabilities(
    predicted, dense, drawn_cache, rows
):
    batch = drawn_cache.read(rows)
    mask = batch["loss_mask"]
    labels = next_tokens(batch["tokens"])[..., None]
    for name, ids in (("label_logprobs", labels), ("topk_logprobs", batch["topk_ids"])):
        expected = np.take_along_axis(dense, ids, -1)[mask]
        got = predicted[name][mask].reshape(expected.shape)
        np.testing.assert_allclose(got, expected, atol=1e-4)
    falling = -np.sort(-dense[mask], axis=-1)[:, :TOP]
    np.testing.assert_allclose(predicted["top_logprobs"][mask], falling, atol=1e-4)
    at_ids = np.take_along_axis(dense, predicted["top_ids"], -1)[mask]
    np.testing.assert_allclose(at_ids, falling, atol=1e-4)


def test_the_kl_has_the_tail_as_one_token(predicted, dense, drawn_cache, rows):
    batch = drawn_cache.read(rows)
    mask = batch["loss_mask"]
    p = np.exp(batch["topk_logprobs"][mask].astype(np.float64))
    q = np.exp(np.take_along_axis(dense, batch["topk_ids"], -1)[mask])
    p, q = (np.concatenate([x, 1 - x.sum(1, keepdims=True)], 1) for x in (p, q))
    expected = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(predicted["kl_bound"][mask], expected, rtol=1e-3, atol=1e-3)


def test_a_run_with_another_tokenizer_is_refused_by_name(noisy_run, tmp_path):
    write_teacher(tmp_path / "teacher", vocabulary=500)
    other = tiny_cache(tmp_path, vocabulary=500)
    with pytest.raises(ValueError, match=f"another tokenizer than the student of {noisy_run.run}"):
        open_student(noisy_run.run, other, checkpoint="last", dtype="float32", top=TOP)


def test_a_student_of_another_teacher_is_shown_and_named_so(noisy_run, root, tmp_path):
    shutil.copytree(root / "corpus", tmp_path / "corpus")
    write_teacher(tmp_path / "teacher", seed=1)
    other = tiny_cache(tmp_path)
    _, note = open_student(noisy_run.run, other, checkpoint="last", dtype="float32", top=TOP)
    assert "learned from ANOTHER TEACHER" in note


def test_inspect_shows_the_student_in_the_terminal_and_on_pages(
    noisy_run, drawn_cache, tmp_path, capsys
):
    run = ["--run", str(noisy_run.run), "--top", str(TOP)]
    assert main(["inspect", str(drawn_cache.path), "--row", "1", *run]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"student of {noisy_run.run} after 2 updates" in printed
    assert "student KL ≥ entropy" in printed
    page = tmp_path / "row.html"
    assert main(["inspect", str(drawn_cache.path), "--row", "1", "--html", str(page), *run]) == 0
    assert "<th>student<th>KL ≥" in page.read_text()
    predict, _ = open_student(noisy_run.run, drawn_cache, checkpoint="last", top=TOP)
    at = int(np.flatnonzero(drawn_cache.read([1])["loss_mask"][0])[0])
    expected = f"{predict([1])['kl_bound'][0, at]:.2f}"
    start = f'<tr><td class="n">{at + 1}<'
    (line,) = [x for x in page.read_text().splitlines() if x.startswith(start)]
    assert line.endswith(f"<td>{expected}")


def test_a_run_without_a_row_or_pages_says_what_is_missing(noisy_run, drawn_cache, capsys):
    assert main(["inspect", str(drawn_cache.path), "--run", str(noisy_run.run)]) == 1
    assert "add --row N, or --html OUT" in capsys.readouterr().err
