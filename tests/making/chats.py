"""Chat templates in the shapes that are in use, and a tokenizer that has their special tokens."""

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
"""A header before each message, an end after it, nothing between."""

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
"""The assistant has another name, a system role is refused, a line ends every turn."""

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
"""The last answer has its thinking before it; earlier answers have lost theirs."""

OPENED = THINKING.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
OPENED = OPENED.replace("loop.index0 > ns.last", "false")
"""The prompt opens the thinking that no rendered answer has."""

MOVING = """{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {%- set front = messages[0].content + '\n\n' if loop.revindex0 < 2 else '' %}
        {{- '<turn>' + front + message.content + '</turn>' }}
    {%- else %}
        {{- message.content + '</s>' }}
    {%- endif %}
{%- endfor %}
"""
"""The system prompt stands in front of the last question, wherever that is."""

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
"""Says itself what the assistant writes."""

FIRST_IS_READ = "{% if messages[0].role == 'system' %}{% endif %}" + HEADERS
DATED = "{{ strftime_now('%d %b %Y') }}" + HEADERS
DATED_OR_NOT = (
    "{{ strftime_now('%d %b %Y') if strftime_now is defined else '1 Jan 2024' }}" + HEADERS
)


def chat_tokenizer(template: str | None, *, bos: bool = True) -> Tokenizer:
    """Every byte is a token, and so is each of SPECIAL, and two spaces."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "ĠĠ"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("Ġ", "Ġ")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    # As most checkpoints have it: spaces are no part of where a token is said to stand.
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


def said(*turns: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turns."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": content}
        for number, content in enumerate(turns)
    ]
