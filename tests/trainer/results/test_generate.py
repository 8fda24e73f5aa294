"""Samples: greedy ones against tokens worked out by hand, random ones by their frequencies."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decant.models import open_checkpoint, save_directory
from decant.models.text.tokenizer import Tokenizer
from decant.trainer.__main__ import main
from decant.trainer.config import Generate
from decant.trainer.results.generate import (
    complete,
    generate,
    make_sampler,
    prompt_ids,
    sample_top_p,
)
from tests.making.caches import tokenizer_files
from tests.trainer.update.test_step import student

PROMPT = [5, 9, 300]


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


def samples_of(config, *, samples=1, max_tokens=6, stop=(), vocabulary=512):
    graph, params = student()
    sampler = make_sampler(graph, params, config=config, vocabulary=vocabulary)
    return complete(sampler, PROMPT, samples=samples, max_tokens=max_tokens, stop=stop)


def test_greedy_is_the_likeliest_token_of_each_unpadded_prefix():
    model = nnx.merge(*student())
    ids = list(PROMPT)
    for _ in range(6):
        row = np.array([ids], np.int32)
        hidden, _ = model(row, np.ones_like(row), np.arange(len(ids), dtype=np.int32)[None])
        logits = np.asarray(hidden[0, -1], np.float64) @ np.asarray(model.unembedding())
        ids.append(int(np.argmax(logits)))
    assert samples_of(Generate(temperature=0.0)) == [ids]


def test_a_sample_ends_with_the_first_token_that_stops_it():
    (whole,) = samples_of(Generate(temperature=0.0))
    (short,) = samples_of(Generate(temperature=0.0), stop={whole[4]})
    assert short == whole[: whole.index(whole[4], len(PROMPT)) + 1]
    rows = iter(np.array([[7, 8], [1, 9], [2, 1]]))
    ended = complete(lambda *_: next(rows), [0], samples=2, max_tokens=5, stop={1})
    assert ended == [[0, 7, 1], [0, 8, 9, 1]]  # the sampler is not called after all have ended
    rows = iter(np.array([[1, 8], [1, 9], [1, 1]]))  # tokens after the stop are dropped
    ended = complete(lambda *_: next(rows), [0], samples=2, max_tokens=5, stop={1})
    assert ended == [[0, 1], [0, 8, 9, 1]]


def test_ids_above_the_tokenizers_are_never_drawn():
    (ids,) = samples_of(Generate(temperature=0.0), max_tokens=1)
    (others,) = samples_of(Generate(temperature=0.0), max_tokens=1, vocabulary=ids[-1])
    assert others[-1] < ids[-1]


def test_the_same_seed_gives_the_same_samples_and_another_one_others():
    first = samples_of(Generate(temperature=2.0, seed=1), samples=3)
    assert samples_of(Generate(temperature=2.0, seed=1), samples=3) == first
    assert samples_of(Generate(temperature=2.0, seed=2), samples=3) != first
    assert first[0] != first[1]


def test_top_p_draws_by_the_renormalised_probabilities():
    p = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key, top: sample_top_p(jnp.log(p), key, top_p=top), (0, None)))
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.8, [1, 2, 3]), (0.3, [1]), (1e-6, [1])):
        frequencies = np.bincount(np.asarray(draw(keys, top_p)), minlength=5) / len(keys)
        expected = np.where(np.isin(np.arange(5), kept), p, 0)
        np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.03)


def test_a_prompt_begins_a_document_or_is_a_chat_message(tokenizer):
    assert tokenizer.decode(prompt_ids(Generate(prompt="a cache"), tokenizer)) == "a cache"
    with pytest.raises(ValueError, match="no chat template; leave out --chat"):
        prompt_ids(Generate(chat=True), tokenizer)
    files = tokenizer_files(512)
    settings = json.loads(files["tokenizer_config.json"])
    with_bos = {**settings, "bos_token": "<end>", "add_bos_token": True}
    files["tokenizer_config.json"] = json.dumps(with_bos).encode()
    bos_tokenizer = Tokenizer(files, where="here")
    assert prompt_ids(Generate(prompt=""), bos_tokenizer) == [0]
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = {**settings, "chat_template": template}
    files["tokenizer_config.json"] = json.dumps(chat).encode()
    chat_tokenizer = Tokenizer(files, where="here")
    ids = prompt_ids(Generate(prompt="a row", chat=True), chat_tokenizer)
    assert chat_tokenizer.decode(ids) == "[user]a row[assistant]"


def test_the_command_prints_samples(run, tokenizer, capsys):
    flags = [f"--run={run}", "--prompt=the row", "--samples=2", "--max-tokens=4", "--seed=3"]
    assert main(["generate", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.count("the row") == 2
    assert "── sample 1, seed 3 ──" in printed
    most = 64 - len(prompt_ids(Generate(prompt="the row"), tokenizer))
    assert main(["generate", *flags, f"--max-tokens={most}"]) == 0
    assert main(["generate", *flags, f"--max-tokens={most + 1}"]) == 1
    assert "are more than the 64 positions" in capsys.readouterr().err
    assert main(["generate", f"--run={run / 'nowhere'}"]) == 1
    assert "is not the directory of a run" in capsys.readouterr().err


def test_a_sample_ends_with_the_tokenizers_end_token(run, monkeypatch):
    def always_end(*_, **__):
        return lambda rows, at: np.zeros(len(rows), np.int32)  # `<end>`

    monkeypatch.setattr("decant.trainer.results.generate.make_sampler", always_end)
    assert (
        generate(Generate(run=run, prompt="the row", samples=2, max_tokens=3))
        == ["the row<end>"] * 2
    )


def test_a_sample_ends_with_any_end_token_of_the_generation_config(run, tmp_path, monkeypatch):
    def second_end(*_, **__):
        return lambda rows, at: np.full(len(rows), 7, np.int32)

    monkeypatch.setattr("decant.trainer.results.generate.make_sampler", second_end)
    copy = shutil.copytree(run, tmp_path / "run")
    asked = Generate(run=copy, prompt="the row", samples=1, max_tokens=3)
    (text,) = generate(asked)
    seven = open_checkpoint(run / "initial").tokenizer().decode([7])
    assert text == "the row" + seven * 3
    (copy / "initial" / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert generate(asked) == ["the row" + seven]


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
