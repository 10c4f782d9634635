"""A conversation to token ids and a mask: which of its tokens are the assistant's.

Knows the chat template of a tokenizer; knows nothing of other kinds of record.
"""

import copy
import datetime
import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from decant.teacher_dump.inputs.records import Ids, Mask, Record, SourceError

GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

TEMPLATE_WAYS_OUT = (
    "use a chat template with {% generation %} around the assistant's words, give prompt + response"
    " records, or set targets: all"
)

Chat = tuple[Record, list[dict[str, Any]]]


class Chats:
    """Renders conversations with a tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        targets: str,
        chat_template_kwargs: dict[str, Any],
        chat_date: str,
    ) -> None:
        """The arguments are as in `SequenceConfig`."""
        self.tokenizer = tokenizer
        self.targets = targets
        self.template_variables = {
            **chat_template_kwargs,
            "strftime_now": lambda layout: _strftime(chat_date, layout),
        }

    def encode(self, records: list[Record]) -> Iterator[tuple[Ids, Mask]]:
        """Yield what the chat template makes of each conversation, and nothing besides."""
        for tools, group in itertools.groupby(records, key=lambda r: r.fields.get("tools")):
            chats = [(record, _messages(record)) for record in group]
            if not self.tokenizer.chat_template:
                raise ValueError(
                    f"{chats[0][0].where}: found messages, but the tokenizer has no chat template:"
                    " use that of an instruction-tuned model, or give prompt + response"
                )
            if self.targets == "all":
                for ids in self._apply(chats, tools, return_dict=False):
                    yield np.array(ids, dtype=np.int64), np.ones(len(ids), dtype=bool)
            elif GENERATION_BLOCK.search(self._aligned.get_chat_template(tools=tools)):
                out = self._apply(chats, tools, return_dict=True, return_assistant_tokens_mask=True)
                for ids, mask in zip(out["input_ids"], out["assistant_masks"], strict=True):
                    yield np.array(ids, dtype=np.int64), np.array(mask, dtype=bool)
            else:
                yield from self._chats_by_prefixes(chats, tools)

    def prompt(self, record: Record) -> Ids:
        """Ids of a conversation up to where the assistant is to speak. Raises SourceError."""
        chat = _messages(record)
        if _is_answer(chat[-1]):
            raise SourceError(
                f"{record.where}: the messages end with the assistant's, so there is nothing left "
                "to answer: drop the last message"
            )
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{record.where}: found messages, but the tokenizer has no chat template:"
                " use that of an instruction-tuned model, or give prompt"
            )
        tools = record.fields.get("tools")
        (ids,) = self._apply([(record, chat)], tools, return_dict=False, add_generation_prompt=True)
        return np.array(ids, dtype=np.int64)

    def _chats_by_prefixes(self, chats: list[Chat], tools: Any) -> Iterator[tuple[Ids, Mask]]:
        """Yield the same for a template that does not say itself which part is the assistant's.

        An answer is what `messages[:i + 1]` renders to beyond `messages[:i]` and the prompt for it.
        """
        texts = self._apply(chats, tools, tokenize=False)
        spans = [
            [self._span(chat, i, tools, text) for i, m in enumerate(chat[1]) if _is_answer(m)]
            for chat, text in zip(chats, texts, strict=True)
        ]
        out = self._aligned(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for ids, offsets, answers in zip(
            out["input_ids"], out["offset_mapping"], spans, strict=True
        ):
            starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
            mask = np.zeros(len(ids), dtype=bool)
            for start, end in answers:
                mask |= (starts < end) & (ends > start)
            yield np.array(ids, dtype=np.int64), mask

    def _span(self, chat: Chat, index: int, tools: Any, text: str) -> tuple[int, int]:
        record, messages = chat
        if index == 0:
            raise SourceError(
                f"{record.where}: the conversation starts with the assistant, so nothing shows"
                f" where its words begin; put another message before, or {TEMPLATE_WAYS_OUT}"
            )
        before = self._apply(
            [(record, messages[:index])], tools, tokenize=False, add_generation_prompt=True
        )[0]
        through = self._apply([(record, messages[: index + 1])], tools, tokenize=False)[0]
        if not (text.startswith(through) and through.startswith(before)):
            raise SourceError(
                f"{record.where}: the chat template renders messages up to {index + 1} of"
                f" {len(messages)} otherwise when others follow (or a prompt for the answer"
                " otherwise than its beginning), so where the assistant's words stand is unknown;"
                f" {TEMPLATE_WAYS_OUT}"
            )
        return len(before), len(through)

    def _apply(self, chats: list[Chat], tools: Any, **options: Any) -> Any:
        """Call `apply_chat_template`; an error names the first record that causes it."""
        tokenizer = self.tokenizer if self.targets == "all" else self._aligned
        options |= {"tools": tools, "tokenizer_kwargs": {"verbose": False}}
        options |= self.template_variables
        try:
            return tokenizer.apply_chat_template([messages for _, messages in chats], **options)
        except Exception:  # templates raise what they like
            for record, messages in chats:
                try:
                    tokenizer.apply_chat_template([messages], **options)
                except Exception as error:
                    raise SourceError(
                        f"{record.where}: the chat template cannot render this conversation:"
                        f" {error}"
                    ) from error
            raise

    @functools.cached_property
    def _aligned(self) -> Any:
        """The tokenizer, with every character of a text inside the offsets of its token.

        The post-processor of many (Llama 3) trims spaces from the offsets. transformers then finds
        no token at the edge of an answer and drops the mask of all that follows, or extends it to
        the end. Without special tokens to add, a post-processor does nothing else.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                "the tokenizer gives no character offsets, which targets: response needs for"
                " messages: use its fast version, give prompt + response, or set targets: all"
            )
        aligned = copy.deepcopy(self.tokenizer)
        aligned.backend_tokenizer.post_processor = None
        return aligned


def _messages(record: Record) -> list[dict[str, Any]]:
    """Return the messages without null fields, which Arrow adds where messages are not alike."""
    messages, tools = record.fields["messages"], record.fields.get("tools")
    if not (isinstance(messages, list) and messages) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise SourceError(
            f"{record.where}: messages is {messages!r:.60}: expected a non-empty list of objects"
            " with a role"
        )
    if tools is not None and not isinstance(tools, list):
        raise SourceError(f"{record.where}: tools is {tools!r:.60}: expected a list of objects")
    return [
        {key: value for key, value in message.items() if value is not None or key == "content"}
        for message in messages
    ]


def _is_answer(message: dict[str, Any]) -> bool:
    return bool(message["role"] == "assistant")


def _strftime(chat_date: str, layout: str) -> str:
    if not chat_date:
        raise ValueError(
            "it asks for today's date, which would change the sequences from day to day: set"
            " chat_date, or the date in chat_template_kwargs"
        )
    return datetime.date.fromisoformat(chat_date).strftime(layout)
