"""Conversations, what becomes of them, and templates to try."""

from typing import Any

import numpy as np

from decant.teacher_dump.inputs.chats import Chats
from decant.teacher_dump.inputs.records import Record, Unrenderable
from tests.support.templates import tokenizer_with

HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = (
    "{% for m in messages %}" + HEADER + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
ASKED = {"role": "user", "content": "hello"}
ANSWERED = {"role": "assistant", "content": "there"}
CHAT = [
    ASKED,
    ANSWERED,
    {"role": "user", "content": "what is"},
    {"role": "assistant", "content": "four"},
]
END = "<|im_end|>\n"


def record(messages: Any, **fields: Any) -> Record:
    """Make a record of messages."""
    return Record("x", {"messages": messages, **fields}, "data.jsonl line 3")


def chats(template: Any, **options: Any) -> Chats:
    """Make what encodes conversations with this template."""
    given = {"targets": "response", "chat_template_kwargs": {}, "chat_date": ""} | options
    return Chats(tokenizer_with(template), **given)


def encoded(
    template: Any, messages: Any, fields: dict[str, Any] | None = None, **options: Any
) -> tuple[str, str]:
    """Return the text of a conversation and that of its targets; raise why there is none."""
    encoder = chats(template, **options)
    [found] = encoder.encode([record(messages, **(fields or {}))])
    if isinstance(found, Unrenderable):
        raise found
    ids, mask = found
    assert ids.dtype == np.int64 and mask.dtype == bool
    return encoder.tokenizer.decode(ids), encoder.tokenizer.decode(ids[mask])


def targets(template: Any, messages: Any, fields: Any = None, **options: Any) -> str:
    """Return the text of the targets."""
    return encoded(template, messages, fields, **options)[1]


def calling(arguments: Any, **message: Any) -> list[dict[str, Any]]:
    """Make a conversation that calls a tool."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return [ASKED, {"role": "assistant", "content": "", "tool_calls": [call], **message}]


def tool_template(written: str, condition: str = "m.tool_calls") -> str:
    """Make a template that writes calls so."""
    body = "{% if " + condition + " %}{% for c in m.tool_calls %}{{ c.function.name + ' ' + "
    return CHATML.replace(
        "{{ m.content", body + written + " }}{% endfor %}{% endif %}{{ (m.content or '')"
    )
