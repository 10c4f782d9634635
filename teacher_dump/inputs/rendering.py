"""What a chat template makes of a conversation, and which characters of it are the assistant's.

An answer is what the template adds for it to the messages before and the prompt for it: its words,
and the end of turn that the template renders for it. Where that cannot be seen from renderings of
the first messages (templates that render a message otherwise once others follow), the origins of
the characters say it. A text in which words of the record are missing is refused.
"""

import json
import re
from dataclasses import dataclass

from decant.teacher_dump.inputs.marking import Marked
from decant.teacher_dump.inputs.messages import Conversation, Message, is_answer, reasoning_of
from decant.teacher_dump.inputs.offsets import Span
from decant.teacher_dump.inputs.records import Unrenderable
from decant.teacher_dump.inputs.templates import ChatTemplate

THINK_TAGS = re.compile(r"(</?think>)")

CONTENT_WAYS_OUT = (
    "change the record, name another template in sequences.chat_template, or set"
    " sequences.accept_rendering: true if it is meant so"
)

SPAN_WAYS_OUT = (
    "name a chat template with {% generation %} around the assistant's words in"
    " sequences.chat_template, give prompt + response records, or set targets: all"
)

Answers = dict[int, list[Span]]
"""Of each answer, by the index of its message: where it stands."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the text that is read."""

    text: str
    spans: list[Span]
    """What is to be learned of it; with targets: all, what is not."""


def render(
    template: ChatTemplate, conversation: Conversation, *, targets: str, accept: bool
) -> Rendered:
    """The whole conversation. Raises Unrenderable; `accept`: whatever is missing in the text."""
    located: Answers = {}
    if targets != "all" and template.has_blocks(conversation):
        text, spans = _blocks(template, conversation)
    else:
        text = template.text(conversation)
        if targets != "all" or _excluded_answers(conversation):
            located = _answers(template, conversation, text)
        spans = [
            span
            for index, found in located.items()
            if (index in conversation.excluded) == (targets == "all")
            for span in found
        ]
    if not accept:
        check_contents(conversation, text, located)
        _check_tools(template, conversation, text)
    return Rendered(text, spans)


def render_prompt(template: ChatTemplate, conversation: Conversation, *, accept: bool) -> str:
    """The conversation up to where the assistant is to speak. Raises Unrenderable.

    What the assistant thought before earlier answers may be left out, as chats do.
    """
    text = template.text(conversation, prompt=True)
    if not accept:
        check_contents(conversation, text, {}, reasoning=False)
        _check_tools(template, conversation, text)
    return text


def check_contents(
    conversation: Conversation, text: str, answers: Answers, *, reasoning: bool = True
) -> None:
    """Raise Unrenderable unless the text holds the content of every message, in order.

    Spaces at the edges of a content, and beside <think> and </think>, may be others: many templates
    trim. System messages may stand anywhere. An answer must stand where `answers` says.
    """
    place = 0
    for index, message in enumerate(conversation.messages):
        spans = answers.get(index)
        start = max(place, spans[0][0]) if spans else place
        end = spans[-1][1] if spans else len(text)
        if message["role"] in ("system", "developer"):
            found = 0 if _find(message, message["content"], text, 0, len(text)) >= 0 else -1
        else:
            content = message["content"]
            if not reasoning and is_answer(message):
                content = content.split("</think>")[-1]
            found = _find(message, content, text, start, end)
            if found < 0:  # the prompt for it may hold its beginning, <think>
                found = _find(message, content, text, place, end)
        if found < 0:
            _refuse(conversation, index, "content", message["content"])
        thoughts = reasoning_of(message) if reasoning and is_answer(message) else []
        for what, words in (
            *(("reasoning", thought) for thought in thoughts),
            *(("tool calls", called) for called in _called(message)),
        ):
            if _find(message, words, text, place, end) < 0:
                _refuse(conversation, index, what, words)
        place = max(place, found)


def _check_tools(template: ChatTemplate, conversation: Conversation, text: str) -> None:
    """Raise Unrenderable if the template leaves the tools out."""
    for tool in conversation.tools or []:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and not (name in text and template.renders_tools(conversation)):
            raise Unrenderable(
                f"{conversation.where}: the chat template renders nothing of the tool {name!r};"
                f" {CONTENT_WAYS_OUT}"
            )


def _refuse(conversation: Conversation, index: int, what: str, words: str) -> None:
    role = conversation.messages[index]["role"]
    raise Unrenderable(
        f"{conversation.where}: the chat template leaves out the {what} {words.strip()!r:.60} of"
        f" message {index + 1} of {len(conversation.messages)} ({role}), changes it, or renders it"
        f" out of order; {CONTENT_WAYS_OUT}"
    )


def _find(message: Message, words: str, text: str, start: int, end: int) -> int:
    """Where the words end between start and end of the text, -1 if they are not there."""
    words = words.strip()
    found = text.find(words, start, end)
    if found >= 0:
        return found + len(words)
    if message["role"] == "tool" or "tool_calls" in message:  # templates may write them as JSON
        for written in _spellings(words):
            found = text.find(written, start, end)
            if found >= 0:
                return found + len(written)
    pieces = [piece.strip() for piece in THINK_TAGS.split(words)]
    if len(pieces) == 1:
        return -1
    for piece in pieces:
        found = text.find(piece, start, end)
        if found < 0:
            return -1
        start = found + len(piece)
    return start


def _spellings(words: str) -> list[str]:
    """The words as JSON and as Python write them in a string."""
    quoted = [json.dumps(words, ensure_ascii=False), json.dumps(words), repr(words)]
    return [spelling[1:-1] for spelling in quoted]


def _called(message: Message) -> list[str]:
    """Names, keys and strings of the tool calls of a message."""
    found = []
    for call in message.get("tool_calls", []):
        found.append(call["function"]["name"])
        pending = [call["function"]["arguments"]]
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                found += value.keys()
                pending += value.values()
            elif isinstance(value, list):
                pending += value
            elif isinstance(value, str):
                found.append(value)
    return found


def _excluded_answers(conversation: Conversation) -> bool:
    """Whether some answers are no targets. Raises Unrenderable if other messages say so."""
    if others := [i + 1 for i in conversation.excluded if not is_answer(conversation.messages[i])]:
        raise Unrenderable(
            f"{conversation.where}: targets: all scores every message, but messages {others}"
            " say they are no targets and are no answers: drop that, or set targets: response"
        )
    return bool(conversation.excluded)


def _blocks(template: ChatTemplate, conversation: Conversation) -> tuple[str, list[Span]]:
    """The text, and what its generation blocks cover, but for messages that are no targets."""
    marked = template.marked(conversation, template.shaped(conversation))
    if marked is None:
        template.text(conversation)  # raises what the template raises
        raise Unrenderable(
            f"{conversation.where}: the {{% generation %}} blocks of the chat template cannot be"
            " followed into what it renders: put them around plain output, or set targets: all"
        )
    spans = []
    for message, (start, end) in marked.blocks:
        if message is None:  # after the messages: an end of text that belongs to the last one
            message = max((i for i, run in marked.runs if run[1] <= start), default=None)
        if message not in conversation.excluded:
            spans.append((start, end))
    return marked.text, spans


def _answers(template: ChatTemplate, conversation: Conversation, text: str) -> Answers:
    """Where each answer stands. Raises Unrenderable if that is unknown."""
    trace = _Trace(template, conversation, text)
    located: Answers = {}
    for index, message in enumerate(conversation.messages):
        if not is_answer(message):
            continue
        is_last = index + 1 == len(conversation.messages)
        start = _common_start(template, conversation, text, index, prompt=True)
        end = (
            len(text)
            if is_last
            else _common_start(template, conversation, text, index + 1, prompt=False)
        )
        if start is None or end is None or start > end:
            located[index] = trace.spans(index, start, end)
        else:
            located[index] = [(start, end)]
    return located


def _common_start(
    template: ChatTemplate, conversation: Conversation, text: str, length: int, *, prompt: bool
) -> int | None:
    """How long the rendering of the first messages is, None if the text does not start with it."""
    if not length:
        return None
    try:
        first = template.text(conversation, length, prompt=prompt)
    except Unrenderable:
        return None
    return len(first) if text.startswith(first) else None


class _Trace:
    """Finds answers by the origins of characters; renders only when it is asked."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, text: str) -> None:
        self._template = template
        self._conversation = conversation
        self._text = text
        self._whole: Marked | None = None
        self._replaced: Marked | None = None
        self._words: dict[int, str] = {}

    def spans(self, index: int, start: int | None, end: int | None) -> list[Span]:
        """Where an answer stands of which at most one end is known."""
        self._render(index)
        assert self._whole is not None
        runs = self._whole.runs_of(index)
        if not runs:
            raise self._unknown(index, "it cannot be traced in what the template renders")
        self._check_alone(index)
        if start is None or (end is not None and start > end):
            start = runs[0][0] + self._header(index, runs[0])
        if index + 1 == len(self._conversation.messages):
            runs[-1] = (runs[-1][0], len(self._text))  # with an end of text after the messages
        elif end is not None:
            runs = [(first, min(last, end)) for first, last in runs]
        return [(max(first, start), last) for first, last in runs if last > max(first, start)]

    def _render(self, index: int) -> None:
        """Render with origins, and once more with a private word in place of each content."""
        if self._whole is not None:
            return
        shaped = self._template.shaped(self._conversation)
        self._whole = self._template.marked(self._conversation, shaped)
        messages = self._conversation.messages
        self._words = {number: f"\ue000{number}\ue001" for number in range(len(messages))}
        contents = {n: _replaced(messages[n]["content"], word) for n, word in self._words.items()}
        replaced = self._template.shaped(self._conversation, contents)
        self._replaced = self._template.marked(self._conversation, replaced)
        if self._whole is None or self._whole.text != self._text or self._replaced is None:
            self._whole = None
            raise self._unknown(index, "what it renders cannot be traced to the messages")

    def _check_alone(self, index: int) -> None:
        """Raise Unrenderable if the words of other messages come with the answer."""
        assert self._replaced is not None
        for first, last in self._replaced.runs_of(index):
            for other, word in self._words.items():
                if other != index and word in self._replaced.text[first:last]:
                    raise self._unknown(index, "it renders other messages along with it")

    def _header(self, index: int, run: Span) -> int:
        """How much of the characters of an answer is the prompt for it, not the answer.

        All up to the end of the prompt. Where the answer does not have all of it (the prompt opens
        a <think> that the answer lacks), as much as it has before the words of the answer; with
        less than half of it, all before the words.
        """
        assert self._replaced is not None
        prompt = self._prompt(index)
        runs = self._replaced.runs_of(index)
        replaced = self._replaced.text[slice(*runs[0])] if runs else ""
        said = replaced.find(self._words[index])
        before = replaced[:said] if said >= 0 else replaced
        rendered = self._text[slice(*run)]
        if rendered.startswith(prompt):
            return len(prompt)
        for length in range(len(prompt), len(prompt) // 2, -1):
            place = before.rfind(prompt[:length])
            if place >= 0:
                header = before[: place + length]
                break
        else:
            if said < 0:
                raise self._unknown(index, "it begins otherwise than the prompt for it")
            header = before
        if not rendered.startswith(header):
            raise self._unknown(index, "its beginning depends on its words")
        return len(header)

    def _prompt(self, index: int) -> str:
        """What the template adds after the messages before an answer, for it to begin."""
        before = self._template.shaped(self._conversation)[:index]
        for messages in (before, [self._template.shaped_user(self._conversation)]):
            if messages:
                marked = self._template.marked(self._conversation, messages, prompt=True)
                if marked is not None and marked.runs:
                    return marked.text[marked.runs[-1][1][1] :]
        raise self._unknown(index, "the prompt for it is unknown")

    def _unknown(self, index: int, reason: str) -> Unrenderable:
        count = len(self._conversation.messages)
        return Unrenderable(
            f"{self._conversation.where}: where the answer of message {index + 1} of {count}"
            f" stands in what the chat template renders is unknown: {reason}; {SPAN_WAYS_OUT}"
        )


def _replaced(content: str, word: str) -> str:
    """The content with a private word for each of its texts; <think> tags and their spaces stay."""
    pieces = THINK_TAGS.split(content)
    if len(pieces) == 1:
        return word
    return "".join(
        piece if THINK_TAGS.fullmatch(piece) else piece.replace(piece.strip() or "\0", word)
        for piece in pieces
    )
