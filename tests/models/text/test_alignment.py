"""One text as two tokenizers' tokens, laid over the same bytes."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings

from decant.models.text.alignment import align_segment
from decant.models.text.special_partners import special_partners
from decant.models.text.spelling import token_spelling
from tests.making import tokenizers as making
from tests.models.text.test_projection import byte_level, pieces
from tests.models.text.test_spelling import CODE, KINDS, TEXTS
from tests.models.text.test_spelling import made as made_of_kind
from tests.models.text.test_tokenizer import rebuilt

spelling_of = functools.cache(token_spelling)


def aligned(teacher, student, ids, *, counted=None, begins=True, mapping=None):
    ids = np.asarray(ids)
    return align_segment(
        ids,
        np.ones(len(ids), bool) if counted is None else np.asarray(counted),
        teacher=spelling_of(teacher),
        student=student,
        student_spelling=spelling_of(student),
        mapping=special_partners(teacher, student, mapping=mapping),
        begins=begins,
    )


def ids_of(tokenizer, text):
    return tokenizer.encode_batch([text])[0].tolist()


def words(tokenizer, made):
    names = {i: name for name, i in tokenizer.backend.ids.items()}
    return [names[i] for i in made.tokens.tolist()]


def by_bytes(ours, theirs):
    """`source` and `spans` of two lists of byte strings over one text, byte by byte."""
    starts = {}
    for i, place in enumerate(itertools.accumulate(map(len, ours), initial=0)):
        starts[place] = i
    source, spans, at = [], [], 0
    for token in theirs:
        first, last = starts.get(at), starts.get(at + len(token))
        known = first is not None and first > 0
        source.append(first - 1 if known else -1)
        spans.append(last - first if known and last is not None else 0)
        at += len(token)
    return source[1:] + [-1] * bool(theirs), spans[1:] + [0] * bool(theirs)


@pytest.mark.parametrize(
    "pair", [("byte level", "Unigram, no space"), ("Unigram, no space", "byte level")]
)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
@example(text=CODE)
def test_source_and_spans_are_those_of_a_comparison_byte_by_byte(pair, text):
    (teacher, ours), (student, theirs) = map(made_of_kind, pair)
    ids = ids_of(teacher, text)
    made = aligned(teacher, student, ids)
    assert made.tokens.tolist() == ids_of(student, text)
    pair_of_bytes = [[s.bytes[i] for i in t] for s, t in ((ours, ids), (theirs, made.tokens))]
    assert [made.source.tolist(), made.spans.tolist()] == [*by_bytes(*pair_of_bytes)]
    assert made.counted.all()
    dtypes = [made.tokens.dtype, made.source.dtype, made.spans.dtype, made.counted.dtype]
    assert dtypes == [np.int32, np.int32, np.int32, bool]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(text=TEXTS)
@example(text=CODE)
@example(text=" ")
@example(text="  ")
@example(text="  a")
@example(text=" a")
@example(text=" \n")
def test_with_one_tokenizer_every_position_speaks_of_itself(kind, text):
    tokenizer, spelling = made_of_kind(kind)
    ids = ids_of(tokenizer, text)
    if spelling.bos is not None:
        ids = [spelling.bos, *ids]
    made = aligned(tokenizer, tokenizer, ids)
    n = len(ids)
    assert made.tokens.tolist() == ids
    assert made.source.tolist() == [*range(n - 1), *[-1] * bool(n)]
    assert made.spans.tolist() == [1] * (n - 1) + [0] * bool(n)


def test_a_position_speaks_where_both_begin_a_token():
    teacher, student = byte_level(" the", " theory"), byte_level(" th", "eo")
    made = aligned(teacher, student, ids_of(teacher, "a theory the"))
    assert words(student, made) == ["a", "Ġth", "eo", "r", "y", "Ġth", "e"]
    # The teacher's tokens: a, " theory", " the". Positions 0 and 1 speak of what comes after.
    assert made.source.tolist() == [0, -1, -1, -1, 1, -1, -1]
    assert made.spans.tolist() == [0] * 7
    back = aligned(student, teacher, ids_of(student, "a theory the"))
    assert words(teacher, back) == ["a", "Ġtheory", "Ġthe"]
    assert back.source.tolist() == [0, 4, -1]
    assert back.spans.tolist() == [4, 2, 0]  # " theory" is four of its tokens, " the" two


def test_a_token_is_counted_if_it_holds_a_counted_byte():
    teacher, student = byte_level("ab", "cd"), byte_level("bc")
    made = aligned(teacher, student, ids_of(teacher, "abcd"), counted=[False, True])
    assert words(student, made) == ["a", "bc", "d"]
    assert made.counted.tolist() == [False, True, True]
    other = aligned(teacher, student, ids_of(teacher, "abcd"), counted=[True, False])
    assert other.counted.tolist() == [True, True, False]
    split = aligned(teacher, byte_level("cd"), ids_of(teacher, "abcd"), counted=[True, False])
    assert split.counted.tolist() == [True, True, False]


def test_the_space_in_front_is_not_the_texts():
    teacher, student = byte_level("ab"), pieces("▁ab", "ab")
    made = aligned(teacher, student, ids_of(teacher, "ab ab"))
    assert words(student, made) == ["▁ab", "▁ab"]
    assert made.spans.tolist() == [2, 0]  # the teacher's: ab, a space, ab
    # In the middle of a document no space is put in front, and that of the text is kept.
    for text, tokens in (("ab ab", ["ab", "▁ab"]), (" ab", ["▁ab"]), ("  ab", ["▁", "▁ab"])):
        middle = aligned(teacher, student, ids_of(teacher, text), begins=False)
        assert words(student, middle) == tokens
    # The other way, the teacher's space is taken off.
    back = aligned(student, teacher, ids_of(student, "ab ab"))
    assert words(teacher, back) == ["ab", "Ġ", "ab"]
    assert back.source.tolist() == [0, -1, -1]
    assert words(teacher, aligned(student, teacher, ids_of(student, "ab"), begins=False)) == [
        "Ġ",
        "ab",
    ]


def test_a_space_of_its_own_in_front_of_the_teachers_text_is_a_token_more():
    teacher, student = pieces("▁", "ab"), byte_level("ab")
    made = aligned(teacher, student, ids_of(teacher, "abab"))
    assert words(student, made) == ["ab", "ab"]
    assert made.source.tolist() == [1, -1]
    # And one of the student's own is no byte of the text.
    back = aligned(student, teacher, ids_of(student, "abab"))
    assert words(teacher, back) == ["▁", "ab", "ab"]
    assert back.counted.tolist() == [False, True, True]
    assert back.source.tolist() == [-1, 0, -1]


def test_bos_is_the_students_own():
    bos = {"bos_token": making.BEGIN, "add_bos_token": True}
    teacher, student = byte_level("ab"), pieces("▁ab", **bos)
    end = teacher.backend.ids[making.END]
    made = aligned(teacher, student, [*ids_of(teacher, "ab"), end])
    assert words(student, made) == [making.BEGIN, "▁ab", making.END]
    assert made.counted.tolist() == [False, True, True]
    assert made.source.tolist() == [-1, 0, -1]
    middle = aligned(teacher, student, [*ids_of(teacher, "ab"), end], begins=False)
    assert words(student, middle)[0] != making.BEGIN
    # A student without one has none.
    begin = student.backend.ids[making.BEGIN]
    back = aligned(student, teacher, [begin, *ids_of(student, "ab")])
    assert words(teacher, back) == ["ab"]
    # The text after it begins a document for the student.
    first = making.unigram(scheme="first")
    dropped = aligned(student, first, [begin, *ids_of(student, "ab ab")])
    assert dropped.tokens.tolist() == ids_of(first, "ab ab")
    # Each has its own.
    both = aligned(student, pieces("▁ab", "c", **bos), [begin, *ids_of(student, "ab")])
    assert both.source.tolist() == [0, -1]


def test_turns_of_a_chat_are_stretches_by_themselves():
    turn = making.TURN
    teacher = byte_level("ab", added=(making.END, turn, "<|call|>"))
    student = pieces("▁ab", special=(making.BEGIN, making.END, turn))
    ids = teacher.backend.ids
    chat = [ids[turn], *ids_of(teacher, "ab"), ids[making.END], *ids_of(teacher, "ab")]
    made = aligned(teacher, student, chat)
    assert words(student, made) == [turn, "▁ab", making.END, "▁ab"]
    # "▁ab" begins with a space that the teacher's text does not have.
    assert made.source.tolist() == [-1, 1, -1, -1]
    assert made.spans.tolist() == [0, 1, 0, 0]
    # A special token that the student does not have is spelt out, without a space behind it.
    call = [*ids_of(teacher, "ab"), ids["<|call|>"], *ids_of(teacher, "ab")]
    spelt = aligned(teacher, student, call)
    text = spelling_of(student).join(spelt.tokens.tolist())
    assert text == b" ab<|call|>ab"
    assert spelt.source[0] == 0  # of "<"
    told = aligned(teacher, student, call, mapping={"<|call|>": making.BEGIN})
    assert words(student, told) == ["▁ab", making.BEGIN, "▁ab"]
    assert told.source.tolist() == [0, -1, -1]
    assert told.spans.tolist() == [1, 0, 0]


def test_a_part_of_a_character_at_an_end_is_left_out():
    teacher, student = byte_level(), byte_level("ä¸Ń", "ab")
    ids = ids_of(teacher, "中ab中")
    made = aligned(teacher, student, ids[1:-1], begins=False)
    assert words(student, made) == ["ab"]
    made = aligned(teacher, student, ids[2:], begins=False)
    assert words(student, made) == ["ab", "ä¸Ń"]
    # The teacher's tokens are the character's last byte, a, b, and the three bytes of the next.
    assert made.source.tolist() == [2, -1]
    assert made.spans.tolist() == [3, 0]
    # Bytes that are no text at all, as a model may write, too.
    made = aligned(teacher, student, [*ids_of(teacher, "ab"), ids[0], *ids_of(teacher, "ab")])
    assert words(student, made) == ["ab", "ab"]
    assert made.source.tolist() == [2, -1]
    # Behind them no space is put in front.
    spacing = pieces("▁ab", "ab")
    assert words(spacing, aligned(teacher, spacing, ids_of(teacher, "中ab")[1:])) == ["ab"]
    assert len(aligned(teacher, student, ids[1:3]).tokens) == 0
    assert len(aligned(teacher, student, []).tokens) == 0


def test_a_character_that_a_tokenizer_composes_is_not_taught_and_the_rest_is():
    teacher, student = byte_level("ab"), making.byte_level(form="NFC")
    text = "x e\u0301 y"
    made = aligned(teacher, student, ids_of(teacher, text))
    assert made.tokens.tolist() == ids_of(student, text)
    spelt = [spelling_of(student).bytes[i] for i in made.tokens]
    about = dict(zip(spelt[1:], made.source.tolist(), strict=False))
    assert about[b" "] == 4  # of the teacher's x, " ", e and the two bytes of U+0301
    assert {about[b"\xc3"], about[b"\xa9"]} == {-1}


def test_text_without_a_token_is_refused_with_its_place():
    teacher, student = byte_level("ab"), making.unigram(byte_fallback=False)
    with pytest.raises(ValueError, match=r"made: the tokenizer has no token for '中' in 'a 中 b'"):
        aligned(teacher, student, ids_of(teacher, "a 中 b"))
    # The text of the unknown token is no unknown text.
    assert len(aligned(teacher, student, ids_of(teacher, "a <unk> b")).tokens)


def test_a_teacher_that_drops_spaces_is_refused():
    with pytest.raises(ValueError, match="drops the spaces between words"):
        aligned(making.word_piece(), byte_level("ab"), [5, 6])


def test_spaces_that_the_student_drops_belong_to_the_token_after_them():
    teacher, student = making.byte_level(), making.word_piece()
    text = "the\n\n model, a"
    ids = ids_of(teacher, text)
    made = aligned(teacher, student, ids)
    ours = [spelling_of(teacher).bytes[i] for i in ids]
    theirs = [b"the", b"\n\n model", b",", b" a"]
    pieces_of = [spelling_of(student).bytes[i] for i in made.tokens]
    assert b"".join(pieces_of) == b"themodel,a"
    if pieces_of == [b"the", b"model", b",", b"a"]:
        assert made.source.tolist() == by_bytes(ours, theirs)[0]
        assert made.spans.tolist() == by_bytes(ours, theirs)[1]


def test_other_spellings_of_a_tokenizer_need_no_alignment():
    tokenizer = rebuilt()
    other = rebuilt(**{"ggml.add_bos_token": True})  # decides no id of a text
    assert tokenizer.difference(other) is None
    assert tokenizer.difference(rebuilt(**{"ggml.pre": "gpt-2"})) is not None
