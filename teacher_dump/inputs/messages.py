"""Conversations as people write them, in one shape: what is said, and which of it is not a target.

Owns the fields of messages and tools: parts joined, nulls of Arrow left out, JSON strings decoded,
tool calls alike, `weight: 0` read. Knows nothing of chat templates.
"""

import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any

from decant.schemas import Conversation as Kept
from decant.teacher_dump.inputs.records import Record, SourceError, Unrenderable

Message = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Where records and templates keep what the assistant thinks before it answers."""

TARGET_FIELDS = ("weight", "loss", "train", "training")
"""With 0 or false: this message is not a target."""

MASK_LIKE = re.compile(r"mask|loss|weight|train", re.IGNORECASE)

TEXT_PARTS = (None, "text", "input_text", "output_text")

TEMPLATE_ARGUMENTS = frozenset(
    (
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    )
)
"""What `chat_template_kwargs` may not set: it decides how, not what a template renders."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a record says, whoever wrote it."""

    record: Record
    messages: list[Message]
    """Role and content (a string) each; tool calls as {"type", "function": {"name", "arguments"}}
    with an object for arguments, or the string where it is none."""
    tools: list[Any] | None
    variables: dict[str, Any]
    """`chat_template_kwargs` of the record."""
    spoken: dict[tuple[int, int], str]
    """Arguments that came as a JSON string, word for word, by message and call."""
    excluded: frozenset[int]
    """Messages that say themselves that they are no targets."""

    @property
    def where(self) -> str:
        """For error messages."""
        return self.record.where

    def kept(self) -> Kept:
        """What a cache keeps of it: what a record would say to be read as this conversation."""
        return Kept(
            messages=[
                {**message, "weight": 0} if index in self.excluded else message
                for index, message in enumerate(self.messages)
            ],
            tools=self.tools,
            chat_template_kwargs=self.variables,
        )


def is_answer(message: Message) -> bool:
    """Whether the assistant says it."""
    return bool(message["role"] == "assistant")


def reasoning_of(message: Message) -> list[str]:
    """What the assistant thinks in fields of its own, each text once."""
    found = (message.get(name) for name in REASONING_FIELDS)
    return list(dict.fromkeys(text for text in found if isinstance(text, str) and text.strip()))


def read_conversation(record: Record) -> Conversation:
    """The conversation of a record with messages.

    Raises SourceError if messages, tools or chat_template_kwargs have another form, and
    Unrenderable if this conversation holds what text cannot.
    """
    messages = _decoded(record, "messages")
    if not (isinstance(messages, list) and messages) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise SourceError(
            f"{record.where}: messages is {messages!r:.60}: expected a non-empty list of objects"
            " with a role"
        )
    spoken: dict[tuple[int, int], str] = {}
    excluded = frozenset(
        index for index, message in enumerate(messages) if not _is_target(record, index, message)
    )
    return Conversation(
        record,
        [_message(record, index, message, spoken) for index, message in enumerate(messages)],
        _tools(record),
        _variables(record),
        spoken,
        excluded,
    )


def check_variables(variables: dict[str, Any], where: str) -> None:
    """Raise SourceError for variables of a chat template that are no variables of a template."""
    if taken := sorted(TEMPLATE_ARGUMENTS.intersection(variables)):
        raise SourceError(
            f"{where}: chat_template_kwargs sets {taken}, which no template may decide: drop them"
        )


def _decoded(record: Record, name: str) -> Any:
    """The field, decoded where it is a JSON string."""
    value = record.fields.get(name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise SourceError(
            f"{record.where}: {name} is the string {value!r:.60}, which is no JSON: {error};"
            f" give {name} as a list, or as its JSON"
        ) from error


def _tools(record: Record) -> list[Any] | None:
    tools = _decoded(record, "tools")
    if tools is not None and not isinstance(tools, list):
        raise SourceError(f"{record.where}: tools is {tools!r:.60}: expected a list of objects")
    decoded = []
    for tool in tools or []:
        found = tool
        if isinstance(tool, str):
            with contextlib.suppress(ValueError):
                found = json.loads(tool)
        if not isinstance(found, dict):
            raise SourceError(f"{record.where}: tools holds {tool!r:.60}: expected objects")
        decoded.append(_without_nulls(found))
    return decoded or None


def _variables(record: Record) -> dict[str, Any]:
    variables = _decoded(record, "chat_template_kwargs")
    if variables is None:
        return {}
    if not isinstance(variables, dict):
        raise SourceError(
            f"{record.where}: chat_template_kwargs is {variables!r:.60}: expected an object"
        )
    check_variables(variables, record.where)
    kept: dict[str, Any] = _without_nulls(variables)
    return kept


def _is_target(record: Record, index: int, message: Message) -> bool:
    """What the message says of itself; True if it says nothing."""
    said: dict[str, bool] = {}
    for name, value in message.items():
        if value is None or not MASK_LIKE.search(name):
            continue
        if name not in TARGET_FIELDS or value not in (0, 1):
            raise SourceError(
                f"{record.where}: message {index + 1} has {name!r}: {value!r:.40}: expected 0 or 1"
                f" (or false, true) in one of {TARGET_FIELDS}; rename or drop what is not a mask"
            )
        said[name] = bool(value)
    if len(set(said.values())) > 1:
        raise SourceError(
            f"{record.where}: message {index + 1} contradicts itself, is it a target or not: {said}"
        )
    if any(said.values()) and not is_answer(message):
        raise SourceError(
            f"{record.where}: message {index + 1} of the {message['role']} has {said}, but only"
            " answers of the assistant are targets: drop it, or set targets: all"
        )
    return all(said.values())


def _message(
    record: Record, index: int, message: Message, spoken: dict[tuple[int, int], str]
) -> Message:
    """The message without nulls, which Arrow adds where messages are not alike."""
    kept = {
        name: _without_nulls(value)
        for name, value in message.items()
        if value is not None and name not in (*TARGET_FIELDS, "content", "tool_calls")
    }
    content = _content(record, index, message)
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except ValueError as error:
            raise Unrenderable(
                f"{record.where}: tool_calls of message {index + 1} is a string but no JSON:"
                f" {error}"
            ) from error
    if calls is not None and not isinstance(calls, list):
        raise Unrenderable(
            f"{record.where}: tool_calls of message {index + 1} is {calls!r:.60}: expected a list"
        )
    made = {"role": kept.pop("role"), "content": content, **kept}
    if calls:
        made["tool_calls"] = [
            _call(record, (index, number), call, spoken) for number, call in enumerate(calls)
        ]
    return made


def _content(record: Record, index: int, message: Message) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict) and message["role"] == "tool":
        return json.dumps(_without_nulls(content), ensure_ascii=False)
    if not isinstance(content, list):
        raise Unrenderable(
            f"{record.where}: content of message {index + 1} is {content!r:.60}: expected a string"
            " or a list of text parts"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and text is None:
            text = ""
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise Unrenderable(
                f"{record.where}: message {index + 1} holds a part of type"
                f" {kind or type(part).__name__!r}: expected text alone; remove what is not text,"
                " or the record"
            )
        texts.append(text)
    return "".join(texts)


def _call(
    record: Record, place: tuple[int, int], call: Any, spoken: dict[tuple[int, int], str]
) -> dict[str, Any]:
    """{"type", "function": {"name", "arguments"}} and what else it has, e.g. an id."""
    if isinstance(call, dict):
        call = {name: value for name, value in call.items() if value is not None}
        if "function" not in call:  # the call without its wrapping
            wrapped = {name: call.pop(name) for name in ("name", "arguments") if name in call}
            call["function"] = wrapped
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unrenderable(
            f"{record.where}: tool_calls of message {place[0] + 1} holds {call!r:.60}: expected"
            ' {"type": "function", "function": {"name", "arguments"}}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        spoken[place] = arguments
        try:
            decoded = json.loads(arguments or "{}")
        except ValueError:
            decoded = None
        arguments = decoded if isinstance(decoded, dict) else arguments
    else:
        arguments = _without_nulls({} if arguments is None else arguments)
        if not isinstance(arguments, dict):
            raise Unrenderable(
                f"{record.where}: a tool call of message {place[0] + 1} has the arguments"
                f" {arguments!r:.60}: expected an object, or its JSON"
            )
    others = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", **call, "function": {**others, "arguments": arguments}}


def _without_nulls(value: Any) -> Any:
    """The same without fields that are null, at every depth; nulls in lists stay."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
