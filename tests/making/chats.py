"""Chat templates of the kinds in use, and a tokenizer with their special tokens."""

import json

import tokenizers

from decant.models.text.tokenizer import Tokenizer

SPECIAL = (
    *("<s>", "</s>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"),
    *("<|im_start|>", "<|im_end|>", "<turn>", "</turn>"),
)

HEADERS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|head|>' + message.role + '<|/head|>\\n\\n' + message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""
"""Puts a header before each message and an end token after it, with nothing between messages."""

TURNS = """{{ bos_token }}
{%- if messages[0].role == 'system' -%}
    {{ raise_exception('there is no system role') }}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('user and assistant take turns') }}
    {%- endif -%}
    {{ '<turn>' + ('model' if message.role == 'assistant' else message.role) }}
{{ message.content | trim + '</turn>' }}
{% endfor -%}
{%- if add_generation_prompt -%}
    {{ '<turn>model\\n' }}
{%- endif -%}
"""
"""Calls the assistant "model", refuses a system role, and ends every turn with a new line."""

THINKING = """{%- set ns = namespace(last=0) %}
{%- for message in messages if message.role == 'user' %}
    {%- set ns.last = messages.index(message) %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set parts = message.content.split('</think>') %}
        {%- set thought = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Keeps the thinking of the last answer and drops that of earlier answers."""

OPENED = THINKING.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
OPENED = OPENED.replace("loop.index0 > ns.last", "false")
"""Opens the thinking in the generation prompt, but renders no answer with thinking."""

MOVING = """{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {%- set front = messages[0].content + '\n\n' if loop.revindex0 < 2 else '' %}
        {{- '<turn>' + front + message.content + '</turn>' }}
    {%- else %}
        {{- message.content + '</s>' }}
    {%- endif %}
{%- endfor %}
"""
"""Puts the system prompt in front of the last question, so it moves as the chat grows."""

GENERATION = """{% for message in messages %}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% else %}
{{ message.content }}<|im_end|>
{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
"""Marks the assistant's words with `generation` blocks."""

FIRST_IS_READ = "{% if messages[0].role == 'system' %}{% endif %}" + HEADERS
DATED = "{{ strftime_now('%d %b %Y') }}" + HEADERS
DATED_OR_NOT = (
    "{{ strftime_now('%d %b %Y') if strftime_now is defined else '1 Jan 2024' }}" + HEADERS
)


def chat_tokenizer(template: str | None, *, bos: bool = True) -> Tokenizer:
    """A tokenizer whose tokens are all bytes, SPECIAL, and two spaces.

    `template` is its chat template; `bos`: whether it adds BOS.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "ĠĠ"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("Ġ", "Ġ")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    # As in most checkpoints: spans of tokens do not include leading spaces.
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens(list(SPECIAL))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "add_bos_token": bos,
    }
    if template:
        settings["chat_template"] = template
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    return Tokenizer(files, where="test")


def dialogue(*turns: str) -> list[dict[str, str]]:
    """Messages whose roles alternate, user first."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": content}
        for number, content in enumerate(turns)
    ]
