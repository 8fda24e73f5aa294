"""A tokenizer with more ids than the teacher has embeddings, as Gemma 3's `<image_soft_token>`.

Only documents that use such an id are refused.
"""

import dataclasses
import json
import re

import pytest

from decant.models import open_checkpoint
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.capture.job import precompute
from decant.schemas import open_cache
from decant.trainer.config import Student
from decant.trainer.run.initial_student import build_student
from tests.making.caches import TEXT, tiny_settings, tokenizer_files

ROWS = 512
"""Embeddings of the teacher, whose tokenizer has one id more."""


@pytest.fixture
def settings(tmp_path):
    config = tiny_settings(tmp_path, vocabulary=ROWS, heldout=0.0)
    for name, content in tokenizer_files(ROWS + 1).items():
        (tmp_path / "teacher" / name).write_bytes(content)
    last = Tokenizer.from_files(tmp_path / "teacher").decode([ROWS])
    documents = [{"text": f"{n} {TEXT} {n}"} for n in range(40)]
    documents.insert(2, {"text": f"{TEXT} {last}"})
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (tmp_path / "lines.jsonl").write_text(lines)
    corpus = dataclasses.replace(config.corpus, files=(str(tmp_path / "lines.jsonl"),))
    return dataclasses.replace(config, corpus=corpus)


def skipping(settings):
    return dataclasses.replace(
        settings, corpus=dataclasses.replace(settings.corpus, on_error="skip")
    )


def test_a_document_that_uses_such_an_id_is_named_with_its_line(settings):
    why = r"lines.jsonl: line 3: holds '<unused-\d+>', token 512, .* ids below 512 only"
    with pytest.raises(Exception, match=why):
        precompute(settings)


def test_it_is_skipped_if_asked_and_a_student_learns_from_the_others(settings):
    settings = skipping(settings)
    precompute(settings)
    cache = open_cache(settings.output)
    (part,) = cache.manifest.parts
    assert [re.sub("'.*'", "T", skipped.reason) for skipped in part.skipped] == [
        "line 3: holds T, token 512, but the teacher has embeddings for ids below 512 only"
    ]
    assert cache.manifest.vocabulary_size == ROWS
    source = Student(init="checkpoint", source=settings.teacher.model)
    student = build_student(source, cache=cache, dtype="float32", seed=0)
    assert student.config.vocab_size == ROWS


def test_an_end_token_without_an_embedding_is_refused(settings, tmp_path):
    last = open_checkpoint(tmp_path / "teacher").tokenizer().decode([ROWS])
    named = {"eos_token": last, "add_bos_token": False}
    (tmp_path / "teacher" / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match=r"eos_token has id 512, but the embedding has only 512"):
        precompute(settings)
    assert not settings.output.exists()
