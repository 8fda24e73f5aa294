"""From chats to a student: only the assistant's words are stored and learned from."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from rich.console import Console

from decant.models import open_checkpoint, save_directory
from decant.models.text.tokenizer import tokenizer_of
from decant.pipelines.__main__ import main
from decant.pipelines.capture import part
from decant.pipelines.capture.estimate import estimate
from decant.pipelines.capture.job import precompute
from decant.pipelines.capture.rows_only import tokenise_only
from decant.pipelines.config import Attention, Corpus, Hidden, Tokenise
from decant.pipelines.inspection.contents import left_out
from decant.pipelines.rows.rules import RowRules
from decant.pipelines.runners.worker_error import WorkerError
from decant.progress import notices
from decant.schemas import open_cache
from decant.schemas.manifest.manifest import read_manifest
from decant.schemas.records.rows import next_tokens
from decant.trainer.config import AttentionLoss, Data, HiddenLoss, Loss, Student, Train
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.train import train
from tests.making.caches import WORDS, tiny_settings, write_teacher
from tests.making.chats import DATED_OR_NOT, HEADERS, chat_tokenizer, dialogue


def talk(number: int) -> list[dict[str, str]]:
    """A chat of one to three questions and answers; different for each number."""
    words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(60)]
    turns = [
        f"{number} {' '.join(words[8 * t : 8 * t + 3 + t])}" for t in range(2 + number % 3 * 2)
    ]
    return dialogue(*turns)


TALKS = [talk(number) for number in range(40)]
ANSWERS = [message["content"] for chat in TALKS for message in chat if message["role"] != "user"]


def write_chat_teacher(directory: Path, template: str | None = HEADERS) -> Path:
    """The tiny teacher with the chat tokenizer.

    Its embedding has 512 rows, of which 267 are tokens and 245 padding. The padding rows are
    scaled so that, if they counted, they would have nearly all of the probability mass.
    """
    write_teacher(directory)
    model = open_checkpoint(directory).load()
    tokenizer = chat_tokenizer(template)
    model.embedding.set_value(model.embedding[...].at[tokenizer.size :].multiply(100))
    save_directory(model, directory, tokenizer.files())
    return directory


def write_chats(path: Path, chats=TALKS) -> None:
    lines = "\n".join(json.dumps({"messages": chat}) for chat in chats).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(lines) if path.suffix == ".zst" else lines)


def settings(root: Path, *, pattern: str = "chats/*", **others):
    config = tiny_settings(root, **others)
    corpus = Corpus(files=(str(root / pattern),), sequence_length=128, heldout=0.2)
    return dataclasses.replace(config, corpus=corpus)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chats")
    write_chat_teacher(root / "teacher")
    write_chats(root / "chats" / "a.jsonl.zst")
    return root


@pytest.fixture(scope="module")
def cache(root):
    precompute(
        settings(
            root,
            draws=4,
            hidden=Hidden(layers=(1,), dtype="int8"),
            attention=Attention(layers=(0,)),
        )
    )
    return open_cache(root / "cache")


def test_scored_tokens_are_the_assistants_words_and_end_tokens(root, cache):
    tokenizer = open_checkpoint(root / "teacher").tokenizer()
    batch = cache.read(cache.rows())
    labels = next_tokens(batch["tokens"])
    scored_texts = []
    for row in range(len(cache)):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            scored = (batch["segment_ids"][row] == segment) & batch["loss_mask"][row]
            scored_texts.append(tokenizer.decode(labels[row][scored]))
    expected = [
        "".join(m["content"] + "<|eot|>" for m in chat if m["role"] == "assistant")
        for chat in TALKS
    ]
    assert sorted("".join(scored_texts)) == sorted("".join(expected))
    assert set(expected) & set(scored_texts)  # most chats are in one piece
    count = sum(unit.scored for unit in cache.manifest.parts[0].units)
    assert count == batch["loss_mask"].sum() == sum(len(answer) + 1 for answer in ANSWERS)


def test_unscored_positions_store_nothing(cache):
    batch = cache.read(cache.rows(), signals=("logits", "hidden/1", "attention/0"))
    mask, segments = batch["loss_mask"], batch["segment_ids"]
    np.testing.assert_array_equal(np.isfinite(batch["topk_logprobs"]).any(-1), mask)
    last = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    read = mask | (last & (segments > 0))
    assert mask.mean() < 0.5
    np.testing.assert_array_equal((batch["hidden/1"] != 0).any(-1), read)
    np.testing.assert_array_equal((batch["attention/0"] != 0).any((1, 3)), read)


def test_padding_of_the_vocabulary_has_no_mass_and_no_draws(root, cache):
    """Although the teacher's own logits put nearly all mass there."""
    checkpoint = open_checkpoint(root / "teacher")
    size = checkpoint.tokenizer().size
    assert cache.manifest.vocabulary_size == size < checkpoint.config.vocab_size == 512
    batch = cache.read(cache.rows())
    mask = batch["loss_mask"]
    model = checkpoint.load()
    hidden, _ = model(*(jnp.asarray(batch[n]) for n in ("tokens", "segment_ids", "positions")))
    logits = np.asarray(hidden, np.float64)[mask] @ np.asarray(model.unembedding(), np.float64)
    padded = logits - logits.max(-1, keepdims=True)
    share = np.exp(padded[:, size:]).sum(-1) / np.exp(padded).sum(-1)
    assert np.median(share) > 0.99
    cut = logits[:, :size]
    cut = cut - cut.max(-1, keepdims=True)
    cut -= np.log(np.exp(cut).sum(-1, keepdims=True))
    ids = batch["topk_ids"][mask].astype(np.int64)
    top = np.take_along_axis(cut, ids, -1)
    np.testing.assert_allclose(batch["topk_logprobs"][mask], top, atol=2e-5)
    at_one = list(cache.manifest.betas).index(1.0)
    tail = np.exp(batch["tail_logmass"][mask][:, at_one])
    np.testing.assert_allclose(np.exp(top).sum(-1) + tail, 1, atol=1e-5)
    assert ids.max() < size
    assert batch["tail_ids"][mask].max() < size


@pytest.mark.slow
def test_a_student_learns_from_chats(root, cache):
    terms = {
        "hidden": (HiddenLoss(weight=0.1, student_layers=(1,), teacher_layers=(1,)),),
        "attention": (AttentionLoss(weight=0.1),),
    }
    loss = Loss(tail="bucket", chunk_tokens=64, **terms)
    student = Student(source=str(root / "teacher"), layers=1)
    data = Data(batch_rows=2, steps=3)
    train(Train(cache=cache.path, run=root / "run", student=student, data=data, loss=loss))
    lines = [line for line in read_metrics(root / "run") if "loss" in line]
    assert len(lines) == 3
    assert all(np.isfinite(line["loss"]) for line in lines)
    counted = cache.read(cache.rows("train"))["loss_mask"].sum(-1)
    assert all(2 * counted.min() <= line["tokens"] <= 2 * counted.max() for line in lines)


def test_the_same_chats_in_a_table_are_the_same_rows(root, cache):
    other = root / "table" / "a.parquet"
    other.parent.mkdir()
    pq.write_table(pa.table({"messages": TALKS}), other, row_group_size=7)
    precompute(settings(root, pattern="table/*", output=root / "of-table"))
    table = open_cache(root / "of-table")
    ours, theirs = (c.read(c.rows()) for c in (cache, table))
    for name in ("tokens", "segment_ids", "loss_mask"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert cache.manifest.rows_id != table.manifest.rows_id  # other files


def test_another_template_or_date_makes_other_rows_and_is_refused_in_the_same_place(root, cache):
    config = settings(root, draws=4)
    write_chat_teacher(root / "dated", DATED_OR_NOT)
    teacher = dataclasses.replace(config.teacher, model=str(root / "dated"))
    with pytest.raises(ValueError, match=r"corpus: there 1 files.*rows_id"):
        precompute(dataclasses.replace(config, teacher=teacher))
    names = set()
    for number, date in enumerate((None, "2026-01-31", "2026-02-01")):
        corpus = dataclasses.replace(config.corpus, chat_date=date)
        output = root / f"dated-{number}"
        names.add(
            precompute(
                dataclasses.replace(config, teacher=teacher, corpus=corpus, output=output)
            ).rows_id
        )
    assert len(names | {cache.manifest.rows_id}) == 4


def test_the_template_for_tools_goes_with_the_cache_and_renders_chats_that_have_tools(
    tmp_path, capsys
):
    write_chat_teacher(tmp_path / "teacher")
    named = tmp_path / "teacher" / "additional_chat_templates" / "tool_use.jinja"
    named.parent.mkdir()
    named.write_text("{{ '<turn>' + tools[0].name + '</turn>' }}" + HEADERS)
    write_chats(tmp_path / "chats" / "a.jsonl")
    with (tmp_path / "chats" / "a.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"messages": TALKS[0], "tools": [{"name": "warm"}]}))
    precompute(settings(tmp_path))
    flags = [f"--like={tmp_path / 'cache'}", f"--corpus.files={tmp_path}/chats/*"]
    assert main(["tokenise", *flags, f"--output={tmp_path / 'rows'}"]) == 0
    for name in ("cache", "rows"):
        cache = open_cache(tmp_path / name)
        tokens = cache.read(cache.rows(), signals=())["tokens"]
        texts = "".join(tokenizer_of(cache).decode(row) for row in tokens)
        assert texts.count("<turn>warm</turn>") == 1
        assert main(["verify", str(cache.path), "--rows=0"]) == 0, capsys.readouterr()


def test_a_template_of_ones_own_and_its_variables_decide_the_rows_and_go_with_the_cache(root):
    own = root / "own.jinja"
    own.write_text("{{ '<turn>' if mode == 'slow' and not brief }}" + HEADERS)
    config = settings(root, draws=0)
    names = set()
    for variables in ((), ("mode=slow", "brief=false"), ("mode=slow", "brief=true")):
        output = root / f"own-{len(names)}"
        corpus = dataclasses.replace(
            config.corpus, chat_template=str(own), chat_variables=variables
        )
        config = dataclasses.replace(config, corpus=corpus, output=output)
        names.add(precompute(config).rows_id)
        cache = open_cache(output)
        tokens = cache.read(cache.rows(), signals=())["tokens"]
        texts = "".join(tokenizer_of(cache).decode(row) for row in tokens)
        assert texts.count("<turn>") == (len(TALKS) if "brief=false" in variables else 0)
        assert (output / "tokenizer" / "chat_template.jinja").read_text() == own.read_text()
    assert len(names) == 3
    corpus = dataclasses.replace(config.corpus, chat_template=str(root / "none"))
    with pytest.raises(FileNotFoundError, match=r"corpus\.chat_template: .*none is no file"):
        precompute(dataclasses.replace(config, corpus=corpus))


def test_a_capture_begun_under_older_marking_rules_goes_on_if_it_has_its_rows(root, monkeypatch):
    config = settings(root, output=root / "older")
    begun = root / "begun"
    with monkeypatch.context() as then:
        then.setattr(part, "MARKING", 1)
        then.setattr(part, "RowRules", functools.partial(RowRules, marking=1))
        older = precompute(config)
    # Sealed: nothing is made anew. Its rows_id is the one it was begun with.
    assert precompute(config) == older
    shutil.copytree(root / "older", begun)
    for path in (begun / "manifest.json", begun / "parts" / "0000" / "plan.json"):
        path.unlink()
    shutil.rmtree(begun / "parts" / "0000" / "rows")
    with pytest.raises(ValueError, match=r"begun by a release before 0\.8, .*Finish it with that"):
        precompute(dataclasses.replace(config, output=begun))


def test_what_the_template_leaves_out_is_counted_and_said_once(root, capsys):
    reasons = [{**m, "reasoning_content": "hm"} for m in TALKS[1]]
    lines = [{"messages": TALKS[0]}, {"messages": reasons, "tools": [{"name": "warm"}]}]
    (root / "lossy").mkdir()
    (root / "lossy" / "a.jsonl").write_text(
        "\n".join(map(json.dumps, [*lines, lines[1] | {"x": 1}]))
    )
    write_chats(root / "lossy" / "b.jsonl", TALKS[2:])
    config = settings(root, pattern="lossy/*", output=root / "lossy-cache", draws=0)
    planned = estimate(config, console=notices(quiet=True))
    manifest = precompute(config)
    said = capsys.readouterr().err
    text = Tokenise(like=config.output, corpus=config.corpus, output=root / "lossy-text")
    rows_alone = tokenise_only(text)
    said_too = capsys.readouterr().err
    for name in ("tools", "reasoning_content"):
        line = f"leaves out {name} of 1 chats; the first is in a.jsonl: line 2"
        assert [s.count(line) for s in (said, said_too, *planned.warnings)].count(1) == 3
    lost = {"tools": 1, "reasoning_content": 1}
    assert manifest.parts[0].unwritten == rows_alone.parts[0].unwritten == lost
    assert read_manifest(config.output) == manifest
    assert "1 chats lost their tools in the chat template" in left_out(open_cache(config.output))


def test_chats_without_a_template_are_refused_before_anything_runs(root):
    write_chat_teacher(root / "base", None)
    config = settings(root, output=root / "never")
    teacher = dataclasses.replace(config.teacher, model=str(root / "base"))
    config = dataclasses.replace(config, teacher=teacher)
    refused = r"a\.jsonl\.zst holds chats, but .*base has no chat temp"
    with pytest.raises(ValueError, match=refused):
        precompute(config)
    with pytest.raises(ValueError, match=refused):
        estimate(config, console=Console(quiet=True))
    assert not (root / "never").exists()


def test_a_chat_that_cannot_be_rendered_stops_the_run_by_its_line_or_is_left_out(root):
    loud = "(m.content | upper if '<think>' in m.content and not loop.last else m.content) | trim"
    source = HEADERS.replace("message.content | trim", loud.replace("m.", "message."))
    write_chat_teacher(root / "thinks", source)
    thinking = dialogue("Hi", "<think>\nhm\n</think>\n\nYes", "No", "Why")
    write_chats(root / "mixed" / "a.jsonl", [*TALKS, thinking])
    config = settings(root, pattern="mixed/*", output=root / "skips")
    teacher = dataclasses.replace(config.teacher, model=str(root / "thinks"))
    config = dataclasses.replace(config, teacher=teacher)
    with pytest.raises(WorkerError, match=r"a\.jsonl: line 41: message 2: the chat template"):
        precompute(config)
    skipping = dataclasses.replace(config.corpus, on_error="skip")
    output = root / "skipped"
    part = precompute(dataclasses.replace(config, corpus=skipping, output=output)).parts[0]
    ((source, reason),) = [(item.source, item.reason) for item in part.skipped]
    assert source == "a.jsonl"
    assert reason.startswith("line 41: message 2")
