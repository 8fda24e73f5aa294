"""Where the probability of each of a teacher's tokens goes in a student's vocabulary."""

import itertools

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from decant.models.text.projection import project_vocabulary
from decant.models.text.special_partners import DROPPED, special_partners
from decant.models.text.spelling import token_spelling
from tests.making import tokenizers as making


def byte_level(*words, added=(making.END,), **settings):
    """A byte-level BPE that knows all bytes and joins each word from its left end."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in words:
        parts = word.replace(" ", "Ġ")
        for end in range(2, len(parts) + 1):
            merge = (parts[: end - 1], parts[end - 1])
            if parts[:end] not in vocabulary:
                vocabulary[parts[:end]] = len(vocabulary)
                merges.append(merge)
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([*added])
    return making.with_settings(made, **{"eos_token": added[0], **settings})


def pieces(*tokens, special=(making.BEGIN, making.END), **settings):
    """A SentencePiece BPE of these tokens, joined from the left end, and of bytes."""
    spellings = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    characters = sorted({c for token in tokens for c in token})
    vocabulary = {token: i for i, token in enumerate([*spellings, *characters])}
    merges = []
    for token in tokens:
        for end in range(2, len(token) + 1):
            if token[:end] not in vocabulary:
                vocabulary[token[:end]] = len(vocabulary)
                merges.append((token[: end - 1], token[end - 1]))
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.add_special_tokens(["<unk>", *special])
    return making.with_settings(made, **{"eos_token": making.END, **settings})


def given_to(projection, teacher, student, token):
    names = {i: name for name, i in student.backend.ids.items()} | {-1: None}
    i = teacher.backend.ids[token.replace(" ", "Ġ")]
    return names[int(projection.first[i])], bool(projection.exact[i])


def test_a_token_that_is_one_of_the_students_gives_it_all_and_one_of_several_its_first():
    teacher, student = byte_level(" the", " theory", "ab"), pieces("▁the", "o", "r", "y", "a")
    made = project_vocabulary(teacher, student)
    assert given_to(made, teacher, student, " the") == ("▁the", True)
    assert given_to(made, teacher, student, " theory") == ("▁the", False)
    assert given_to(made, teacher, student, "ab") == ("a", False)


def test_inside_a_text_no_space_is_put_in_front():
    teacher, student = byte_level("the", "then"), pieces("▁the", "the", "n")
    made = project_vocabulary(teacher, student)
    assert given_to(made, teacher, student, "the") == ("the", True)
    assert given_to(made, teacher, student, "then") == ("the", False)


def test_a_part_of_a_character_goes_to_the_byte_that_begins_it():
    teacher, student = byte_level("ä¸Ń"), pieces("a")  # 中, and its first two bytes
    made = project_vocabulary(teacher, student)
    assert given_to(made, teacher, student, "ä") == ("<0xE4>", True)
    assert given_to(made, teacher, student, "ä¸") == ("<0xE4>", False)
    assert given_to(made, teacher, student, "ä¸Ń") == ("<0xE4>", False)


def test_of_two_tokens_with_the_same_bytes_the_one_that_texts_have_is_meant():
    teacher, student = byte_level("ab"), pieces("a", "▁a")
    made = project_vocabulary(teacher, student)
    assert given_to(made, teacher, student, "a") == ("a", True)  # not <0x61>
    assert given_to(made, teacher, student, "b") == ("<0x62>", True)
    lines = pieces("▁", "\n")
    assert given_to(project_vocabulary(teacher, lines), teacher, lines, "Ċ") == ("\n", True)
    # With the same tokenizer each is its own partner.
    own = project_vocabulary(student, student)
    assert own.first.tolist() == [*range(student.size)]
    assert own.exact.all()
    assert (own.overlap, own.teacher_overlap) == (1, 1)


def test_a_token_that_fits_nothing_goes_nowhere():
    teacher = byte_level("ab")
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<unk>", making.END])
    student = making.with_settings(inner)
    made = project_vocabulary(teacher, student)
    assert given_to(made, teacher, student, "ab") == ("ab", True)
    assert given_to(made, teacher, student, "c") == (None, False)
    assert made.overlap == 2 / 3  # ab and the end, of <unk>, ab and the end
    assert made.teacher_overlap == 2 / teacher.size


def test_word_pieces_stand_for_words_with_a_space_in_front_and_for_the_rest_of_words():
    vocabulary = ["<unk>", making.END, "play", "##ing", "ing", ","]
    inner = tokenizers.Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.add_special_tokens(["<unk>", making.END])
    student = making.with_settings(inner)
    teacher = byte_level(" play", " playing", "ing", " ing", ",")
    made = project_vocabulary(teacher, student)
    assert given_to(made, teacher, student, " play") == ("play", True)
    assert given_to(made, teacher, student, " playing") == ("play", False)
    assert given_to(made, teacher, student, "ing") == ("##ing", True)
    assert given_to(made, teacher, student, " ing") == ("ing", True)
    assert given_to(made, teacher, student, ",") == (",", True)
    assert given_to(made, teacher, student, " ") == (None, False)


def test_special_tokens_go_to_the_one_of_the_same_text_or_role_or_as_told():
    turn, call = "<|turn|>", "<|call|>"
    teacher = byte_level("ab", added=("<|end|>", turn, call), bos_token=turn)
    student = pieces("▁ab", special=(making.BEGIN, making.END, turn))
    ids, theirs = teacher.backend.ids, student.backend.ids
    assert special_partners(teacher, student) == {
        ids["<|end|>"]: theirs[making.END],
        ids[turn]: theirs[turn],
    }
    # A token of the same text that ends no text of the student's is no partner of the end.
    not_ending = pieces("a", special=(making.BEGIN, making.END, "<|end|>"))
    end = special_partners(teacher, not_ending)[ids["<|end|>"]]
    assert end == not_ending.backend.ids[making.END]
    told = project_vocabulary(teacher, student, mapping={call: making.BEGIN})
    assert told.first[ids[call]] == theirs[making.BEGIN]
    assert told.exact[ids[call]]
    # Untold, it is spelt out.
    untold = project_vocabulary(teacher, student)
    assert given_to(untold, teacher, student, call) == ("<0x3C>", False)


def test_bos_goes_to_bos_or_is_dropped():
    with_bos = pieces("a", bos_token=making.BEGIN, add_bos_token=True)
    other = pieces("a", special=("<b>", making.END), bos_token="<b>", add_bos_token=True)
    without = byte_level("ab")
    begin = with_bos.backend.ids[making.BEGIN]
    assert special_partners(with_bos, other)[begin] == other.backend.ids["<b>"]
    assert special_partners(with_bos, without)[begin] == DROPPED
    made = project_vocabulary(with_bos, without)
    assert (made.first[begin], made.exact[begin]) == (-1, False)


def test_what_ends_turns_goes_to_what_ends_turns():
    def named(tokenizer, *ends):
        ids = [tokenizer.backend.ids[end] for end in ends]
        files = tokenizer.files() | {
            "generation_config.json": f'{{"eos_token_id": {ids}}}'.encode()
        }
        return type(tokenizer)(files, where="made"), ids

    teacher, ours = named(byte_level("a", added=("<|e|>", "<|im_end|>")), "<|e|>", "<|im_end|>")
    student, theirs = named(pieces("a", special=(making.END, "<eot>")), making.END, "<eot>")
    assert special_partners(teacher, student) == dict(zip(ours, theirs, strict=True))
    # A student with one end has it for both.
    plain = pieces("a")
    end = plain.backend.ids[making.END]
    assert special_partners(teacher, plain) == dict.fromkeys(ours, end)


def test_a_mapping_of_a_text_that_is_no_token_is_refused():
    with pytest.raises(ValueError, match=r"has no token '<\|no\|>'"):
        special_partners(byte_level("a"), pieces("a"), mapping={making.END: "<|no|>"})


def test_every_token_goes_to_a_beginning_of_its_bytes():
    kinds = [making.byte_level(), making.sentencepiece(), making.unigram()]
    for teacher, student in itertools.product(kinds, kinds):
        made = project_vocabulary(teacher, student)
        theirs = token_spelling(student)
        for i, spelt in enumerate(token_spelling(teacher).bytes):
            if spelt is not None:
                partner = theirs.bytes[made.first[i]]
                assert partner is not None
                assert spelt.startswith(partner)
                assert (spelt == partner) == made.exact[i]
