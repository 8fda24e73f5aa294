"""One tokenizer in several spellings is one; tokenizers that may give other ids are two.

Definitions have the shapes that published checkpoints have, with small vocabularies.
"""

import copy
import itertools
import json
import random
import re
import sys
import unicodedata
from collections import defaultdict

import pytest
import tokenizers

from decant.models import open_checkpoint
from decant.models.text.gguf_tokenizer import tokenizer_files
from decant.models.text.tokenizer import Tokenizer

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT4 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (
    f"{UPPER}*{LOWER}+%s|{UPPER}+{LOWER}*%s|"
    r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
WORDS = ["th", "the", "Ġ", "Ġt", "Ġthe", "12", "123", "'s", "ĠĠ", "é", "an"]
MERGES = [["t", "h"], ["th", "e"], ["Ġ", "t"], ["Ġt", "he"], ["Ġ", "the"], ["1", "2"], ["12", "3"]]
MERGES += [["'", "s"], ["Ġ", "Ġ"], ["Ã", "©"], ["a", "n"], ["h", "e"]]
VOCABULARY = [*BYTES, *dict.fromkeys("".join(merge) for merge in MERGES)]
SPECIAL = ["<|end|>", "<|start|>"]


def byte_level(**changes):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True} | changes


def split(expression, **changes):
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False} | changes


def sequence(*steps, kind="pretokenizers"):
    return {"type": "Sequence", kind: list(steps)}


def added(content, token_id, **flags):
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {
        "id": token_id,
        "content": content,
        **dict.fromkeys(names, False),
        "special": True,
    } | flags


def definition(pre_tokenizer, *, model=None, **changes):
    """As transformers 4 writes byte-level BPE: special tokens are no part of the vocabulary."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(text, len(VOCABULARY) + i) for i, text in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": byte_level(use_regex=True),
        "decoder": byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": {token: i for i, token in enumerate(VOCABULARY)},
            "merges": [" ".join(merge) for merge in MERGES],
        }
        | (model or {}),
    } | changes


def opened(value, where="here"):
    files = {
        "tokenizer.json": json.dumps(value, ensure_ascii=False).encode(),
        "tokenizer_config.json": b'{"eos_token": "<|end|>", "add_bos_token": false}',
    }
    return Tokenizer(files, where=where)


SMOLLM = sequence({"type": "Digits", "individual_digits": True}, byte_level(use_regex=True))
PUBLISHED = {
    "gpt-2": definition(byte_level(use_regex=True)),
    "smollm": definition(SMOLLM),
    "qwen2": definition(
        sequence(split(GPT4 % ""), byte_level(trim_offsets=False, use_regex=False)),
        normalizer={"type": "NFC"},
        model={"byte_fallback": False, "continuing_subword_prefix": None},
    ),
    "llama-bpe": definition(
        sequence(split(GPT4 % "{1,3}"), byte_level(use_regex=False)), model={"ignore_merges": True}
    ),
    "olmo": definition(byte_level(use_regex=True), normalizer={"type": "NFC"}),
    "refact": definition(SMOLLM),
    "dbrx": definition(sequence(split(GPT4 % "{1,3}"), byte_level(use_regex=False))),
    "tekken": definition(
        sequence(split(CASED % ("", "", "")), byte_level(use_regex=False)),
        model={"ignore_merges": True},
    ),
    "gpt-4o": definition(
        sequence(
            split(CASED % (f"{CONTRACTIONS}?", f"{CONTRACTIONS}?", "{1,3}")),
            byte_level(use_regex=False),
        )
    ),
}


def unicode_texts():
    """Texts with characters of every category of Unicode, in several surroundings."""
    draw = random.Random(1)
    by_category = defaultdict(list)
    for code in range(sys.maxunicode + 1):
        by_category[unicodedata.category(chr(code))].append(code)
    del by_category["Cs"]
    chosen = [
        chr(code)
        for codes in by_category.values()
        for code in draw.sample(codes, min(25, len(codes)))
    ]
    draw.shuffle(chosen)
    around = ["", " ", "the", "12345", "e\u0301", "\r\n\n ", "'s", "  <|end|>", "<|start|>the", "é"]
    pieces = [c + draw.choice(around) + draw.choice(chosen) for c in chosen]
    return ["".join(pieces[i : i + 20]) for i in range(0, len(pieces), 20)]


TEXTS = [*unicode_texts(), "", " ", "the  the's 123456 an<|end|> <|start|>  the<|end", "THE'S 'S"]


def ids(tokenizer):
    return [array.tolist() for array in tokenizer.encode_batch(TEXTS)]


def as_pairs(value):
    value["model"]["merges"] = MERGES


def with_empty_fields(value):
    model = value["model"]
    model |= {
        "unk_token": None,
        "byte_fallback": False,
        "ignore_merges": model.get("ignore_merges"),
    }
    model["ignore_merges"] = bool(model["ignore_merges"])


def without_empty_fields(value):
    value["model"] = {k: v for k, v in value["model"].items() if v or k in ("vocab", "merges")}


def without_decoder(value):
    value |= {"decoder": None, "post_processor": None}


def padded(value):
    value["padding"] = {
        **{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
    }


def in_a_sequence(value):
    value["pre_tokenizer"] = sequence(sequence(), sequence(value["pre_tokenizer"]))
    steps = [] if value["normalizer"] is None else [value["normalizer"]]
    value["normalizer"] = sequence(*steps, kind="normalizers")


def in_another_order(value):
    for part in (value, value["model"], value["model"]["vocab"]):
        items = list(part.items())
        part.clear()
        part.update(reversed(items))


def with_special_tokens_in_the_vocabulary(value):
    value["model"]["vocab"] |= {text: len(VOCABULARY) + i for i, text in enumerate(SPECIAL)}


def not_special(value):
    for token in value["added_tokens"]:
        token["special"] = False


def with_an_unknown_token(value):
    value["model"] |= {"unk_token": "<|end|>", "fuse_unk": True}


RESPELLINGS = (
    *(as_pairs, with_empty_fields, without_empty_fields, without_decoder, padded, in_a_sequence),
    *(in_another_order, with_special_tokens_in_the_vocabulary, not_special, with_an_unknown_token),
)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("respell", RESPELLINGS)
def test_another_spelling_is_the_same_tokenizer(name, respell):
    tokenizer, other = opened(PUBLISHED[name]), copy.deepcopy(PUBLISHED[name])
    respell(other)
    again = opened(other)
    assert again.digest == tokenizer.digest
    assert tokenizer.difference(again) is None
    assert ids(again) == ids(tokenizer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_rebuilt_from_gguf_is_that_of_the_hugging_face_directory(name):
    """GGUF pads the vocabulary to the rows of the embedding; Llama 3 and Tekken need no padding."""
    padding = [] if name in ("llama-bpe", "tekken") else [f"[PAD{i}]" for i in range(5)]
    metadata = {
        "model": "gpt2",
        "pre": name,
        "tokens": [*VOCABULARY, *SPECIAL, *padding],
        "token_type": [1] * len(VOCABULARY) + [3] * len(SPECIAL) + [5] * len(padding),
        "merges": [" ".join(merge) for merge in MERGES],
        "eos_token_id": len(VOCABULARY),
        "add_bos_token": False,
    }
    files = tokenizer_files({f"tokenizer.ggml.{k}": v for k, v in metadata.items()}, where="gguf")
    rebuilt, published = Tokenizer(files, where="gguf"), opened(PUBLISHED[name])
    assert published.difference(rebuilt) is None
    assert rebuilt.digest == published.digest
    assert ids(rebuilt) == ids(published)


def test_steps_that_do_not_end_in_bytes_keep_their_unknown_token():
    plain = definition(None, model={"unk_token": "a"})
    assert opened(plain).digest != opened(definition(None)).digest


STEPS = [
    *(byte_level(use_regex=True), byte_level(use_regex=False), SMOLLM, None),
    byte_level(use_regex=True, add_prefix_space=True),
    sequence(split(GPT2), byte_level(use_regex=False, add_prefix_space=True)),
    sequence(split(GPT2), byte_level(use_regex=False)),
    sequence(split(GPT2, behavior="MergedWithNext"), byte_level(use_regex=False)),
    sequence(split(GPT2, invert=True), byte_level(use_regex=False)),
    sequence({"type": "Digits", "individual_digits": False}, byte_level(use_regex=True)),
    sequence(split(r"\p{N}"), byte_level(use_regex=True)),
    sequence(byte_level(use_regex=True), {"type": "Digits", "individual_digits": True}),
    sequence(split(GPT4 % ""), byte_level(use_regex=False)),
    sequence(split(GPT4 % "{1,3}"), byte_level(use_regex=False)),
    {"type": "Metaspace", "replacement": "Ġ", "prepend_scheme": "first", "split": False},
    {"type": "Metaspace", "replacement": "Ġ", "prepend_scheme": "always", "split": True},
]
NORMALISERS = [None, {"type": "NFC"}, {"type": "Lowercase"}]
MODELS = [
    *({}, {"ignore_merges": True}, {"unk_token": "a"}, {"unk_token": "a", "fuse_unk": True}),
    *({"merges": MERGES[::-1]}, {"merges": MERGES[:-1]}, {"end_of_word_suffix": "e"}),
]
WORD, LEFT = {"single_word": True}, {"lstrip": True}
ADDED = [
    [added("<|end|>", 0)],
    [added("<|end|>", 0, normalized=True)],
    [added("<|end|>", 0, **WORD)],
    [added("<|end|>", 0, **LEFT)],
    [added("<|end|>", 0), added("the", 1)],
    [added("<|end|>", 0), added("the", 1, normalized=True)],
    [added("<|end|>", 0), added("end|> ", 1, normalized=True)],
    [added("<|end|>", 0), added("Ġthe", 1)],
    [added("<|end|>", 0), added("<|end", 1, **WORD)],
]


def test_rules_that_are_called_equal_give_every_text_the_same_ids():
    """All pairs of settings, and of each three at random."""
    draw = random.Random(2)
    base = (STEPS[0], NORMALISERS[0], MODELS[0], ADDED[0])
    choices = (STEPS, NORMALISERS, MODELS, ADDED)
    cases = []
    for i, j in itertools.combinations(range(4), 2):
        for a, b in itertools.product(choices[i], choices[j]):
            case = list(base)
            case[i], case[j] = a, b
            cases.append(case)
    cases += [[draw.choice(options) for options in choices] for _ in range(50)]
    groups = defaultdict(set)
    for steps, normaliser, model, tokens in cases:
        value = definition(steps, normalizer=normaliser, model=model, added_tokens=tokens)
        try:
            tokenizer = opened(value)
            groups[tokenizer.digest].add(json.dumps(ids(tokenizer)))
        except ValueError:
            continue  # such an unknown token cannot be used
    assert len(groups) > 100
    assert {len(outcomes) for outcomes in groups.values()} == {1}


WHAT = {
    "id 265: 'an' in here, 'na' in there": lambda v: v["model"].update(
        vocab={("na" if t == "an" else t): i for t, i in v["model"]["vocab"].items()},
        merges=[m if m != "a n" else "n a" for m in v["model"]["merges"]],
    ),
    r"id 268: '<\|start\|>' in here, '<tool>' in there": lambda v: v["added_tokens"][1].update(
        content="<tool>"
    ),
    "id 269: nothing in here, '<tool>' in there": lambda v: v["added_tokens"].append(
        added("<tool>", 269)
    ),
    r"merges: \['t', 'h'\] in here, \['h', 'e'\] in there": lambda v: v["model"][
        "merges"
    ].reverse(),
    r"added_tokens: {'<\|end\|>': \[.*\]} in here": lambda v: v["added_tokens"][0].update(
        lstrip=True
    ),
    "normalizer: nothing in here, {'type': 'NFC'} in there": lambda v: v.update(
        normalizer={"type": "NFC"}
    ),
    "pre_tokenizer: {'type': 'Digits', 'individual_digits': True} in here, {'type': 'Split'": (
        lambda v: v.update(pre_tokenizer=byte_level(use_regex=True))
    ),
    "model: nothing in here, {'ignore_merges': True} in there": lambda v: v["model"].update(
        ignore_merges=True
    ),
}


@pytest.mark.parametrize("what", WHAT)
def test_what_differs_is_said(what):
    other = copy.deepcopy(PUBLISHED["smollm"])
    WHAT[what](other)
    ours, theirs = opened(PUBLISHED["smollm"]), opened(other, where="there")
    why = ours.difference(theirs)
    assert why
    assert ours.digest != theirs.digest
    assert re.match(what, why), why


def test_eos_bos_and_template_are_no_part_of_a_text():
    first = opened(PUBLISHED["smollm"])
    settings = {"eos_token": "<|start|>", "bos_token": "<|end|>", "chat_template": "{{ 1 }}"}
    files = first.files() | {"tokenizer_config.json": json.dumps(settings).encode()}
    second = Tokenizer(files, where="there")
    assert first.difference(second) is None
    assert first.digest != second.digest  # rows end with another token


def test_unigram_and_word_piece_differ_by_scores_and_flags():
    vocabulary = [["<unk>", 0], ["▁the", -1.5], ["t", -3], ["he", -4]]
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}
    same = unigram | {"byte_fallback": False, "vocab": [[t, float(s)] for t, s in vocabulary]}
    other = unigram | {"vocab": [*vocabulary[:3], ["he", -5]]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}

    def made(model):
        return opened(definition(metaspace, added_tokens=[]) | {"model": model})

    assert made(unigram)._rules == made(same)._rules
    assert "vocabulary" in str(made(unigram).difference(made(other)))


def test_the_embedded_tokenizer_saved_with_strings_for_merges_is_the_same():
    embedded = open_checkpoint("embedded").tokenizer()
    value = json.loads(embedded.files()["tokenizer.json"])
    value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]
    del value["model"]["ignore_merges"], value["decoder"]
    again = Tokenizer(embedded.files() | {"tokenizer.json": json.dumps(value).encode()}, where="")
    assert again.digest == embedded.digest
