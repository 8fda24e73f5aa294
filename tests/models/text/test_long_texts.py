"""A long text tokenised in pieces has the ids and spans that it has as a whole."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from decant.models.text.backend import Backend
from decant.models.text.composed_spans import composing_form, with_composed
from decant.models.text.long_texts import LongTexts

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
TRAINING = [
    "one word, two  words;\n\n  three 1234 5678 words... aaa aaaa é e\u0301 字字 <t>x</t>"
] * 3
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def split(expression: str, behavior: str = "isolated"):
    return pre_tokenizers.Split(Regex(expression), behavior)


def byte_level(*before, prefix: bool = False, regex: bool = False):
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    return pre_tokenizers.Sequence([*before, last])


def trained(model, trainer, *, normalizer=None, pre_tokenizer=None) -> Tokenizer:
    backend = Tokenizer(model)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(TRAINING, trainer)
    return backend


def bpe(*, normalizer=None, pre_tokenizer=None, alphabet=ALPHABET, **options) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    return trained(
        models.BPE(**options), trainer, normalizer=normalizer, pre_tokenizer=pre_tokenizer
    )


def byte_fallback(normalizer, pre_tokenizer=None) -> Tokenizer:
    """As Gemma's and Llama 2's: merges over the text as a whole, bytes for unknown characters."""
    backend = bpe(normalizer=normalizer, pre_tokenizer=pre_tokenizer, alphabet=list("▁\n<>"))
    definition = json.loads(backend.to_str())
    vocabulary = definition["model"]["vocab"]
    for byte in ("<unk>", *(f"<0x{n:02X}>" for n in range(256))):
        vocabulary[byte] = len(vocabulary)
    definition["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return Tokenizer.from_str(json.dumps(definition))


def unigram(pre_tokenizer=None, normalizer=None) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=60, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]
    )
    return trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizer, normalizer=normalizer)


def wordpiece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, show_progress=False, special_tokens=["[UNK]"]
    )
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )


RUNS = normalizers.Replace(Regex(" {2,}"), "_")
SPACES = normalizers.Replace(" ", "▁")
KINDS = {
    "gpt2": lambda: bpe(pre_tokenizer=byte_level(regex=True)),
    "gpt2 with a space in front": lambda: bpe(pre_tokenizer=byte_level(regex=True, prefix=True)),
    "gpt4": lambda: bpe(pre_tokenizer=byte_level(split(GPT4)), ignore_merges=True),
    "qwen": lambda: bpe(pre_tokenizer=byte_level(split(GPT4)), normalizer=normalizers.NFC()),
    "smollm": lambda: bpe(
        pre_tokenizer=byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True)
    ),
    "deepseek": lambda: bpe(pre_tokenizer=byte_level(*map(split, DEEPSEEK))),
    "threes of digits, then single": lambda: bpe(
        pre_tokenizer=byte_level(split(r"\p{N}{1,3}"), split(r"\p{N}{2}"), regex=True)
    ),
    "threes of digits from the right": lambda: bpe(
        pre_tokenizer=byte_level(split(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"), regex=True)
    ),
    "bytes without a split": lambda: bpe(pre_tokenizer=byte_level()),
    "gemma": lambda: byte_fallback(SPACES, pre_tokenizers.Split(" ", "merged_with_previous")),
    "llama 2": lambda: byte_fallback(normalizers.Sequence([normalizers.Prepend("▁"), SPACES])),
    "metaspace": lambda: byte_fallback(None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace, unsplit": lambda: byte_fallback(
        None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "unigram": lambda: unigram(pre_tokenizers.Metaspace()),
    "unigram, unsplit": lambda: unigram(normalizer=normalizers.NFKC()),
    "wordpiece": wordpiece,
    "characters stripped": lambda: bpe(
        pre_tokenizer=byte_level(regex=True), normalizer=normalizers.Strip()
    ),
    "runs replaced": lambda: bpe(
        pre_tokenizer=byte_level(regex=True),
        normalizer=normalizers.Sequence(
            [normalizers.NFD(), normalizers.Replace(Regex(" {2,}"), "_")]
        ),
    ),
}
ADDED = [
    AddedToken("<t>", special=True, normalized=False),
    AddedToken("<left>", lstrip=True, special=True),
    AddedToken("<right>", rstrip=True),
    AddedToken("word", single_word=True),
]


@pytest.fixture(scope="module", params=[(kind, added) for kind in KINDS for added in (False, True)],
                ids=lambda param: f"{param[0]}{', added' * param[1]}")  # fmt: skip
def backend(request):
    kind, with_added = request.param
    made = KINDS[kind]()
    made.decoder = decoders.ByteLevel()
    if with_added:
        made.add_tokens(ADDED)
    return made


PARTS = st.one_of(
    st.sampled_from(
        ["word", " word", "words", " ", "  ", "\n", "\r\n", "\t", "1", "1234567", "é", "e",
         "\u0301", "\u0323", "字", "가", "\u1161", "\u0f73", "🙂", ".", "...", "'ll", "'", "<t>",
         "<left>", "<right>", "<", "aaaa", "A", "▁", "_", "\u00a0", "\u200d", "\u0600", "\0"]
    ),
    st.builds(lambda part, n: part * n, st.sampled_from([" ", "\n", "1", "a", ".", " a", "\u0301"]),
              st.integers(20, 70)),
    st.text(max_size=4),
)  # fmt: skip
TEXTS = st.lists(PARTS, max_size=40).map("".join)


def checked(tokenizer: Tokenizer) -> Backend:
    content = tokenizer.to_str()
    return Backend(json.loads(content), content, where="here")


def long_texts(tokenizer: Tokenizer, **options: int) -> LongTexts:
    return LongTexts(checked(tokenizer), **options)


def chunks(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@settings(max_examples=25, deadline=None)
@given(text=TEXTS, size=st.integers(1, 40), chunk=st.integers(1, 50))
def test_pieces_have_the_tokens_of_the_whole(backend, text, size, chunk):
    # Read from its file, as `LongTexts` has it: one that was just trained breaks ties otherwise.
    whole = Tokenizer.from_str(backend.to_str()).encode(text, add_special_tokens=False)
    pieces = list(long_texts(backend, piece=size, beyond=100).encode(chunks(text, chunk)))
    assert np.concatenate([ids for ids, _ in pieces]).tolist() == whole.ids
    spans = np.concatenate([spans for _, spans in pieces]).reshape(-1, 2)
    offsets = np.array(whole.offsets, np.int64).reshape(-1, 2)
    assert np.array_equal(
        spans, with_composed(text, offsets, form=composing_form(checked(backend)))
    )


UNCUT = {"llama 2", "unigram, unsplit", "threes of digits from the right"}


def test_ordinary_text_is_cut_unless_the_tokenizer_looks_at_all_of_it(backend, request):
    kind, _, _ = request.node.callspec.id.partition(", added")
    text = "".join(f"Line {n}: some words, 12345 more - and\nthen others.\n\n" for n in range(400))
    pieces = list(long_texts(backend, piece=1000, beyond=200).encode(chunks(text, 777)))
    assert (len(pieces) == 1) == (kind in UNCUT)
    tokens = [len(ids) for ids, _ in pieces]
    assert kind in UNCUT or max(tokens) < sum(tokens) / 2
