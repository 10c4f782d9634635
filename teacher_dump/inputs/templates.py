"""A chat template, and the form in which it wants messages; which templates there are.

Templates differ in what they take: content as a string or as a list of parts, arguments of tool
calls as objects or as JSON, reasoning under one of several names. What a template wants is found by
rendering a conversation of private words and looking for them. Knows nothing of tokens.
"""

import copy
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from decant.teacher_dump.inputs.marking import Marked, has_blocks, render_marked
from decant.teacher_dump.inputs.messages import (
    REASONING_FIELDS,
    Conversation,
    Message,
    is_answer,
    reasoning_of,
)
from decant.teacher_dump.inputs.records import SourceError, Unrenderable

ASKED, ANSWERED, THOUGHT = "qzasked", "qzanswered", "qzthought"
NAMED, KEYED, VALUED, RESULTED = "qznamed", "qzkeyed", "qzvalued", "qzresulted"
"""Words that no template holds and none alters."""


class NoDateError(ValueError):
    """The template asks for today's date, and none is given."""


@dataclasses.dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants a message that calls tools."""

    content_is_none: bool
    """Without words the content is none, not "" (else the calls are left out)."""
    arguments_as_json: bool
    """The arguments are a JSON string, not an object."""


class ChatTemplate:
    """One chat template with its variables. Renders conversations; owns no tokens."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        source: str,
        variables: dict[str, Any],
        chat_date: str,
        name: str = "",
    ) -> None:
        """`source` is the text of the template, "" for the tokenizer's own.

        `name`: that of a training variant; its {% generation %} blocks are passed over, since
        some of them cover the prompt for the answer.
        """
        self.name = name
        self._tokenizer = tokenizer
        self._source = source
        self._variables = {
            **variables,
            "strftime_now": lambda layout: _strftime(chat_date, layout),
        }
        self._forms: dict[tuple[str, str], Any] = {}
        self._agreed: set[str] = set()
        """Templates that render the same with marks: those that keep nothing always do."""
        self._shaped: tuple[Conversation, list[Message]] | None = None
        """The last conversation; its first messages are rendered many times."""

    def source(self, conversation: Conversation) -> str:
        """The text of the template for this conversation: tokenizers may have one for tools."""
        chosen: str = self._tokenizer.get_chat_template(self._source or None, conversation.tools)
        return chosen

    def has_blocks(self, conversation: Conversation) -> bool:
        """Whether the template says by {% generation %} which part is the assistant's."""
        return not self.name and has_blocks(self.source(conversation))

    def renders_tools(self, conversation: Conversation) -> bool:
        """Whether the tools of the conversation reach its text at all."""
        return self._probed(conversation, "tools", self._probe_tools)

    def text(
        self, conversation: Conversation, length: int | None = None, *, prompt: bool = False
    ) -> str:
        """What the first `length` messages render to, `prompt`: with the beginning of an answer.

        Raises Unrenderable if the template cannot, and SourceError if it can render none at all.
        """
        try:
            return self._render(self.shaped(conversation)[:length], conversation, prompt)
        except TemplateSyntaxError as error:
            raise SourceError(
                f"the chat template is no template: line {error.lineno}: {error}; repair it, or"
                " name another one in sequences.chat_template"
            ) from error
        except NoDateError as error:
            raise SourceError(f"{conversation.where}: {error}") from error
        except SourceError:
            raise
        except Exception as error:  # templates raise what they like
            raise Unrenderable(
                f"{conversation.where}: the chat template cannot render this conversation: {error}"
            ) from error

    def marked(
        self, conversation: Conversation, messages: list[Message], *, prompt: bool = False
    ) -> Marked | None:
        """What the shaped messages render to, with origins; None if those cannot be traced."""
        variables = {
            "tools": conversation.tools,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._tokenizer.special_tokens_map,
            **self._variables,
            **conversation.variables,
        }
        source = self.source(conversation)
        try:
            marked = render_marked(source, messages, variables)
            if marked is None or (marked.is_sure and source in self._agreed):
                return marked
            plain = self._render(messages, conversation, prompt)
        except Exception:  # templates raise what they like
            return None
        if marked.text != plain:
            return None
        self._agreed.add(source)
        return marked

    def shaped(
        self, conversation: Conversation, contents: dict[int, str] | None = None
    ) -> list[Message]:
        """The messages in the form the template wants, `contents` (of all) in place of theirs."""
        if contents is None and self._shaped is not None and self._shaped[0] is conversation:
            return self._shaped[1]
        shaped = [
            self._shape(
                conversation, index, message, contents[index] if contents else message["content"]
            )
            for index, message in enumerate(conversation.messages)
        ]
        if contents is None:
            self._shaped = conversation, shaped
        return shaped

    def shaped_user(self, conversation: Conversation) -> Message:
        """A user's message of a private word, in the same form."""
        parts = self._wants_parts(conversation)
        return _user([{"type": "text", "text": ASKED}] if parts else ASKED)

    def _shape(
        self, conversation: Conversation, index: int, message: Message, content: str
    ) -> Message:
        shaped = {**message, "content": content}
        if self._wants_parts(conversation):
            shaped["content"] = [{"type": "text", "text": content}]
        if calls := message.get("tool_calls"):
            form = self._call_form(conversation)
            if not form.arguments_as_json:
                _require_objects(conversation, index, calls)
            if form.content_is_none and not content:
                shaped["content"] = None
            if form.arguments_as_json:
                shaped["tool_calls"] = _with_json(conversation, index, calls)
        if is_answer(message) and (thoughts := reasoning_of(message)):
            names = self._reasoning_names(conversation)
            if names and not any(isinstance(message.get(name), str) for name in names):
                shaped[names[0]] = thoughts[0]
        return shaped

    def _wants_parts(self, conversation: Conversation) -> bool:
        return self._probed(conversation, "parts", self._probe_parts)

    def _call_form(self, conversation: Conversation) -> CallForm:
        return self._probed(conversation, "calls", self._probe_calls)

    def _reasoning_names(self, conversation: Conversation) -> tuple[str, ...]:
        return self._probed(conversation, "reasoning", self._probe_reasoning)

    def _probed(self, conversation: Conversation, what: str, probe: Any) -> Any:
        key = (what, self.source(conversation))
        if key not in self._forms:
            self._forms[key] = probe(conversation)
        return self._forms[key]

    def _probe_parts(self, conversation: Conversation) -> bool:
        """Whether words in a string are lost, and kept in a part."""

        def kept(shape: Any) -> bool:
            chat = [_user(shape(ASKED)), {"role": "assistant", "content": shape(ANSWERED)}]
            text = self._tried(chat, conversation)
            return ASKED in text and ANSWERED in text

        return not kept(lambda text: text) and kept(lambda text: [{"type": "text", "text": text}])

    def _probe_calls(self, conversation: Conversation) -> CallForm:
        """The first form in which name and arguments are rendered, and encoded at most once."""
        arguments = {KEYED: VALUED}
        result = {"role": "tool", "name": NAMED, "tool_call_id": "abcdefghi", "content": RESULTED}
        wrong = [repr(arguments), json.dumps(json.dumps(arguments))]
        nones = self._tried([self.shaped_user(conversation)], conversation).count("None")
        for answered in ([result], []):  # some templates refuse results, or want them
            for is_none, as_json in itertools.product((False, True), repeat=2):
                given = json.dumps(arguments) if as_json else arguments
                function = {"name": NAMED, "arguments": given}
                call = {"type": "function", "id": "abcdefghi", "function": function}
                content: Any = None if is_none else ""
                if self._wants_parts(conversation) and not is_none:
                    content = [{"type": "text", "text": ""}]
                answer = {"role": "assistant", "content": content, "tool_calls": [call]}
                text = self._tried([_user(ASKED), answer, *answered], conversation)
                if (
                    all(word in text for word in (NAMED, KEYED, VALUED))
                    and not any(word in text for word in wrong)
                    and not (is_none and text.count("None") > nones)
                ):
                    return CallForm(is_none, as_json)
        return CallForm(content_is_none=False, arguments_as_json=False)

    def _probe_tools(self, conversation: Conversation) -> bool:
        """Whether a tool of a private name is rendered; True for a template that is choosier."""
        function = {
            "name": NAMED,
            "description": KEYED,
            "parameters": {"type": "object", "properties": {}, "required": []},
        }
        tools = [{"type": "function", "function": function}]
        asked = dataclasses.replace(conversation, tools=tools)
        text = self._tried([self.shaped_user(asked)], asked)
        return NAMED in text or not text

    def _probe_reasoning(self, conversation: Conversation) -> tuple[str, ...]:
        """The names under which the template reads what the assistant thinks."""
        return tuple(
            name
            for name in REASONING_FIELDS
            if THOUGHT
            in self._tried(
                [
                    _user(ASKED),
                    {"role": "assistant", "content": ANSWERED, name: THOUGHT},
                ],
                conversation,
            )
        )

    def _tried(self, messages: list[Message], conversation: Conversation) -> str:
        """What it renders to, "" if it does not."""
        try:
            return self._render(messages, conversation, False)
        except NoDateError as error:
            raise SourceError(f"{conversation.where}: {error}") from error
        except Exception:  # templates raise what they like
            return ""

    def _render(self, messages: list[Message], conversation: Conversation, prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=conversation.tools,
            chat_template=self._source or None,
            add_generation_prompt=prompt,
            tokenize=False,
            **{**self._variables, **conversation.variables},
        )
        return text


def training_template(source: str) -> tuple[str, str]:
    """The text and the name of TRL's training variant of a template that it knows, or "", "".

    Training variants render what the original leaves out of earlier answers (their reasoning).
    """
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else None
    if folder is None or not folder.is_dir():
        return "", ""
    for path in sorted(folder.glob("*.jinja")):
        variant = path.with_name(f"{path.stem}_training.jinja")
        if variant.is_file() and path.read_text(encoding="utf-8") == source:
            text = variant.read_text(encoding="utf-8")
            return text, f"{variant.name} of trl {importlib.metadata.version('trl')}"
    return "", ""


def _user(content: Any) -> Message:
    return {"role": "user", "content": content}


def _with_json(conversation: Conversation, index: int, calls: list[Any]) -> list[Any]:
    """The calls with their arguments as JSON strings, word for word where they came as such."""
    calls = copy.deepcopy(calls)
    for number, call in enumerate(calls):
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        call["function"]["arguments"] = conversation.spoken.get((index, number), arguments)
    return calls


def _require_objects(conversation: Conversation, index: int, calls: list[Any]) -> None:
    """Raise Unrenderable for arguments that a template would encode a second time."""
    for call in calls:
        if isinstance(call["function"]["arguments"], str):
            raise Unrenderable(
                f"{conversation.where}: a tool call of message {index + 1} has the arguments"
                f" {call['function']['arguments']!r:.60}: expected a JSON object, which the chat"
                " template writes down; repair or remove the record"
            )


def _strftime(chat_date: str, layout: str) -> str:
    if not chat_date:
        raise NoDateError(
            "the chat template cannot render this conversation: it asks for today's date, which"
            " would change the sequences from day to day: set chat_date, or the date in"
            " chat_template_kwargs"
        )
    return datetime.date.fromisoformat(chat_date).strftime(layout)
