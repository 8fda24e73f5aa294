"""Which characters the assistant wrote, for templates of every behaviour and all kinds of chats."""

import functools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.models.text.chat_template import ChatTemplate
from decant.pipelines.rows.assistant_spans import assistant_spans
from decant.pipelines.rows.documents import Chat
from tests.making.chat_behaviours import (
    BEHAVIOURS,
    CONVERSATIONS,
    SPECIAL,
    TOOLS,
    by_hand,
    plain,
    says,
    user,
)
from tests.making.chats import HEADERS


@functools.cache
def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, tokens={"bos_token": "<s>", "eos_token": "</s>"}, where="here")


def learned(chat: Chat, chat_template: ChatTemplate) -> str:
    """The chat's text; what is learned from stands in ⟦brackets⟧."""
    text, spans = assistant_spans(chat, chat_template, special=SPECIAL)
    for start, end in reversed(spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


def chats(name: str) -> list[Chat]:
    """The conversation, with and without tools, and with all but its last answer as a prompt."""
    messages = tuple(CONVERSATIONS[name])
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return [Chat(messages), Chat(messages, TOOLS), Chat(messages[: last + 1], TOOLS, last)]


def refused(chat: Chat, chat_template: ChatTemplate) -> bool:
    try:
        chat_template.render(chat.messages, tools=chat.tools)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_learned_characters_are_those_that_a_hand_marks(behaviour):
    source = BEHAVIOURS[behaviour]
    published, marks = template(plain(source)), template(by_hand(source))
    compared = 0
    for name in CONVERSATIONS:
        for chat in chats(name):
            if not refused(chat, marks):
                text = learned(chat, published)
                assert text == learned(chat, marks), name
                said = "".join(re.findall("⟦(.*?)⟧", text, re.DOTALL))
                assert not re.search(r"Q |T \d|SYS", said), name
                compared += 1
    assert compared > 25


BEHAVIOUR = st.sampled_from([*BEHAVIOURS])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text('a \n"🙂<>', max_size=4), min_size=2, max_size=6),
    st.sampled_from([*BEHAVIOURS]),
)
def test_whatever_is_said_the_learned_characters_are_those_that_a_hand_marks(turns, behaviour):
    messages = [says(turn) if i % 2 else user(turn) for i, turn in enumerate(turns)]
    published, marks = plain(BEHAVIOURS[behaviour]), by_hand(BEHAVIOURS[behaviour])
    chat = Chat(tuple(messages))
    assert learned(chat, template(published)) == learned(chat, template(marks))


SHOUTING = """{%- for message in messages -%}
  {{- '<|' + message.role + '|>' -}}
  {%- if message.role == 'assistant' and not loop.last -%}
    ⟦{{- message.content | upper + '<|end|>' -}}⟧
  {%- else -%}⟦{{- message.content + '<|end|>' -}}⟧{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


def test_where_letters_change_the_message_is_named_and_both_remedies_help():
    messages = tuple(CONVERSATIONS["two answers"])
    with pytest.raises(ValueError, match=r"message 2: .*let its record end with it.*generation"):
        learned(Chat(messages), template(plain(SHOUTING)))
    # Each answer as the end of a record of its own:
    assert learned(Chat(messages[:2]), template(plain(SHOUTING))).endswith("⟦A one.<|end|>⟧")
    assert learned(Chat(messages, None, 2), template(plain(SHOUTING))).count("⟦") == 1
    # A copy of the template that marks what is written:
    assert "⟦A ONE.<|end|>⟧" in learned(Chat(messages), template(by_hand(SHOUTING)))


def test_a_turn_that_the_template_leaves_out_is_not_learned_and_nothing_else_is():
    source = HEADERS.replace("in messages", "in messages if message.content")
    chat = Chat((user("Q"), says(""), user("Q"), says("A.")))
    assert learned(chat, template(source)).count("⟦") == 1
    assert "⟦" not in learned(Chat(chat.messages[:2]), template(source))
    silent = HEADERS.replace("in messages", "in messages if message.role == 'user'")
    with pytest.raises(ValueError, match="writes nothing of what the assistant says"):
        learned(chat, template(silent))


def test_generation_blocks_twice_in_a_turn_or_once_over_two_are_joined():
    twice = """{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content }}{% endgeneration %}|{% generation %}</>{% endgeneration %}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""
    over = """{{ messages[0].content }}{% generation %}{% for m in messages[1:] %}
{{- '<' + m.content + '>' }}{% endfor %}{% endgeneration %}"""
    nested = """{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}d"""
    chat = Chat((user("Q"), says("A"), user("Q"), says("B")))
    assert learned(chat, template(twice)) == (
        "<user>Q<assistant>⟦A⟧|⟦</>⟧<user>Q<assistant>⟦B⟧|⟦</>⟧"
    )
    assert learned(chat._replace(first=2), template(twice)).count("⟦") == 2
    pair = (user("Q"), says("A"), says("B"))
    assert learned(Chat(pair), template(over)) == "Q⟦<A><B>⟧"
    assert learned(Chat(pair, None, 2), template(over)) == "Q<A>⟦<B>⟧"
    assert learned(Chat(pair), template(nested)) == "⟦abc⟧d"
