"""Tokenizers: rebuilt from GGUF metadata, read from files, and what their digest covers."""

import json

import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.models.text.gguf_tokenizer import tokenizer_files
from decant.models.text.tokenizer import Tokenizer
from tests.making.models import TOKENS, hf_tensors, tokenizer_metadata, write_gguf

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
    with pytest.raises(ValueError, match=r"here: tokenizer_config.json names no eos_token"):
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
    assert len({tokenizer.digest, *(other.digest for other in others)}) == 6


def test_an_unknown_pre_tokenizer_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"test.gguf: tokenizer.ggml.pre is 'viking'.*smollm"):
        rebuilt(**{"ggml.pre": "viking"})
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model is 'llama'"):
        rebuilt(**{"ggml.model": "llama"})


def test_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json here"):
        Tokenizer.from_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"not valid JSON"):
        Tokenizer.from_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be used"):
        Tokenizer.from_files(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    tokens = [*TOKENS, *(f"x{i}" for i in range(60))]
    metadata = tokenizer_metadata(**{"ggml.tokens": tokens, "ggml.token_type": [1] * len(tokens)})
    path = write_gguf(tmp_path / "model.gguf", hf_tensors(), tokenizer=metadata)
    with pytest.raises(ValueError, match=r"tokenizer has 84 ids but the embedding only 64 rows"):
        open_checkpoint(path).tokenizer()


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
