"""SentencePiece tokenizers in GGUF: ids of an independent encoder by scores, on hard texts."""

import json
import random

import pytest

from decant.models.text.gguf_tokenizer import tokenizer_files
from decant.models.text.tokenizer import Tokenizer

TEXT = (
    "the then there other he here her ▁the ▁then ▁there ▁other ▁he ▁here ▁her in ing ▁in ▁ing "
    "er re ▁▁ ▁▁▁▁ ▁a ▁an an and ▁and 12 123 ▁1 é üb über ▁über 日本 日 本 .. ... ▁."
)
WORDS = [*TEXT.split(" "), "\n\n"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
CHARACTERS = sorted(set("".join(WORDS)))
OWN = ["<start>", "  \n"]
"""User-defined tokens, which llama.cpp's converter stores with plain spaces."""
TOKENS = [*SPECIAL, *BYTES, *WORDS, *(c for c in CHARACTERS if c not in WORDS), *OWN]
KINDS = [2, 3, 3, *[6] * 256, *[1] * (len(TOKENS) - 259 - len(OWN)), *[4] * len(OWN)]
HARD = [
    "",
    " ",
    "the",
    " the there  then    other",
    "thereand12123 über 日本語 mixed\twith\nlines\n\n\n",
    "emoji 🙂 and é as e\u0301, a zero\u200bwidth and \ufeffmark",
    "<s> is not special here</s>x <start>the  \n he <start> there",
    "▁the ▁▁ literal marks",
    "....... 1234512312 ",
]


def scored(seed):
    """Scores in random order, so that they and not the ids decide; special tokens have 0."""
    order = list(range(len(TOKENS)))
    random.Random(seed).shuffle(order)
    return [
        0.0 if kind in (2, 3, 4, 6) else -float(o) for o, kind in zip(order, KINDS, strict=True)
    ]


def metadata(scores, **changes):
    fields = {
        "model": "llama",
        "tokens": TOKENS,
        "token_type": KINDS,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | changes).items()}


def rebuilt(scores, **changes):
    return Tokenizer(tokenizer_files(metadata(scores, **changes), where="gguf"), where="gguf")


def joined_by_score(text, scores):
    """SentencePiece's algorithm: join the neighbours whose token scores highest, leftmost first."""
    known = {
        token: i for i, (token, kind) in enumerate(zip(TOKENS, KINDS, strict=True)) if kind == 1
    }
    parts = list(text)
    while True:
        best = None
        for at in range(len(parts) - 1):
            number = known.get(parts[at] + parts[at + 1])
            if number is not None and (best is None or scores[number] > best[0]):
                best = (scores[number], at)
        if best is None:
            break
        parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
    ids = []
    for part in parts:
        ids += [known[part]] if part in known else [3 + byte for byte in part.encode()]
    return ids


def expected(text, scores, *, prefix):
    """Special and user-defined tokens split the text; each part gets its own leading space."""
    found, ids = [text], []
    for token in (*SPECIAL, *OWN):
        pieces = []
        for part in found:
            if part in (*SPECIAL, *OWN):
                pieces.append(part)
                continue
            first, *others = part.split(token)
            pieces += [first, *(x for other in others for x in (token, other))]
        found = pieces
    for part in found:
        if part in (*SPECIAL, *OWN):
            ids.append(TOKENS.index(part))
        elif part:
            ids += joined_by_score((("▁" if prefix else "") + part.replace(" ", "▁")), scores)
    return ids


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_ids_are_those_of_joining_by_score(seed, prefix):
    scores = scored(seed)
    tokenizer = rebuilt(scores, add_space_prefix=prefix)
    for text in HARD:
        (ids,) = tokenizer.encode_batch([text])
        assert ids.tolist() == expected(text, scores, prefix=prefix), text


def test_random_texts_have_the_same_ids_too():
    scores, draw = scored(7), random.Random(0)
    tokenizer = rebuilt(scores)
    for _ in range(100):
        text = "".join(draw.choice(["the", " ", "r", "e", "12", "é", "日", "\n", "n", "▁", "🙂"])
                       for _ in range(draw.randrange(40)))  # fmt: skip
        (ids,) = tokenizer.encode_batch([text])
        assert ids.tolist() == expected(text, scores, prefix=True), text


def test_it_begins_texts_with_bos_unless_the_file_denies_it():
    assert rebuilt(scored(0)).bos_id == 1
    assert rebuilt(scored(0), add_bos_token=False).bos_id is None
    assert rebuilt(scored(0)).eos_id == 2


def test_it_is_the_tokenizer_that_hugging_face_publishes_for_llama_2():
    """Its tokenizer.json lists the merges by their token's score, and special tokens."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁t", "he", "▁the", "▁", "t", "h", "e"]
    scores = [0.0] * 259 + [-1.0, -2.0, -0.5, -9.0, -9.0, -9.0, -9.0]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 7]
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, token in enumerate(tokens[:3])
    ]
    published = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": ["▁t he", "▁ t", "h e"],
        },
    }
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files = {
        "tokenizer.json": json.dumps(published).encode(),
        "tokenizer_config.json": json.dumps(settings | {"add_bos_token": True}).encode(),
    }
    theirs = Tokenizer(files, where="published")
    ours = rebuilt(scores, tokens=tokens, token_type=kinds)
    assert theirs.difference(ours) is None
    assert ours.digest == theirs.digest


def test_decoding_gives_the_text_back():
    for prefix in (True, False):
        tokenizer = rebuilt(scored(1), add_space_prefix=prefix)
        for text in ("the there über", "日本語 🙂 e\u0301", "a  b"):
            (ids,) = tokenizer.encode_batch([text])
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "no tokenizer.ggml.scores"),
        ({"scores": [0.0]}, "tokens, but 1 scores"),
        ({"scores": ["a"] * len(TOKENS)}, "holds items other than float"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set"),
        ({"precompiled_charsmap": [1]}, "precompiled_charsmap is set"),
        ({"model": "bert"}, "only byte-level BPE"),
        ({"bos_token_id": len(TOKENS)}, "bos_token_id is"),
    ],
)
def test_metadata_that_cannot_be_rebuilt_are_refused(changes, message):
    with pytest.raises(ValueError, match=rf"^gguf: .*{message}"):
        rebuilt(**{"scores": scored(0), **changes})
