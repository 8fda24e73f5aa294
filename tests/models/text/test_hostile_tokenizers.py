"""Tokenizer files that make the `tokenizers` library fail: each is a ValueError with its name.

The library is written in Rust: some of these panic, which is no Exception in Python, and some would
abort the process.
"""

import base64
import json

import pytest

from decant.models.text.gguf_tokenizer import tokenizer_files
from decant.models.text.tokenizer import Tokenizer
from tests.making.models import tokenizer_metadata

BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "X", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}


def definition(**changes):
    steps = dict.fromkeys(["normalizer", "pre_tokenizer", "post_processor", "decoder"])
    return {"version": "1.0", "added_tokens": [], **steps, "model": BPE} | changes


def charsmap(*numbers):
    data = b"".join(number.to_bytes(4, "little") for number in numbers)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def opened(value):
    return Tokenizer({"tokenizer.json": json.dumps(value).encode()}, where="here")


TEXTS = ["abab", "a" * 30 + "c", ""]

AT_OPENING = {
    "a prefix that merges lack": {"model": BPE | {"continuing_subword_prefix": "éé"}},
    "a prefix inside a character": {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "é": 1, "aé": 2},
            "merges": ["a é"],
            "continuing_subword_prefix": "x",
        }
    },
    "no table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "a table larger than the file": {"normalizer": charsmap(1 << 31, 0, 0)},
    "such a table inside a sequence": {
        "normalizer": {"type": "Sequence", "normalizers": [charsmap((1 << 32) - 4)]}
    },
    "parentheses": {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(" * 10**5 + ")" * 10**5}}},
    "an id of four billion": {"model": BPE | {"vocab": {"a": 2**32 - 1, "b": 1, "ab": 2}}},
    "no token": {"model": BPE | {"vocab": {}, "merges": []}},
    "a model that is no object": {"model": [[]]},
    "a normaliser that is no object": {"normalizer": [3]},
    "merges that are no pairs": {"model": BPE | {"merges": [3], "continuing_subword_prefix": "#"}},
}
BACKTRACKING = {"Regex": "(a|a)*$x|(a+)+b"}
AT_A_TEXT = {
    "a table that points outside": {"normalizer": charsmap(4, 0xFFFFFFFF, 0x61616161)},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "an expression that backtracks": {
        "pre_tokenizer": SPLIT | {"pattern": {"Regex": "(a|a)*$x|(a+)+b"}}
    },
    "an unknown token that is none": {"model": BPE | {"unk_token": "<u>"}},
    "no unknown token": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["b", -1.0]]}},
}


@pytest.mark.parametrize("changes", AT_OPENING.values(), ids=AT_OPENING)
def test_what_cannot_be_opened_is_refused(changes):
    with pytest.raises(ValueError, match=r"^here: tokenizer.json"):
        opened(definition(**changes))


@pytest.mark.parametrize("changes", AT_A_TEXT.values(), ids=AT_A_TEXT)
def test_a_text_that_makes_the_library_fail_is_an_error(changes):
    tokenizer = opened(definition(**changes))
    for encode in (tokenizer.encode_batch, tokenizer.encode_with_spans):
        with pytest.raises(ValueError, match=r"^here: tokenizer.json cannot be used: "):
            encode(TEXTS)


def test_a_post_processor_that_panics_is_an_error():
    with pytest.raises(ValueError, match=r"^here: tokenizer.json cannot be used: no entry"):
        _ = opened(definition(post_processor=TEMPLATE)).bos_id


def test_nothing_is_padded_cut_or_dropped_whatever_the_file_says():
    padding = {
        "strategy": {"Fixed": 99_999_999_999},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    truncation = {"max_length": 1, "stride": 0, "direction": "Right", "strategy": "LongestFirst"}
    model = BPE | {"dropout": 0.9}
    tokenizer = opened(definition(padding=padding, truncation=truncation, model=model))
    assert tokenizer.encode_batch(["ab" * 50])[0].tolist() == [2] * 50


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize(
    "content",
    [b"{", b"[" * 10**5, b"\xff", b"[]", b"1" * 5000],
    ids=["cut", "deep", "bytes", "list", "long"],
)
def test_files_that_hold_no_object_are_named(name, content):
    files = {"tokenizer.json": json.dumps(definition()).encode(), name: content}
    with pytest.raises(ValueError, match=rf"^here: {name}"):
        Tokenizer(files, where="here")


@pytest.mark.parametrize(
    "changes",
    [
        {"ggml.eos_token_id": 99},
        {"ggml.eos_token_id": -1},
        {"ggml.tokens": [1, 2]},
        {"ggml.token_type": [1]},
        {"ggml.merges": [3]},
        {"ggml.merges": ["a b c"]},
        {"ggml.pre": ["smollm"]},
    ],
)
def test_gguf_metadata_that_do_not_fit_are_refused(changes):
    metadata = {f"tokenizer.{k}": v for k, v in tokenizer_metadata(**changes).items()}
    with pytest.raises(ValueError, match=r"^test.gguf: "):
        Tokenizer(tokenizer_files(metadata, where="test.gguf"), where="test.gguf")


def test_texts_that_begin_with_a_token_that_is_not_there_are_refused():
    metadata = {f"tokenizer.{k}": v for k, v in tokenizer_metadata().items()}
    del metadata["tokenizer.ggml.bos_token_id"]
    metadata["tokenizer.ggml.add_bos_token"] = True
    with pytest.raises(ValueError, match=r"test.gguf: .* no bos_token_id"):
        tokenizer_files(metadata, where="test.gguf")
