"""Small chat templates that behave as published ones do, and conversations to render with them.

In a template's source, ⟦ and ⟧ stand round what a model writes itself, the independent answer to
which characters are the assistant's. `plain` leaves the brackets out, `by_hand` makes them
`generation` blocks.
"""

from typing import Any

SPECIAL = (
    *("<s>", "</s>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"),
    *("<turn>", "</turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|return|>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|role|>", "<|/role|>", "<|eos|>", "<|tool|>"),
    *("[INST]", "[/INST]", "[CALLS]", "[TOOLS]", "[/TOOLS]", "[RESULTS]", "[/RESULTS]"),
    *("<|calls|>", "<|/calls|>", "<|call|>", "<|/call|>", "<|observation|>", "<|chatbot|>"),
)

_OPENING = "{%- if add_generation_prompt -%}{{- OPENING -}}{%- endif -%}"
_CALLS = """{%- for call in message.tool_calls or [] -%}
  {%- set call = call.function if call.function else call -%}
  {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' -}}
  {{- (call.arguments if call.arguments is string else call.arguments | tojson) -}}
  {{- '}\\n</tool_call>' -}}
{%- endfor -%}"""
_LAST_QUESTION = """{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' and not message.content.startswith('<tool_response>') -%}
    {%- set ns.last = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}"""
_SPLIT = """{%- set thought = message.reasoning_content or '' -%}
{%- set content = message.content -%}
{%- if '</think>' in content -%}
  {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
  {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}"""


def _chatml(answer: str, *, opening: str = "'<|im_start|>assistant\\n'", before: str = "") -> str:
    """A template in ChatML; `answer` writes an assistant's turn after its header."""
    return (
        before
        + """{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}"""
        + answer
        + """{{- '\\n' -}}
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- else -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}"""
        + _OPENING.replace("OPENING", opening)
    )


_PLAIN_ANSWER = "⟦{{- message.content -}}" + _CALLS + "{{- '<|im_end|>' -}}⟧"
_KEPT_THOUGHT = (
    _SPLIT
    + """{%- if loop.index0 > ns.last -%}
  {%- if thought -%}⟦{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}⟧
  {%- elif loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
⟦{{- content -}}"""
    + _CALLS
    + "{{- '<|im_end|>' -}}⟧"
)
_OPENED_THOUGHT = (
    _SPLIT
    + """{%- if loop.index0 > ns.last -%}
  {{- '<think>\\n' -}}
  {%- if thought -%}⟦{{- thought + '\\n</think>\\n\\n' -}}⟧
  {%- else -%}{{- '\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
⟦{{- content -}}"""
    + _CALLS
    + "{{- '<|im_end|>' -}}⟧"
)

BEHAVIOURS: dict[str, str] = {
    "the same for every turn, a system prompt if there is none": _chatml(
        _PLAIN_ANSWER,
        before="""{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
{%- endif -%}""",
    ),
    "thinking is dropped before the last question, an empty block is added at the end": _chatml(
        _KEPT_THOUGHT, before=_LAST_QUESTION
    ),
    "the prompt holds an empty block unless thinking is asked for": _chatml(
        _KEPT_THOUGHT,
        before=_LAST_QUESTION,
        opening="'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n'",
    ),
    "the prompt opens the thinking, and so do answers": _chatml(
        _OPENED_THOUGHT,
        before=_LAST_QUESTION,
        opening="'<|im_start|>assistant\\n<think>\\n'",
    ),
    "the prompt opens the thinking, but answers have none": """{{- '<s>' -}}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{{- '<|user|>' + message.content -}}
  {%- elif message.role == 'tool' -%}{{- '<|tool|>' + message.content + '<|/call|>' -}}
  {%- elif message.role == 'system' -%}{{- message.content -}}
  {%- else -%}
    {{- '<|assistant|>' -}}⟦{{- message.content.split('</think>')[-1] -}}
    {%- for call in message.tool_calls or [] -%}
      {{- '<|call|>' + call.function.name + '\\n```json\\n' -}}
      {{- call.function.arguments | tojson + '\\n```<|/call|>' -}}
    {%- endfor -%}
    {{- '<|eos|>' -}}⟧
  {%- endif -%}
{%- endfor -%}
"""
    + _OPENING.replace("OPENING", "'<|assistant|><think>\\n'"),
    "the prompt ends the thinking, as answers do": """{{- '<s>' -}}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|assistant|></think>' -}}⟦{{- message.content.split('</think>')[-1] -}}
    {%- for call in message.tool_calls or [] -%}
      {{- '<|calls|>' + call.function.name + call.function.arguments | tojson + '<|/calls|>' -}}
    {%- endfor -%}
    {{- '<|eos|>' -}}⟧
  {%- else -%}{{- '<|user|>' + message.content -}}{%- endif -%}
{%- endfor -%}
"""
    + _OPENING.replace("OPENING", "'<|assistant|><think>'"),
    "headers and trimmed contents, one call instead of a content": """{{- '<|begin|>' -}}
{%- for message in messages -%}
  {%- set role = 'ipython' if message.role == 'tool' else message.role -%}
  {{- '<|head|>' + role + '<|/head|>\\n\\n' -}}
  {%- if message.tool_calls -%}
    {%- if message.tool_calls | length != 1 -%}{{- raise_exception('one call') -}}{%- endif -%}
    {%- set call = message.tool_calls[0].function -%}
    ⟦{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson -}}
    {{- '}<|eot|>' -}}⟧
  {%- elif message.role == 'assistant' -%}⟦{{- message.content | trim + '<|eot|>' -}}⟧
  {%- elif message.role == 'tool' -%}{{- message.content | tojson + '<|eot|>' -}}
  {%- else -%}{{- message.content | trim + '<|eot|>' -}}{%- endif -%}
{%- endfor -%}
"""
    + _OPENING.replace("OPENING", "'<|head|>assistant<|/head|>\\n\\n'"),
    "no generation prompt, tools and the system prompt before the last question": """{{- '<s>' -}}
{%- set ns = namespace(last=0, system='') -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
  {%- if message.role == 'system' -%}{%- set ns.system = message.content + '\\n\\n' -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {%- if loop.index0 == ns.last and tools -%}
      {{- '[TOOLS]' + tools | tojson + '[/TOOLS]' -}}
    {%- endif -%}
    {{- '[INST] ' + (ns.system if loop.index0 == ns.last else '') + message.content -}}
    {{- '[/INST]' -}}
  {%- elif message.role == 'tool' -%}{{- '[RESULTS]' + message.content + '[/RESULTS]' -}}
  {%- elif message.tool_calls -%}
    ⟦{{- '[CALLS]' + message.tool_calls | map(attribute='function') | list | tojson + '</s>' -}}⟧
  {%- elif message.role == 'assistant' -%}⟦{{- ' ' + message.content + '</s>' -}}⟧
  {%- endif -%}
{%- endfor -%}
""",
    "roles take turns, the assistant is the model, the system prompt is the user's": """
{{- '<s>' -}}
{%- set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -%}
{%- for message in (messages[1:] if first else messages) -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles take turns') -}}
  {%- endif -%}
  {{- '<turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
  {%- if message.role == 'assistant' -%}⟦{{- message.content | trim + '</turn>' -}}⟧
  {%- else -%}
    {{- (first if loop.first else '') + message.content | trim + '</turn>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
"""
    + _OPENING.replace("OPENING", "'<turn>model\\n'"),
    "EOS behind the last turn, which has an end of its own": """
{%- for message in messages -%}
  {%- set role = message.role if message.role in ['user', 'assistant', 'system'] else 'user' -%}
  {{- '<|' + role + '|>\\n' -}}
  {%- if message.role == 'assistant' -%}⟦{{- message.content -}}"""
    + _CALLS
    + """{{- '<|end|>' -}}⟧
  {%- else -%}{{- message.content + '<|end|>' -}}{%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- '<|eos|>' -}}{%- endif -%}
""",
    "a line behind each turn but the last": """{{- '<|eos|>' -}}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|assistant|>\\n' -}}⟦{{- message.content -}}"""
    + _CALLS
    + """{{- '<|eos|>' -}}⟧
  {%- else -%}{{- '<|user|>\\n' + message.content -}}{%- endif -%}
  {%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}
  {%- if loop.last and add_generation_prompt -%}{{- '\\n<|assistant|>\\n' -}}{%- endif -%}
{%- endfor -%}
""",
    "no token ends a turn, an empty block precedes every answer": """{{- '<s>' -}}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    """
    + _SPLIT
    + """{{- '<|assistant|>' -}}
    {%- if thought and loop.last -%}⟦{{- '\\n<think>' + thought + '</think>\\n' -}}⟧
    {%- else -%}{{- '\\n<think></think>\\n' -}}{%- endif -%}
    ⟦{{- content.strip() -}}
    {%- for call in message.tool_calls or [] -%}
      {{- '\\n<tool_call>' + call.function.name -}}
      {%- for name, value in call.function.arguments.items() -%}
        {{- '\\n<arg>' + name + '</arg>' -}}
        {{- (value if value is string else value | tojson) -}}
      {%- endfor -%}
      {{- '\\n</tool_call>' -}}
    {%- endfor -%}⟧
  {%- elif message.role == 'tool' -%}
    {{- '<|observation|>\\n' + message.content -}}
  {%- else -%}{{- '<|' + message.role + '|>\\n' + message.content -}}{%- endif -%}
{%- endfor -%}
"""
    + _OPENING.replace("OPENING", "'<|assistant|>'"),
    "channels, and another end for the last turn": """{%- set ns = namespace(call='') -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|start|>assistant' -}}⟦
    {%- if message.reasoning_content and loop.last -%}
      {{- '<|channel|>analysis<|message|>' + message.reasoning_content -}}
      {{- '<|end|><|start|>assistant' -}}
    {%- endif -%}
    {%- if message.tool_calls -%}
      {%- set ns.call = message.tool_calls[0].function.name -%}
      {{- ' to=functions.' + ns.call + '<|channel|>commentary json<|message|>' -}}
      {{- message.tool_calls[0].function.arguments | tojson + '<|call|>' -}}
    {%- elif loop.last and not add_generation_prompt -%}
      {{- '<|channel|>final<|message|>' + message.content + '<|return|>' -}}
    {%- else -%}
      {{- '<|channel|>final<|message|>' + message.content + '<|end|>' -}}
    {%- endif -%}⟧
  {%- elif message.role == 'tool' -%}
    {{- '<|start|>functions.' + ns.call + ' to=assistant<|channel|>commentary<|message|>' -}}
    {{- message.content | tojson + '<|end|>' -}}
  {%- else -%}
    {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' -}}
  {%- endif -%}
{%- endfor -%}
"""
    + _OPENING.replace("OPENING", "'<|start|>assistant'"),
    "answers in a row are one turn": """
{%- for message in messages -%}
  {%- if message.role != 'assistant' -%}
    {{- '<|' + ('user' if message.role == 'tool' else message.role) + '|>\\n' -}}
    {{- message.content + '</s>\\n' -}}
  {%- else -%}
    {%- set more = not loop.first and loop.previtem.role == 'assistant' -%}
    {%- if not more -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
    ⟦{%- if more -%}{{- '\\n' -}}{%- endif -%}
    {{- message.content -}}"""
    + _CALLS
    + """{%- if loop.last or loop.nextitem.role != 'assistant' -%}{{- '</s>' -}}{%- endif -%}⟧
    {%- if loop.last or loop.nextitem.role != 'assistant' -%}{{- '\\n' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
"""
    + _OPENING.replace("OPENING", "'<|assistant|>\\n'"),
    "thinking is cut off earlier answers, which are trimmed": _chatml(
        """⟦{%- if loop.last -%}{{- message.content -}}
{%- else -%}{{- message.content.split('</think>')[-1] | trim -}}{%- endif -%}"""
        + _CALLS
        + "{{- '<|im_end|>' -}}⟧"
    ),
    "calls in a section of their own": """
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|chatbot|>' -}}⟦{{- message.content -}}
    {%- if message.tool_calls -%}
      {{- '<|calls|>' -}}
      {%- for call in message.tool_calls -%}
        {{- '<|call|>' + call.function.name + ':' + loop.index0 | string -}}
        {{- call.function.arguments | tojson + '<|/call|>' -}}
      {%- endfor -%}
      {{- '<|/calls|>' -}}
    {%- endif -%}
    {{- '<|im_end|>' -}}⟧
  {%- else -%}{{- '<|role|>' + message.role + '<|/role|>' + message.content + '<|im_end|>' -}}
  {%- endif -%}
{%- endfor -%}
"""
    + _OPENING.replace("OPENING", "'<|chatbot|>'"),
}


def plain(source: str) -> str:
    """The template as it is published."""
    return source.replace("⟦", "").replace("⟧", "")


def by_hand(source: str) -> str:
    """The template with `generation` blocks round what a model writes."""
    marked = source.replace("⟦", "{%- generation -%}")
    return marked.replace("⟧", "{%- endgeneration -%}")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


def calls(content: str = "", **arguments: Any) -> dict[str, Any]:
    function = {"name": "warm", "arguments": arguments}
    return says(content, tool_calls=[{"type": "function", "function": function}])


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


TOOLS = [{"type": "function", "function": {"name": "warm", "parameters": {"city": "string"}}}]
_SYSTEM = {"role": "system", "content": "SYS Be brief."}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one answer": [user("Q one?"), says("A one.")],
    "two answers": [user("Q one?"), says("A one."), user("Q two?"), says("A two.")],
    "a system prompt": [_SYSTEM, user("Q one?"), says("A one."), user("Q two?"), says("A two.")],
    "the assistant first": [says("A one."), user("Q one?"), says("A two.")],
    "only the assistant": [says("A one.")],
    "a tool": [user("Q warm?"), calls(city="A Graz"), tool("T 21"), says("A 21.")],
    "tools twice": [
        *(user("Q warm?"), calls("A look.", city="A Graz"), tool("T 21"), says("A 21.")),
        *(user("Q and?"), calls(city='A "Linz"\n'), tool('T "5"'), tool("T 6"), says("A five.")),
    ],
    "a call without a text": [user("Q warm?"), calls(), tool("T 21"), says("A 21.")],
    "a call with a number": [user("Q warm?"), calls(n=5), tool("T 21"), says("A 21."), user("Q")],
    "calls that are none": [
        *(user("Q one?"), says("A one.", tool_calls=[])),
        *(user("Q two?"), says("A two.", tool_calls=[])),
    ],
    "names": [user("Q one?"), says("A one.", name="A bot"), user("Q two?"), says("A two.")],
    "space round answers": [
        *(user("  Q one? "), says("\n  A one. \n"), user("Q two?\n"), says(" A\n\n two.\n"))
    ],
    "empty answers": [user("Q one?"), says(""), user("Q two?"), says(""), user("Q three?")],
    "blank answers": [user("Q one?"), says(" \n"), user("Q two?"), says("A two.")],
    "an empty last answer": [user("Q one?"), says("A one."), user("Q two?"), says("")],
    "reasoning": [
        *(user("Q one?"), says("A one.", reasoning_content="A hm")),
        *(user("Q two?"), says("A two.", reasoning_content="A so")),
    ],
    "reasoning before a tool": [
        user("Q warm?"),
        calls("", city="A Graz") | {"reasoning_content": "A look it up"},
        *(tool("T 21"), says("A 21.", reasoning_content="A 21 it is")),
    ],
    "thinking": [
        *(user("Q one?"), says("<think>\nA hm\n</think>\n\nA one.")),
        *(user("Q two?"), says("<think>\nA so\n</think>\n\nA two.")),
    ],
    "answers in a row": [
        *(user("Q one?"), says("A one."), says("A more.")),
        *(user("Q two?"), says("A two."), says("A last.")),
    ],
    "other alphabets": [
        user("Q 🙂 ½?"),
        says("A né🙂"),
        user("Q がé"),
        says("A 한국어 \ue000 \U000f0000"),
    ],
    "words of the template": [
        *(
            user("Q <|im_end|>\n<|im_start|>assistant\nmodel"),
            says("<|im_start|>assistant\nA <|eot|>x"),
        ),
        *(user("Q <|assistant|>"), says("assistant")),
    ],
    "the same again": [
        *(user("Hi"), says("Hi"), user("Hi"), says("Hi"), user("Hi"), says("Hi")),
    ],
    "quotes": [user('Q "a"\\'), says("\"A\\\" 'b'"), user("Q"), says('"\\"')],
    "a long chat": [m for i in range(9) for m in (user(f"Q {i}"), says(f"A {i} " * 3))],
}
