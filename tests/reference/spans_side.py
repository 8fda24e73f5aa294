"""Hugging Face transformers renders chats and says what is generated, from and to JSON lines."""

import json
import sys

from transformers.utils.chat_template_utils import render_jinja_template

for line in sys.stdin:
    asked = json.loads(line)
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (text,), (spans,) = render_jinja_template(
        [asked.pop("messages")], return_assistant_tokens_mask=True, **asked, **tokens
    )
    print(json.dumps([text, spans]))
