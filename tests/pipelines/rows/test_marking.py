"""Which tokens of chats and completions are learned from, for the usual kinds of templates."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.models import open_checkpoint
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.rows.documents import Chat, Completion, Document
from decant.pipelines.rows.marking import Marked, long_segment, mark, marking_rules, segments
from decant.pipelines.rows.records import Place
from tests.making.chats import (
    DATED,
    FIRST_IS_READ,
    GENERATION,
    HEADERS,
    MOVING,
    OPENED,
    THINKING,
    TURNS,
    chat_tokenizer,
    dialogue,
)


def marked(content, tokenizer, *, date=None) -> str:
    """The document's tokens as text; tokens that are learned from stand in ⟦brackets⟧."""
    document = mark(Document(Place(0, 0), content), tokenizer, tokenizer.chat_template(date=date))
    (segment,) = segments([document], tokenizer)
    assert len(segment.tokens) == len(segment.counted)
    in_pieces = long_segment(document, tokenizer)
    assert in_pieces.tokens[:].tolist() == segment.tokens.tolist()
    assert in_pieces.counted[:].tolist() == segment.counted.tolist()
    runs: list[tuple[bool, list[int]]] = []
    for token, learned in zip(segment.tokens.tolist(), segment.counted.tolist(), strict=True):
        if not runs or runs[-1][0] != learned:
            runs.append((learned, []))
        runs[-1][1].append(token)
    texts = [(learned, tokenizer.decode(ids)) for learned, ids in runs]
    return "".join(f"⟦{text}⟧" if learned else text for learned, text in texts)


def chat(*turns, **others):
    return Chat(tuple(dialogue(*turns)), **others)


@pytest.fixture(scope="module")
def smollm():
    return open_checkpoint("embedded").tokenizer()


def test_of_a_real_chat_model_the_answers_are_learned_with_their_ends(smollm):
    system = ({"role": "system", "content": "Be brief."},)
    talk = Chat(
        (*system, *dialogue("Hi\n", "Hello\n\nyou 🙂!", "And?", " That  is  all.  ", "Bye"))
    )
    assert marked(talk, smollm) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi\n<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello\n\nyou 🙂!<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n⟦ That  is  all.  <|im_end|>⟧"
    )


def test_a_system_prompt_that_the_template_adds_is_not_learned(smollm):
    assert marked(chat("Hi", "Yes"), smollm) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧"
    )


def test_headers_the_templates_own_bos_is_the_only_one():
    assert marked(chat("Hi ", "Yes", "No", "Why"), chat_tokenizer(HEADERS)) == (
        "<s><|head|>user<|/head|>\n\nHi<|eot|><|head|>assistant<|/head|>\n\n⟦Yes<|eot|>⟧"
        "<|head|>user<|/head|>\n\nNo<|eot|><|head|>assistant<|/head|>\n\n⟦Why<|eot|>⟧"
    )


def test_turns_with_a_line_after_each_which_nobody_writes():
    assert marked(chat("Hi", "Yes  \n", "No", "a  b"), chat_tokenizer(TURNS)) == (
        "<s><turn>user\nHi</turn>\n<turn>model\n⟦Yes</turn>⟧\n"
        "<turn>user\nNo</turn>\n<turn>model\n⟦a  b</turn>⟧"
    )


def test_what_a_template_refuses_is_an_error_in_its_words():
    system = Chat(({"role": "system", "content": "x"}, *dialogue("Hi", "Yes")))
    with pytest.raises(ValueError, match="refuses these messages: there is no system role"):
        marked(system, chat_tokenizer(TURNS))


def test_an_assistant_that_speaks_first(smollm):
    first = ({"role": "assistant", "content": "Yes?"}, *dialogue("Hi", "No"))
    text = marked(Chat(first), chat_tokenizer(HEADERS))
    assert text.startswith("<s><|head|>assistant<|/head|>\n\n⟦Yes?<|eot|>⟧<|head|>user")
    assert marked(Chat(first), chat_tokenizer(FIRST_IS_READ)) == text
    assert marked(Chat(first), smollm).endswith(
        "<|im_end|>\n<|im_start|>assistant\n⟦Yes?<|im_end|>⟧\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦No<|im_end|>⟧"
    )


def test_a_block_of_thinking_that_the_template_adds_is_not_learned():
    empty = "<think>\n\n</think>\n\n"
    tokenizer = chat_tokenizer(THINKING)
    assert marked(chat("Hi", "e", "No", "Why"), tokenizer) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦e<|im_end|>⟧\n"
        f"<|im_start|>user\nNo<|im_end|>\n<|im_start|>assistant\n{empty}⟦Why<|im_end|>⟧"
    )
    thought = "<think>\nhm\n</think>\n\nWhy"
    assert marked(chat("Hi", thought), tokenizer).endswith(f"⟦{thought}<|im_end|>⟧")


def test_of_an_earlier_turn_that_lost_its_thinking_the_rest_is_learned():
    talk = chat("Hi", "<think>\nhm\n</think>\n\nYes", "No", "<think>\nso\n</think>\n\nWhy")
    assert marked(talk, chat_tokenizer(THINKING)) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧\n"
        "<|im_start|>user\nNo<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nso\n</think>\n\nWhy<|im_end|>⟧"
    )


def test_history_that_is_written_anew_is_not_mistaken_for_an_answer_that_says_the_same():
    system = {"role": "system", "content": "Be brief."}
    tokenizer = chat_tokenizer(MOVING)
    assert marked(Chat((system, *dialogue("Hi", "Hi"))), tokenizer) == (
        "<turn>Be brief.\n\nHi</turn>⟦Hi</s>⟧"
    )
    assert marked(Chat((system, *dialogue("Hi", "Hi", "No", "Why"))), tokenizer) == (
        "<turn>Hi</turn>⟦Hi</s>⟧<turn>Be brief.\n\nNo</turn>⟦Why</s>⟧"
    )


def test_a_prompt_that_opens_what_no_answer_has():
    assert marked(chat("Hi", "Yes", "No", "thus"), chat_tokenizer(OPENED)) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧\n"
        "<|im_start|>user\nNo<|im_end|>\n<|im_start|>assistant\n⟦thus<|im_end|>⟧"
    )


def test_a_template_that_marks_what_is_generated_is_believed():
    assert marked(chat("Hi", "Yes", "No", "  Why"), chat_tokenizer(GENERATION)) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧\n"
        "<|im_start|>user\nNo<|im_end|>\n<|im_start|>assistant\n⟦  Why<|im_end|>⟧"
    )
    with pytest.raises(ValueError, match="not characters"):
        marked(chat("H\ufdd0i", "Yes"), chat_tokenizer(GENERATION))


def test_prefixes_find_what_the_same_template_with_marks_says(smollm):
    files = smollm.files()
    settings = json.loads(files["tokenizer_config.json"])
    plain = "message['content'] + '<|im_end|>' + '\n'}}"
    assert plain in settings["chat_template"]
    settings["chat_template"] = settings["chat_template"].replace(
        plain,
        "''}}{% if message['role'] == 'assistant' %}{% generation %}{{message['content'] + "
        "'<|im_end|>'}}{% endgeneration %}{% else %}{{message['content'] + '<|im_end|>'}}"
        "{% endif %}{{'\n'}}",
    )
    data = json.dumps(settings).encode()
    marks = Tokenizer(files | {"tokenizer_config.json": data}, where="test")
    for talk in (chat("Hi", " Yes "), chat("a", "<think>b</think>\n\nc", "d\n", "\n\n🙂 e\n")):
        assert marked(talk, smollm) == marked(talk, marks)


@settings(deadline=None)
@given(st.lists(st.text("ab \n½🙂", max_size=5), min_size=2, max_size=8))
def test_whatever_is_said_exactly_the_answers_and_their_ends_are_learned(turns):
    talk, tokenizer = chat(*turns), chat_tokenizer(HEADERS)
    text = marked(talk, tokenizer)
    learned = [part.split("⟧")[0] for part in text.split("⟦")[1:]]
    assert learned == [turn.strip() + "<|eot|>" for turn in turns[1::2]]


def test_answers_that_belong_to_the_prompt_are_not_learned():
    for template in (HEADERS, GENERATION):
        text = marked(chat("Hi", "Yes", "No", "Why", first=3), chat_tokenizer(template))
        assert text.count("⟦") == 1
        assert "⟦Why<|" in text


def test_messages_in_a_row_of_one_speaker_and_tools():
    messages = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "five"},
    )
    text = marked(Chat(messages), chat_tokenizer(HEADERS))
    turns = [part.split("⟧")[0] for part in text.split("⟦")[1:]]
    assert turns == ["call<|eot|>", "<|eot|>", "five<|eot|>"]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Q? A:", " 4  4", "<s>Q? A:⟦ 4  4</s>⟧"),
        ("", "all", "<s>⟦all</s>⟧"),
        ("x", "", "<s>x⟦</s>⟧"),
        ("<s>x", "y</s>", "<s>x⟦y</s>⟧"),  # no second BOS or EOS is added
        ("x ", " y", "<s>x⟦  y</s>⟧"),  # the token of two spaces belongs to both
        ("naïve ½", "½ 🙂", "<s>naïve ½⟦½ 🙂</s>⟧"),
    ],
)
def test_a_completion_is_learned_with_its_end_and_its_prompt_is_not(prompt, completion, expected):
    assert marked(Completion(prompt, completion), chat_tokenizer(None)) == expected


@pytest.mark.parametrize("mark_in", ["completion", "prompt"])
def test_a_token_that_composes_a_character_of_the_completion_is_learned(mark_in):
    """Qwen's tokenizers make one "é" of "e" and U+0301."""
    files = chat_tokenizer(None, bos=False).files()
    definition = json.loads(files["tokenizer.json"]) | {"normalizer": {"type": "NFC"}}
    files["tokenizer.json"] = json.dumps(definition).encode()
    tokenizer = Tokenizer(files, where="here")
    if mark_in == "completion":
        assert marked(Completion("be", "\u0301!"), tokenizer) == "b⟦é!</s>⟧"
    else:
        assert marked(Completion("be\u0301", "!"), tokenizer) == "bé⟦!</s>⟧"


def test_a_text_is_learned_whole_with_bos_and_eos_whatever_is_beside_it():
    tokenizer = chat_tokenizer(None)
    documents = [Document(Place(0, 0), content) for content in ("a  b", Completion("c", "d"))]
    batch = [mark(document, tokenizer, None) for document in documents]
    for some in (batch, batch[:1]):
        text = segments(some, tokenizer)[0]
        assert tokenizer.decode(text.tokens) == "<s>a  b</s>"
        assert text.counted.all()


def test_a_token_of_no_character_counts_where_it_stands():
    tokenizer = chat_tokenizer(None)
    ids, places = tokenizer.encode_with_spans(["a  \n🙂"])[0]
    assert [tokenizer.decode([i]) for i in ids[:3]] == ["a", "  ", "\n"]
    assert places.tolist() == [[0, 1], [1, 3], [3, 4], *[[4, 5]] * 4]
    whole = Marked(Document(Place(0, 0), Completion("a", "  \n🙂")), "a  \n🙂", ((1, 5),))
    assert segments([whole], tokenizer)[0].counted.tolist() == [False, False, *[True] * 7]


def test_rules_name_the_template_for_chats_and_nothing_for_texts():
    template = chat_tokenizer(HEADERS).chat_template()
    assert template
    assert marking_rules({"text"}, None) == {}
    assert marking_rules({"text", "completion"}, None).keys() == {"learned"}
    rules = [
        marking_rules({"chat"}, chat_tokenizer(source).chat_template(date=date))
        for source, date in ((HEADERS, None), (TURNS, None), (HEADERS, "2026-01-31"))
    ]
    assert len({str(r) for r in rules}) == 3


def test_a_template_that_asks_for_the_date_gets_one_that_does_not_change():
    with pytest.raises(ValueError, match=r"writes the current date.*corpus\.chat_date"):
        marked(chat("Hi", "Yes"), chat_tokenizer(DATED))
    text = marked(chat("Hi", "Yes"), chat_tokenizer(DATED), date="2026-01-31")
    assert text.startswith("31 Jan 2026<s>")
    with pytest.raises(ValueError, match=r"'31\.1\.' is not a date"):
        chat_tokenizer(DATED).chat_template(date="31.1.")
