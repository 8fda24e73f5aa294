"""Tokenizers: rebuilt from GGUF metadata, read from files, and what their digest covers."""

import json

import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.models.text.gguf_tokenizer import tokenizer_files
from decant.models.text.tokenizer import Tokenizer
from tests.making.models import (
    HF_CONFIG,
    TOKENS,
    hf_tensors,
    tokenizer_metadata,
    write_gguf,
    write_hf,
)

END, USER = TOKENS.index("<|end|>"), TOKENS.index("<|user|>")


def rebuilt(**changes):
    metadata = {f"tokenizer.{k}": v for k, v in tokenizer_metadata(**changes).items()}
    return Tokenizer(tokenizer_files(metadata, where="test.gguf"), where="test.gguf")


def texts(tokenizer, text):
    (ids,) = tokenizer.encode_batch([text])
    return [TOKENS[i] for i in ids]


def test_smollm_splits_digits_singly_and_llama_in_threes():
    assert texts(rebuilt(), "ab 12") == ["ab", "Ġ", "1", "2"]
    llama = rebuilt(**{"ggml.pre": "llama-bpe"})
    assert texts(llama, "ab12") == ["ab", "12"]
    gpt2 = rebuilt(**{"ggml.pre": "gpt-2"})
    assert texts(gpt2, "ab1234") == ["ab", "12", "3", "4"]


def test_merges_apply_and_special_tokens_in_the_text_are_one_token():
    assert texts(rebuilt(), "ab ab<|end|>c") == ["ab", "Ġab", "<|end|>", "c"]


def test_ids_are_int32_arrays_without_special_tokens_around():
    first, second = rebuilt().encode_batch(["ab", ""])
    assert first.dtype == second.dtype == np.int32
    assert first.tolist() == [TOKENS.index("ab")]
    assert second.size == 0


def test_bos_is_none_unless_the_tokenizer_adds_it():
    assert rebuilt().bos_id is None
    adding = rebuilt(**{"ggml.add_bos_token": True})
    assert adding.bos_id == USER
    assert texts(adding, "ab") == ["ab"]
    files = adding.files()
    files["tokenizer_config.json"] = b'{"eos_token": "<|end|>"}'
    assert Tokenizer(files, where="here").bos_id == USER  # the post-processor says so


def test_end_token_and_size():
    assert (rebuilt().eos_id, rebuilt().size) == (END, len(TOKENS))
    without = Tokenizer({"tokenizer.json": rebuilt().files()["tokenizer.json"]}, where="here")
    with pytest.raises(
        ValueError, match=r"here: neither tokenizer_config.json nor .* names an eos"
    ):
        _ = without.eos_id


def test_written_files_give_the_same_tokenizer_and_digest(tmp_path):
    tokenizer = rebuilt()
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    again = Tokenizer.from_files(tmp_path)
    assert again.digest == tokenizer.digest
    assert again.files() == tokenizer.files()


def test_the_digest_ignores_formatting_and_sees_everything_that_changes_ids():
    tokenizer, files = rebuilt(), rebuilt().files()
    definition = json.loads(files["tokenizer.json"])
    pretty = files | {"tokenizer.json": json.dumps(definition, indent=3).encode()}
    definition["truncation"] = {
        "max_length": 4,
        "stride": 0,
        "direction": "Right",
        "strategy": "LongestFirst",
    }
    cut = files | {"tokenizer.json": json.dumps(definition).encode()}
    assert Tokenizer(pretty, where="").digest == tokenizer.digest
    assert Tokenizer(cut, where="").digest == tokenizer.digest
    assert len(Tokenizer(cut, where="").encode_batch(["abcdefgh"])[0]) == 7
    others = [
        rebuilt(**{"ggml.pre": "gpt-2"}),
        rebuilt(**{"ggml.eos_token_id": USER}),
        rebuilt(**{"ggml.add_bos_token": True}),
        rebuilt(**{"ggml.merges": ["a b"]}),
    ]
    settings = json.loads(files["tokenizer_config.json"]) | {"add_bos_token": True}
    with_bos = files | {"tokenizer_config.json": json.dumps(settings).encode()}
    others.append(Tokenizer(with_bos, where=""))
    assert others[-1].digest == others[2].digest  # the post-processor or the settings say so
    assert len({tokenizer.digest, *(other.digest for other in others)}) == 5


def test_an_unknown_pre_tokenizer_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"test.gguf: tokenizer.ggml.pre is 'viking'.*smollm"):
        rebuilt(**{"ggml.pre": "viking"})
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model is 'bert'"):
        rebuilt(**{"ggml.model": "bert"})


def test_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json here"):
        Tokenizer.from_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"not valid JSON"):
        Tokenizer.from_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be used"):
        Tokenizer.from_files(tmp_path)


def test_a_tokenizer_may_have_ids_without_an_embedding(tmp_path):
    tokens = [*TOKENS, *(f"x{i}" for i in range(60))]
    metadata = tokenizer_metadata(**{"ggml.tokens": tokens, "ggml.token_type": [1] * len(tokens)})
    path = write_gguf(tmp_path / "model.gguf", hf_tensors(), tokenizer=metadata)
    opened = open_checkpoint(path)
    assert (opened.tokenizer().size, opened.config.vocab_size) == (84, 64)


def with_files(**files):
    """The rebuilt tokenizer with other files beside tokenizer.json, given by stem."""
    definition = rebuilt().files()["tokenizer.json"]
    others = {f"{stem}.json": json.dumps(content).encode() for stem, content in files.items()}
    return Tokenizer({"tokenizer.json": definition, **others}, where="here")


def test_special_tokens_may_be_named_in_the_special_tokens_map_only():
    named = {"eos_token": {"content": "<|end|>"}, "bos_token": "<|user|>"}
    tokenizer = with_files(tokenizer_config={"add_bos_token": True}, special_tokens_map=named)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (END, USER)
    both = with_files(tokenizer_config={"eos_token": "<|user|>"}, special_tokens_map=named)
    assert both.eos_id == USER


@pytest.mark.parametrize(
    ("named", "ids"),
    [({}, ()), ({"eos_token_id": USER}, (USER,)), ({"eos_token_id": [END, 0, USER]}, (0, USER))],
)
def test_a_text_ends_with_eos_or_another_token_of_the_generation_config(named, ids):
    tokenizer = with_files(tokenizer_config={"eos_token": "<|end|>"}, generation_config=named)
    assert tokenizer.end_ids == (END, *ids)
    assert tokenizer.eos_id == END


@pytest.mark.parametrize("named", ["2", [END, None], True, {"ids": 1}])
def test_end_ids_that_are_no_ids_are_refused(named):
    tokenizer = with_files(
        tokenizer_config={"eos_token": "<|end|>"}, generation_config={"eos_token_id": named}
    )
    with pytest.raises(ValueError, match=r"here: generation_config.json: eos_token_id is"):
        _ = tokenizer.end_ids


def test_end_tokens_of_a_model_come_from_its_config_if_it_has_no_generation_config(tmp_path):
    write_hf(tmp_path, hf_tensors(), HF_CONFIG | {"eos_token_id": [END, USER]})
    for name, content in rebuilt().files().items():
        (tmp_path / name).write_bytes(content)
    assert open_checkpoint(tmp_path).tokenizer().end_ids == (END, USER)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert open_checkpoint(tmp_path).tokenizer().end_ids == (END, 0)


def test_the_end_of_a_turn_in_gguf_metadata_ends_a_text():
    assert rebuilt(**{"ggml.eot_token_id": USER}).end_ids == (END, USER)
    assert rebuilt().end_ids == (END,)


@pytest.mark.parametrize("token", [["<|end|>"], 3, True])
def test_an_eos_token_that_is_no_text_is_named(token):
    with pytest.raises(ValueError, match=r"here: eos_token is .*; expected one token, as a text"):
        _ = with_files(tokenizer_config={"eos_token": token}).eos_id


@pytest.fixture(scope="module")
def embedded():
    return open_checkpoint("embedded").tokenizer()


def test_the_embedded_tokenizer_is_smollm2(embedded):
    assert (embedded.size, embedded.bos_id, embedded.eos_id) == (49152, None, 2)
    (ids,) = embedded.encode_batch(["The year 1984:\n\n    def f(x):"])
    pieces = ["The", " year", " ", "1", "9", "8", "4", ":", "\n\n   ", " def", " f", "(", "x", "):"]
    assert [embedded.decode([i]) for i in ids] == pieces


@pytest.mark.parametrize(
    "text", ["", " ", "\r\n\t", "naïve Ünïcödé ½ ② 你好 🙂", "x = 3.14159  # π\n" * 3, "it's  I'LL"]
)
def test_decoding_gives_the_text_back(embedded, text):
    (ids,) = embedded.encode_batch([text])
    assert embedded.decode(ids) == text
