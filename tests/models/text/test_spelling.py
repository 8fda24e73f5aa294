"""The bytes of a text's tokens, joined, are the text."""

import functools

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from decant.models import open_checkpoint
from decant.models.text.spelling import token_spelling
from tests.making import tokenizers as making
from tests.models.text.test_tokenizer import rebuilt

KINDS = {
    "byte level": making.byte_level,
    "byte level with a space in front": lambda: making.byte_level(prefix=True),
    "SentencePiece BPE": making.sentencepiece,
    "Unigram": making.unigram,
    "Unigram, a space after special tokens": lambda: making.unigram(scheme="always"),
    "Unigram, no space": lambda: making.unigram(scheme="never"),
    "SmolLM2": lambda: open_checkpoint("embedded").tokenizer(),
}
PREFIXES = {
    "byte level with a space in front": "always",
    "SentencePiece BPE": "always",
    "Unigram": "first",
    "Unigram, a space after special tokens": "always",
}
# The sign that SentencePiece writes for a space is a space to it, special tokens are no text, and
# SmolLM2 has no token for some control characters and for the first byte of those from U+40000 on.
CHARACTERS = st.sampled_from(" \n\t") | st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"], exclude_characters="▁<"
)
TEXTS = st.text(CHARACTERS, max_size=40)
CODE = "def f(x):\n\n    return  x\t# 中文 한국어 🙂👩‍👩‍👧 é e\u0301\r\n"


@functools.cache
def made(kind):
    tokenizer = KINDS[kind]()
    return tokenizer, token_spelling(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
@example(text=CODE)
@example(text="   \n\n  ")
def test_the_bytes_of_a_texts_tokens_are_the_text(kind, text):
    tokenizer, spelling = made(kind)
    (ids,) = tokenizer.encode_batch([text])
    joined = spelling.join(ids.tolist())
    assert spelling.prefix == PREFIXES.get(kind, "never")
    if spelling.prefix == "never":
        assert joined == text.encode()
    else:
        assert joined in (text.encode(), f" {text}".encode())
    assert [len(spelling.written[i]) for i in ids] == spelling.lengths[ids].tolist()


def test_special_tokens_have_no_bytes_but_a_text():
    tokenizer, spelling = made("SentencePiece BPE")
    ids = tokenizer.backend.ids
    assert spelling.special == {ids[t]: t for t in ("<unk>", "<s>", "</s>", "<|turn|>")}
    assert [spelling.bytes[i] for i in spelling.special] == [None] * 4
    assert spelling.join([ids["<s>"], ids["▁"], ids["x"]]) == b"<s> x"
    assert spelling.is_special.sum() == 4
    assert spelling.bos == ids["<s>"]
    assert spelling.unknown == ids["<unk>"]


def test_a_token_for_a_byte_spells_the_byte():
    tokenizer, spelling = made("SentencePiece BPE")
    assert spelling.bytes[tokenizer.backend.ids["<0xE4>"]] == b"\xe4"
    tokenizer, spelling = made("byte level")
    assert spelling.bytes[tokenizer.backend.ids["Ċ"]] == b"\n"
    # Without bytes for what it does not know, it is a token of six characters.
    tokenizer = making.unigram(byte_fallback=False)
    assert token_spelling(tokenizer).bytes[tokenizer.backend.ids["x"]] == b"x"


def test_added_tokens_are_spelt_as_they_are_written():
    tokenizer = rebuilt()
    inner = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    inner.add_tokens(["<think>", "ÄÖ"])
    more = making.with_settings(inner, eos_token="<|end|>")
    spelling = token_spelling(more)
    assert spelling.bytes[tokenizer.size :] == (b"<think>", "ÄÖ".encode())
    assert set(spelling.special.values()) == {"<|end|>", "<|user|>"}


def test_word_pieces_are_spelt_without_their_sign_and_without_spaces():
    spelling = token_spelling(making.word_piece())
    tokenizer = making.word_piece()
    (ids,) = tokenizer.encode_batch(["the tokenizer,\n\n teachers"])
    assert spelling.drops_spaces
    assert spelling.join(ids.tolist()) == b"thetokenizer,teachers"
    signs = {i for token, i in tokenizer.backend.ids.items() if token.startswith("##")}
    assert spelling.continuing == signs


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            lambda: making.word_piece(lowercase=True),
            r"normalizer BertNormalizer changes plain text \(it writes 'abc",
        ),
        (
            lambda: making.byte_level(form="Lowercase"),
            r"normalizer Lowercase changes plain text \(it writes 'a b",
        ),
        (
            lambda: making.byte_level(form="Strip"),
            r"normalizer Strip changes plain text \(it writes 'A b",
        ),
    ],
)
def test_a_tokenizer_that_changes_texts_is_refused_with_the_step(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        token_spelling(tokenizer())


def test_a_tokenizer_that_drops_characters_is_refused():
    tokenizer = rebuilt()
    inner = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.CharDelimiterSplit("b")
    with pytest.raises(ValueError, match="pre-tokenizer drops characters such as 'b'"):
        token_spelling(making.with_settings(inner, eos_token="<|end|>"))


def test_composing_characters_is_no_change_of_plain_text():
    assert token_spelling(making.byte_level(form="NFC")).prefix == "never"
