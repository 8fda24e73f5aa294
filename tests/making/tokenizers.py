"""Small tokenizers of each kind, trained on a text of this repository.

The library does not train the same tokens each time.
"""

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from decant.models.text.tokenizer import Tokenizer
from tests.paths import ROOT

BEGIN, END, TURN = "<s>", "</s>", "<|turn|>"
_SPECIAL = ["<unk>", BEGIN, END, TURN]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPACE = "▁"


@functools.cache
def byte_level(size=600, *, prefix=False, form=None):
    """As GPT-2's; `form` is a normalizer such as "NFC"."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.normalizer = getattr(normalizers, form)() if form else None
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, TURN]
    kinds = {"vocab_size": size, "initial_alphabet": alphabet, "special_tokens": special}
    return _trained(made, trainers.BpeTrainer, **kinds)


@functools.cache
def sentencepiece(size=700, *, end=END):
    """As Llama 2's: BPE with bytes for what it does not know, a space in front of each text."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    made.normalizer = normalizers.Sequence(spaces)
    special = ["<unk>", BEGIN, end, TURN]
    # Without pre-tokenizer the trainer would take the whole text as one word.
    made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    kinds = {"vocab_size": size, "special_tokens": [*special, *_BYTES]}
    return _trained(made, trainers.BpeTrainer, special=special, begins=True, **kinds)


@functools.cache
def unigram(size=700, *, scheme="first", byte_fallback=True):
    """SentencePiece's other model; `scheme` says where a space is put in front."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    pieces = _BYTES if byte_fallback else []
    kinds = {"vocab_size": size, "special_tokens": [*_SPECIAL, *pieces], "unk_token": "<unk>"}
    return _trained(made, trainers.UnigramTrainer, byte_fallback=byte_fallback, **kinds)


@functools.cache
def word_piece(size=600, **normalizer):
    """As BERT's, with case and accents unless `normalizer` says otherwise."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(
        **{"lowercase": False, "strip_accents": False, **normalizer}
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    kinds = {"vocab_size": size, "special_tokens": _SPECIAL}
    return _trained(made, trainers.WordPieceTrainer, **kinds)


def with_settings(made, **settings):
    """A `tokenizers.Tokenizer` as one of ours."""
    written = {"eos_token": END, **settings}
    files = {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(written).encode(),
    }
    return Tokenizer(files, where="made")


def _trained(made, trainer, *, special=(), begins=False, byte_fallback=False, **kinds):
    made.train_from_iterator(_text(), trainer(show_progress=False, **kinds))
    definition = json.loads(made.to_str())
    if byte_fallback:
        definition["model"]["byte_fallback"] = True
    # The bytes were special for the trainer only.
    keep = special or [t for t in kinds["special_tokens"] if t not in _BYTES]
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] in keep]
    made = tokenizers.Tokenizer.from_str(json.dumps(definition))
    if begins:
        made.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, made.token_to_id(BEGIN))]
        )
    end = next(t for t in keep if t.startswith("</"))
    return with_settings(made, eos_token=end)


@functools.cache
def _text():
    names = ["README.md", "docs/architecture.md", "models/text/tokenizer.py"]
    return [line for name in names for line in (ROOT / name).read_text("utf-8").splitlines(True)]
