"""Spans of tokens when the tokenizer composes, decomposes, deletes or replaces characters."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from decant.models.text.tokenizer import Tokenizer

ACUTE, BELOW, DOT = "\u0301", "\u0316", "\u0323"
CHARACTERS = 'eaxy<>éáậ각가 ▁`"fi' + ACUTE + BELOW + "ガ"


def made(normaliser, *, pre_tokenizer=None):
    """A tokenizer whose tokens are single characters, or bytes where `CHARACTERS` lacks one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = dict.fromkeys([*CHARACTERS, *alphabet, *fallback, "<end>", "xy"])
    model = tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[("x", "y")], byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    if normaliser is not None:
        backend.normalizer = normaliser
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens(["<end>"])
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<end>"}).encode(),
    }
    return Tokenizer(files, where="here")


def spans(text, normaliser, **options):
    ((_, places),) = made(normaliser, **options).encode_with_spans([text])
    return [tuple(place) for place in places.tolist()]


BYTES = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)}
NFC, NFKC = normalizers.NFC(), normalizers.NFKC()


@pytest.mark.parametrize(
    ("text", "normaliser", "expected"),
    [
        ("e" + ACUTE, NFC, [(0, 2)]),
        ("ae" + ACUTE + "a", NFC, [(0, 1), (1, 3), (3, 4)]),
        ("a가\u11a8a", NFC, [(0, 1), (1, 3), (3, 4)]),
        ("\u1100\u1161\u11a8", NFC, [(0, 3)]),
        ("a" + DOT + "\u0302a", NFC, [(0, 3), (3, 4)]),
        # The marks change places: both tokens get the whole group.
        ("a" + BELOW + ACUTE, NFC, [(0, 3), (0, 3)]),
        ("e" + ACUTE, normalizers.Sequence([NFC, normalizers.Lowercase()]), [(0, 2)]),
        ("カ\u3099", NFKC, [(0, 2)]),
        ("ｶﾞ", NFKC, [(0, 2)]),
        ("ﬁ" + "e" + ACUTE, NFKC, [(0, 1), (0, 1), (1, 3)]),
        ("<end>" + "e" + ACUTE + "<end>", NFC, [(0, 5), (5, 7), (7, 12)]),
    ],
)
def test_a_composed_character_is_made_from_all_its_parts(text, normaliser, expected):
    assert spans(text.replace("カ", "\u30ab"), normaliser) == expected


def test_bytes_of_a_composed_character_have_its_span():
    assert spans("xe" + ACUTE, NFC, **BYTES) == [(0, 1), (1, 3), (1, 3)]


@pytest.mark.parametrize(
    ("text", "normaliser", "expected"),
    [
        ("xé", normalizers.NFD(), [(0, 1), (1, 2), (1, 2)]),  # one character, two tokens
        (" a ", normalizers.Strip(), [(1, 2)]),
        ("e" + ACUTE + "a", normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
         [(0, 1), (2, 3)]),
        ("a\u0000a", normalizers.Sequence([normalizers.Replace("\u0000", ""), NFC]),
         [(0, 1), (2, 3)]),
        ("e" + ACUTE + "\u0000a", normalizers.Sequence([normalizers.Replace("\u0000", ""), NFC]),
         [(0, 2), (3, 4)]),
        ("x a", normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
         [(0, 1), (0, 1), (1, 2), (2, 3)]),
        ("a你", None, [(0, 1), (1, 2), (1, 2), (1, 2)]),
        ("e" + ACUTE, None, [(0, 1), (1, 2)]),
    ],
)  # fmt: skip
def test_what_is_deleted_belongs_to_no_token(text, normaliser, expected):
    assert spans(text, normaliser) == expected


GROUPS = st.lists(
    st.sampled_from([*"eaxy<>가\u1100\u1161\u11a8", ACUTE, BELOW, DOT, "<end>"]), max_size=12
)


@given(GROUPS)
@example(["a", BELOW, ACUTE])
def test_every_character_of_a_composing_tokenizer_is_held_by_a_token(pieces):
    text = "".join(pieces)
    tokenizer = COMPOSING
    ((ids, places),) = tokenizer.encode_with_spans([text])
    assert ids.tolist() == tokenizer.encode_batch([text])[0].tolist()
    held = np.zeros(len(text), bool)
    for start, end in places:
        assert 0 <= start < end <= len(text)
        held[start:end] = True
    assert held.all()


COMPOSING = made(NFC)


def test_marks_without_end_take_linear_time():
    text = ("e" + ACUTE * 3) * 10_000 + "a" + BELOW * 50_000
    ((ids, places),) = COMPOSING.encode_with_spans([text])
    assert len(ids) == len(places)
    assert places[0].tolist() == [0, 4]
