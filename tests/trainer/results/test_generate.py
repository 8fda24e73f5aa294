"""The command `generate`: samples for people, records for corpora, and its prompts."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx

from decant.models import open_checkpoint, save_directory
from decant.models.text.tokenizer import Tokenizer
from decant.trainer.__main__ import main
from decant.trainer.config import Generate
from decant.trainer.results.generate import generate, generate_records
from decant.trainer.results.prompts import prompts_of
from decant.trainer.results.rollouts import RecordFile, continuation
from decant.trainer.results.sampling import Completion, Sampler
from decant.trainer.run.trained_student import student_digest
from tests.making.caches import tokenizer_files
from tests.trainer.update.test_step import student

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tokenizer_files(512), where="here")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run without any update: `generate` uses its initial student."""
    path = tmp_path_factory.mktemp("run")
    graph, params = student()
    save_directory(nnx.merge(graph, params), path / "initial", tokenizer_files(512))
    return path


def chat_tokenizer():
    return Tokenizer(tokenizer_files(512), where="here").with_chat_template(TEMPLATE)


def write_prompts(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ids_of(tokenizer, **settings):
    return [prompt.ids for prompt in prompts_of(Generate(**settings), tokenizer)]


def test_a_prompt_begins_a_document_or_is_a_chat_message(tokenizer):
    assert tokenizer.decode(*ids_of(tokenizer, prompt="a cache")) == "a cache"
    with pytest.raises(ValueError, match="no chat template; leave out --chat"):
        ids_of(tokenizer, chat=True)
    files = tokenizer_files(512)
    settings = json.loads(files["tokenizer_config.json"])
    with_bos = {**settings, "bos_token": "<end>", "add_bos_token": True}
    files["tokenizer_config.json"] = json.dumps(with_bos).encode()
    bos_tokenizer = Tokenizer(files, where="here")
    assert ids_of(bos_tokenizer, prompt="") == [[0]]
    assert ids_of(bos_tokenizer, prompt="<end>a") == ids_of(bos_tokenizer, prompt="a")
    (ids,) = ids_of(chat_tokenizer(), prompt="a row", chat=True)
    assert chat_tokenizer().decode(ids) == "[user]a row[assistant]"


def test_a_file_holds_texts_and_chats_without_their_answers(tmp_path):
    user, answer = {"role": "user", "content": "a row"}, {"role": "assistant", "content": "x"}
    path = write_prompts(
        tmp_path / "prompts.jsonl",
        {"prompt": "a cache"},
        {"messages": [user]},
        {"messages": [user, answer]},
        {"prompt": [user, answer, user]},
    )
    prompts = prompts_of(Generate(prompts=path), chat_tokenizer())
    assert [prompt.text for prompt in prompts] == [
        "a cache",
        "[user]a row[assistant]",
        "[user]a row[assistant]",
        "[user]a row[assistant]x[user]a row[assistant]",
    ]
    assert [prompt.number for prompt in prompts] == [0, 1, 2, 3]
    wrapped = prompts_of(Generate(prompts=path, chat=True), chat_tokenizer())
    assert wrapped[0].text == "[user]a cache[assistant]"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("3", "line 2: int; expected an object"),
        ('{"text": "a"}', "line 2: expected 'prompt'"),
        ('{"prompt": ""}', "line 2 is empty and the tokenizer has no BOS"),
        ('{"prompt": "\\ud800"}', "line 2: the prompt holds half of a surrogate"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: there is no message"),
        ('{"messages": [3]}', "line 2: 3 is no message"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused_by_its_number(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        prompts_of(Generate(prompts=path), chat_tokenizer())


def test_a_file_of_prompts_that_is_not_there_is_named(tmp_path, tokenizer):
    config = Generate(prompts=tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl is not a file; expected "):
        prompts_of(config, tokenizer)


def test_the_command_prints_samples(run, tokenizer, capsys):
    flags = [f"--run={run}", "--prompt=the row", "--samples=2", "--max-tokens=4", "--seed=3"]
    assert main(["generate", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.count("the row") == 2
    assert "── sample 1, seed 3 ──" in printed
    most = 64 - len(ids_of(tokenizer, prompt="the row")[0])
    assert main(["generate", *flags, f"--max-tokens={most}", "--samples=1"]) == 0
    assert main(["generate", *flags, f"--max-tokens={most + 1}"]) == 1
    assert "are more than the 64 positions" in capsys.readouterr().err
    assert main(["generate", f"--run={run / 'nowhere'}"]) == 1
    assert "is not the directory of a run" in capsys.readouterr().err


def test_records_are_what_precompute_reads_as_rollouts(run, tokenizer, tmp_path):
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "the row"}, {"prompt": "a cache is"})
    output = tmp_path / "out" / "rollouts.jsonl"
    flags = [f"--prompts={path}", "--samples=2", "--max-tokens=4", "--logprobs"]
    assert main(["generate", f"--run={run}", *flags, f"--output={output}"]) == 0
    assert [file.name for file in output.parent.iterdir()] == [output.name]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["the row"] * 2 + ["a cache is"] * 2
    assert records[0]["completion_ids"] != records[1]["completion_ids"]
    model = open_checkpoint(run / "initial").load()
    for record in records:
        ids, ends = record["completion_ids"], record["completion_ids"][-1] in tokenizer.end_ids
        assert record["prompt_ids"] == tokenizer.encode_batch([record["prompt"]])[0].tolist()
        assert record["completion"] == tokenizer.decode(ids[:-1] if ends else ids)
        assert len(record["logprobs"]) == len(ids) <= 4
        assert record["tokenizer"] == tokenizer.digest
        assert record["writer"] == student_digest(model)
    plain = generate_records(Generate(run=run, prompts=path, samples=2, max_tokens=4, jsonl=True))
    assert plain == [{name: r[name] for name in ("prompt", "completion")} for r in records]


def test_a_model_that_is_no_run_writes_the_same(run):
    asked = {"prompt": "the row", "max_tokens": 4, "logprobs": True}
    records = generate_records(Generate(run=run, **asked))
    assert generate_records(Generate(model=str(run / "initial"), **asked)) == records
    texts = generate_records(Generate(run=run, **asked), ["the row", {"prompt": "a cache"}])
    assert [r["prompt"] for r in texts] == ["the row", "a cache"]
    assert texts[0] == records[0]


def test_killed_and_rerun_it_goes_on_with_the_same_bytes(run, tmp_path, monkeypatch):
    path = write_prompts(tmp_path / "p.jsonl", *[{"prompt": f"row {i}"} for i in range(6)])
    monkeypatch.setattr("decant.trainer.results.generate._WINDOW", 1)
    asked = [f"--run={run}", f"--prompts={path}", "--max-tokens=3", "--batch-rows=2", "--logprobs"]
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    assert main(["generate", *asked, f"--output={whole}"]) == 0
    append, complete, written = RecordFile.append, Sampler.complete, []

    def dies(file, records):
        append(file, records)
        if len(written) == 2:
            raise KeyboardInterrupt

    def counting(sampler, requests, **kwargs):
        written.append(len(requests))
        return complete(sampler, requests, **kwargs)

    monkeypatch.setattr(Sampler, "complete", counting)
    monkeypatch.setattr(RecordFile, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        main(["generate", *asked, f"--output={again}"])
    assert not again.exists()
    (partial,) = tmp_path.glob(".again.jsonl.*.partial")
    with partial.open("ab") as file:
        file.write(b'{"prompt": "ro')  # as a kill in the middle of a line leaves it
    monkeypatch.setattr(RecordFile, "append", append)
    written.clear()
    assert main(["generate", *asked, "--seed=1", f"--output={tmp_path / 'other.jsonl'}"]) == 0
    assert len(written) == 3
    written.clear()
    assert main(["generate", *asked, f"--output={again}"]) == 0
    assert len(written) == 1
    assert again.read_bytes() == whole.read_bytes()
    assert not [*tmp_path.glob(".*.partial")]


def test_prompts_that_are_too_long_are_refused_or_left_out(run, tmp_path, capsys):
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "a " * 80}, {"prompt": "a"})
    flags = [f"--run={run}", f"--prompts={path}", "--max-tokens=4", "--jsonl"]
    assert main(["generate", *flags]) == 1
    error = capsys.readouterr().err
    assert "line 1; 1 prompts are too long" in error
    assert "leave them out with --skip-long" in error
    assert main(["generate", *flags, "--skip-long"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert "left out 1 of 2 prompts" in printed.err
    assert json.loads(printed.out)["prompt"] == "a"


def writes(monkeypatch, ids):
    """Every completion is these ids."""
    made = Completion(np.array(ids), np.zeros(len(ids), np.float32))
    monkeypatch.setattr(Sampler, "complete", lambda _, requests, **__: [made for _ in requests])


def test_the_end_token_is_in_the_sample_and_the_ids_and_not_in_the_completion(run, monkeypatch):
    writes(monkeypatch, [7, 0])  # 0 is `<end>`
    seven = open_checkpoint(run / "initial").tokenizer().decode([7])
    asked = {"run": run, "prompt": "the row", "samples": 1, "max_tokens": 2}
    assert generate(Generate(**asked)) == [f"the row{seven}<end>"]
    (record,) = generate_records(Generate(**asked, logprobs=True))
    assert record["completion"] == seven
    assert record["completion_ids"] == [7, 0]


def test_a_sample_ends_with_any_end_token_of_the_generation_config(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    asked = Generate(
        run=copy, prompt="the row", samples=1, max_tokens=3, temperature=0.0, logprobs=True
    )
    (record,) = generate_records(asked)
    assert len(record["completion_ids"]) == 3
    first = record["completion_ids"][0]
    (copy / "initial" / "generation_config.json").write_text(f'{{"eos_token_id": [0, {first}]}}')
    (record,) = generate_records(asked)
    assert record["completion_ids"] == [first]
    assert record["completion"] == ""


def test_a_character_that_is_cut_is_a_replacement_character_and_its_ids_are_whole(tokenizer):
    prompt, whole = (tokenizer.encode_batch([text])[0].tolist() for text in ("a", "a é"))
    assert continuation(prompt, whole[len(prompt) :], tokenizer) == " é"
    assert continuation(prompt, whole[len(prompt) : -1], tokenizer) == " \ufffd"


def test_a_prompt_that_the_student_has_no_embedding_for_is_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for name, content in tokenizer_files(513).items():
        (copy / "initial" / name).write_bytes(content)
    last = open_checkpoint(copy / "initial").tokenizer().decode([512])
    with pytest.raises(ValueError, match=rf"the prompt holds '{last}', token 512, .* below 512"):
        generate(Generate(run=copy, prompt=f"the {last}", max_tokens=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"top_p": 0.0}, "top_p is 0"), ({"temperature": -1.0}, "temperature is -1")],
)
def test_settings_that_no_sample_can_have_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Generate(**wrong)
