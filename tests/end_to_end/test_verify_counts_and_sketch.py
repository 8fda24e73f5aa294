"""`verify` on counts, sketches and label log-probabilities: good ones, and each captured wrong."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from decant.pipelines.calibration import companions, sketch_basis
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Sketch, Teacher
from decant.pipelines.teacher import loaded, outputs, programs
from decant.pipelines.verification.verify import Verification, verify
from decant.schemas.disk.layout import COUNTS, LOGITS, SKETCH
from decant.schemas.targets.draws import TAIL_STREAM
from tests.making.caches import tiny_settings, write_corpus, write_teacher
from tests.pipelines.calibration.test_sketch_basis import CAPPED

BOTH = {"counts": 24, "sketch": Sketch(rank=5), "profile": "compact"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify-counts-and-sketch")
    write_corpus(root / "corpus", files=4, words=150)
    return root


def verified(root: Path, name: str, *, teacher: Teacher | None = None, **logits) -> Verification:
    config = tiny_settings(root, output=root / name, **{**BOTH, **logits})
    precompute(dataclasses.replace(config, teacher=teacher or config.teacher))
    result = verify(root / name, rows=8, teacher=None, memory=root / "digests.json")
    assert result.unable is None
    assert not result.structure.problems
    return result


def wrong_in(result: Verification) -> set[tuple[str, str]]:
    (content,) = result.content.values()
    measures = (*content.figures, *content.counts)
    return {(one.signal, one.what) for one in measures if not one.fine}


def test_what_was_captured_right_is_fine_and_was_compared(root):
    result = verified(root, "fine")
    assert not wrong_in(result)
    (content,) = result.content.values()
    of = {(f.signal, f.what): f for f in content.figures}
    assert of[LOGITS, "log-prob of the next token, nats"].mean > 1e-4, "rounding shows"
    assert 0.1 < of[SKETCH, "a number's error, in steps"].mean < 0.3
    assert of[SKETCH, "A, off from the unembedding"].mean > 0
    kls = [of[SKETCH, f"KL of the target at T = {t}, nats"].mean for t in (1, 2, 4)]
    assert all(0 < kl < 0.3 for kl in kls)
    assert (COUNTS, "a draw's distance from its id's share") in of


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("exact", {"sketch": Sketch(rank="full", step=0.0), "profile": "lossless"}),
        ("dithered", {"sketch": Sketch(rank="full"), "k": 1}),
        ("without ids", {"k": 0, "sketch": Sketch()}),
        ("adaptive", {"k": 16, "mass": 0.9}),
    ],
)
def test_other_settings_are_fine_too(root, name, changes):
    assert not wrong_in(verified(root, name, **changes))


@pytest.mark.slow  # test_verify.py has one without a sketch
def test_a_bfloat16_teacher_is_fine(root):
    write_teacher(root / "teacher") if not (root / "teacher").exists() else None
    narrow = Teacher(model=str(root / "teacher"), batch_rows=2, dtype="bfloat16")
    assert not wrong_in(verified(root, "bfloat16", teacher=narrow))


def test_a_soft_cap_is_fine(tmp_path):
    write_corpus(tmp_path / "corpus", files=4, words=150)
    write_teacher(tmp_path / "teacher", **CAPPED)
    assert not wrong_in(verified(tmp_path, "capped"))


def test_divided_logits_are_fine(tmp_path):
    write_corpus(tmp_path / "corpus", files=4, words=150)
    write_teacher(tmp_path / "teacher", family="granite", logit_divisor=6.0, score_multiplier=0.3)
    assert not wrong_in(verified(tmp_path, "divided"))


def test_labels_of_the_next_position_are_found(root, monkeypatch):
    original = loaded.next_tokens
    monkeypatch.setattr(loaded, "next_tokens", lambda tokens: np.roll(original(tokens), -1, 1))
    wrong = wrong_in(verified(root, "labels"))
    assert wrong == {(LOGITS, "log-prob of the next token, nats")}


def test_counts_from_starts_of_another_stream_are_found(root, monkeypatch):
    monkeypatch.setattr(loaded, "COUNTS_STREAM", TAIL_STREAM)
    wrong = wrong_in(verified(root, "stream"))
    assert wrong == {(COUNTS, "a draw's distance from its id's share")}


def test_counts_of_the_position_before_are_found(root, monkeypatch):
    original = outputs.count_draws
    monkeypatch.setattr(outputs, "count_draws", lambda drawn: original(np.roll(drawn, 1, 0)))
    wrong = wrong_in(verified(root, "rolled"))
    assert wrong == {(COUNTS, "a draw's distance from its id's share")}


def test_sketches_of_the_position_before_are_found(root, monkeypatch):
    original = programs.sketches
    monkeypatch.setattr(programs, "sketches", lambda *args: jnp.roll(original(*args), 1, axis=1))
    wrong = wrong_in(verified(root, "sketches"))
    assert wrong == {(SKETCH, "a number's error, in steps")}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"bias": lambda head: head.bias + 0.1}, "b, off from the mean state's logits"),
        ({"head": lambda head: np.roll(head.head, 1, 1)}, "A, off from the unembedding"),
    ],
)
def test_a_head_that_is_not_the_teachers_is_found(root, monkeypatch, change, what):
    original = companions.find_basis

    def changed(*args, **kwargs):
        basis, share = original(*args, **kwargs)
        new = {name: make(basis.head) for name, make in change.items()}
        return dataclasses.replace(basis, head=dataclasses.replace(basis.head, **new)), share

    monkeypatch.setattr(companions, "find_basis", changed)
    wrong = wrong_in(verified(root, what[0]))
    assert wrong == {(SKETCH, what)}


def test_offsets_of_the_wrong_sign_are_found(root, monkeypatch):
    original = sketch_basis.find_offsets
    monkeypatch.setattr(sketch_basis, "find_offsets", lambda *args, **kw: -original(*args, **kw))
    wrong = wrong_in(verified(root, "offsets"))
    assert (SKETCH, "KL that offsets add at T = 2, nats") in wrong
    assert all("offsets" in what for _, what in wrong)
