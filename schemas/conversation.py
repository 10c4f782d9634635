"""What a conversation says, as a cache keeps it: messages, tools, variables of the chat template.

One JSON text per conversation, in the form of a record of `messages`: whatever reads records reads
it. Its words are the record's, never a template's: no special token of a tokenizer stands in it
that the record itself does not spell out.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from decant.schemas.strict import FormatError

KEYS = ("messages", "tools", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Who says what."""

    messages: Sequence[dict[str, Any]]
    """`role` and `content`, a string, of each; what else a message has, such as `reasoning_content`
    or `tool_calls`: {"type", "function": {"name", "arguments"}} with an object for arguments, or
    the string where it is none. `weight` 0: its tokens are no targets."""
    tools: Sequence[dict[str, Any]] | None = None
    """What the assistant may call, as chat templates take it."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that the record sets for its chat template."""

    def to_text(self) -> str:
        """As JSON, in the order in which it was given; what JSON has no form for, as its text."""
        fields: dict[str, Any] = {"messages": list(self.messages)}
        if self.tools:
            fields["tools"] = list(self.tools)
        if self.chat_template_kwargs:
            fields["chat_template_kwargs"] = self.chat_template_kwargs
        try:
            text = _json(fields)
        except ValueError:  # NaN, infinity
            text = _json(_finite(fields))
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            text = json.dumps(json.loads(text), separators=(",", ":"))
        return text

    @staticmethod
    def of_text(text: str, where: str) -> "Conversation":
        """The inverse of `to_text`. Raises FormatError, naming `where`, if it is something else."""
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise FormatError(f"{where}: messages are no JSON: {error}") from error
        if not isinstance(fields, dict) or not {"messages"} <= fields.keys() <= {*KEYS}:
            raise FormatError(
                f"{where}: messages are {text[:60]!r}: expected an object of {', '.join(KEYS)}"
            )
        messages, tools = fields["messages"], fields.get("tools")
        if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
            raise FormatError(
                f"{where}: messages hold {json.dumps(messages)[:60]}: expected a list of objects "
                "with a role and a content, both strings"
            )
        if tools is not None and not (
            isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        ):
            raise FormatError(f"{where}: tools are {json.dumps(tools)[:60]}: expected objects")
        variables = fields.get("chat_template_kwargs", {})
        if not isinstance(variables, dict):
            raise FormatError(
                f"{where}: chat_template_kwargs is {json.dumps(variables)[:60]}: expected an object"
            )
        return Conversation(messages=messages, tools=tools, chat_template_kwargs=variables)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _json(fields: Any) -> str:
    return json.dumps(
        fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str
    )


def _finite(value: Any) -> Any:
    """The same with null for what is no number."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
