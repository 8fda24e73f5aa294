"""Chat templates: where they are found, what they may do, and what decides their texts."""

import json

import pytest

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.tokenizer import Tokenizer
from tests.making.chats import DATED, GENERATION, HEADERS, chat_tokenizer, said


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, tokens=tokens, where="here")


def with_settings(**changes):
    files = chat_tokenizer(None).files()
    settings = json.loads(files["tokenizer_config.json"]) | changes
    return files | {"tokenizer_config.json": json.dumps(settings).encode()}


def source_of(files):
    found = Tokenizer(files, where="here").chat_template()
    return found and found.render([]).text


def test_a_file_of_its_own_comes_before_the_settings_and_of_several_the_default():
    several = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    assert source_of(with_settings()) is None
    assert source_of(with_settings(chat_template="a")) == "a"
    assert source_of(with_settings(chat_template=several)) == "c"
    assert source_of(with_settings(chat_template=several[:1])) is None
    assert source_of(with_settings(chat_template="a") | {"chat_template.jinja": b"d"}) == "d"


def test_special_tokens_are_there_by_name_however_the_files_spell_them():
    text = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ add_bos_token }}"
    named = {"special_tokens_map.json": b'{"pad_token": "<pad>", "bos_token": "<no>"}'}
    assert source_of(with_settings(chat_template=text) | named) == "<s></s><pad>"


def test_blocks_leave_no_white_space_and_json_is_not_escaped_for_html():
    source = "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n"
    source += "{{ m | tojson }}\n{% endfor %}"
    assert template(source).render(said("<é>", "b")).text == '{"role": "user", "content": "<é>"}\n'


def test_a_template_can_reach_nothing_but_the_messages():
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match=r"refuses these messages: .*unsafe"):
            template(source).render([])


def test_a_template_that_is_no_jinja_is_named_with_its_line():
    with pytest.raises(ValueError, match=r"here: the chat template cannot be read: line 2: "):
        template("a\n{% if %}")


def test_marked_characters_are_those_of_the_text_without_marks():
    found = template(GENERATION)
    assert found.marks_generation
    text, generated = found.render(said("Hi", "Yes 🙂", "No", ""))
    assert [text[start:end] for start, end in generated] == ["Yes 🙂<|im_end|>", "<|im_end|>"]
    assert "\ufdd0" not in text
    assert not template(HEADERS).marks_generation


def test_the_digest_is_of_all_that_decides_texts():
    one = template(HEADERS, bos_token="<s>")
    others = [template(HEADERS, bos_token="<b>"), template(HEADERS), template(DATED)]
    others.append(ChatTemplate(HEADERS, tokens={"bos_token": "<s>"}, date="2026-01-31"))
    assert len({one.digest, *(other.digest for other in others)}) == 5
    assert template(HEADERS, bos_token="<s>").digest == one.digest
