"""Chat templates: which file holds them, what they may do, and what decides their texts."""

import json

import pytest

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.tokenizer import Tokenizer
from tests.making.chats import DATED, GENERATION, HEADERS, chat_tokenizer, dialogue


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, tokens=tokens, where="here")


def with_settings(**changes):
    files = chat_tokenizer(None).files()
    settings = json.loads(files["tokenizer_config.json"]) | changes
    return files | {"tokenizer_config.json": json.dumps(settings).encode()}


def rendered(files):
    """The text of an empty chat; None if the files have no template."""
    template = Tokenizer(files, where="here").chat_template()
    return template and template.render([]).text


def test_a_template_file_precedes_the_settings_and_named_templates_need_a_default():
    several = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    assert rendered(with_settings()) is None
    assert rendered(with_settings(chat_template="a")) == "a"
    assert rendered(with_settings(chat_template=several)) == "c"
    assert rendered(with_settings(chat_template=several[:1])) is None
    assert rendered(with_settings(chat_template="a") | {"chat_template.jinja": b"d"}) == "d"


TOOLS = [{"type": "function", "function": {"name": "warm"}}]


@pytest.mark.parametrize(
    "chat_template",
    [
        [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}],
        {"tool_use": "b", "default": "c"},
    ],
)
def test_a_chat_with_tools_is_rendered_by_the_template_for_tools(chat_template):
    named = Tokenizer(with_settings(chat_template=chat_template), where="here").chat_template()
    assert named
    assert named.render([], tools=TOOLS).text == "b"
    assert named.render([]).text == "c"
    alone = Tokenizer(with_settings(chat_template="c"), where="here").chat_template()
    assert alone
    assert alone.render([], tools=TOOLS).text == "c"
    assert alone.digest != named.digest


def test_templates_in_a_directory_of_their_own_are_read_and_written(tmp_path):
    files = with_settings(chat_template="a")
    files["additional_chat_templates/tool_use.jinja"] = b"t"
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "additional_chat_templates" / "notes.txt").write_text("no template")
    tokenizer = Tokenizer.from_files(tmp_path)
    assert tokenizer.files() == files
    template = tokenizer.chat_template()
    assert template
    assert (template.render([]).text, template.render([], tools=TOOLS).text) == ("a", "t")


def test_a_template_that_is_no_text_is_named():
    for wrong in (5, [5], [{"name": "default"}], {"default": 5}):
        with pytest.raises(ValueError, match="here: chat_template is neither"):
            Tokenizer(with_settings(chat_template=wrong), where="here").chat_template()
    with pytest.raises(ValueError, match=r"here: chat_template\.jinja: not UTF-8"):
        Tokenizer(with_settings() | {"chat_template.jinja": b"\xff"}, where="here").chat_template()


def test_templates_see_special_tokens_by_name_in_every_spelling_of_the_files():
    text = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ add_bos_token }}"
    named = {"special_tokens_map.json": b'{"pad_token": "<pad>", "bos_token": "<no>"}'}
    assert rendered(with_settings(chat_template=text) | named) == "<s></s><pad>"


def test_blocks_leave_no_white_space_and_json_is_not_escaped_for_html():
    source = "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n"
    source += "{{ m | tojson }}\n{% endfor %}"
    assert (
        template(source).render(dialogue("<é>", "b")).text == '{"role": "user", "content": "<é>"}\n'
    )


def test_a_template_can_reach_nothing_but_the_messages():
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match=r"refuses these messages: .*unsafe"):
            template(source).render([])


def test_a_template_with_wrong_syntax_is_named_with_its_line():
    with pytest.raises(ValueError, match=r"here: the chat template cannot be read: line 2: "):
        template("a\n{% if %}")


def test_generated_spans_index_the_text_without_marks():
    marking = template(GENERATION)
    assert marking.marks_generation
    text, generated = marking.render(dialogue("Hi", "Yes 🙂", "No", ""))
    assert [text[start:end] for start, end in generated] == ["Yes 🙂<|im_end|>", "<|im_end|>"]
    assert "\ufdd0" not in text
    assert not template(HEADERS).marks_generation


def test_variables_are_json_or_words_and_decide_the_digest():
    text = "{{ slow }} {{ mode }} {{ n[1] }} {{ bos_token }}"
    tokenizer = Tokenizer(with_settings(chat_template=text), where="here")
    asked = ("slow=false", "mode=low", "n=[1, 2]")
    made = tokenizer.chat_template(variables=asked)
    assert made
    assert made.render([]).text == "False low 2 <s>"
    digests = {tokenizer.chat_template(variables=v).digest for v in ((), asked, asked[:1])}
    assert len(digests) == 3
    for wrong in ("slow", "=1", "messages=[]", "a b=1"):
        with pytest.raises(ValueError, match=r"chat_variables: .* is not name=value"):
            tokenizer.chat_template(variables=(wrong,))


def test_a_template_of_ones_own_takes_the_place_of_all_others():
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    files = with_settings(chat_template=named) | {"additional_chat_templates/tool_use.jinja": b"t"}
    theirs = Tokenizer(files, where="here")
    ours = theirs.with_chat_template("own")
    template = ours.chat_template()
    assert template
    assert template.render([], tools=TOOLS).text == template.render([]).text == "own"
    assert ours.digest == theirs.digest
    assert [n for n in ours.files() if "templ" in n] == ["chat_template.jinja"]


def test_the_digest_covers_template_tokens_and_date():
    one = template(HEADERS, bos_token="<s>")
    others = [template(HEADERS, bos_token="<b>"), template(HEADERS), template(DATED)]
    others.append(ChatTemplate(HEADERS, tokens={"bos_token": "<s>"}, date="2026-01-31"))
    assert len({one.digest, *(other.digest for other in others)}) == 5
    assert template(HEADERS, bos_token="<s>").digest == one.digest
