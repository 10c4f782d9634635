"""A conversation to token ids and a mask: which of its tokens are the assistant's.

Knows which template renders a conversation; what a template makes of it is `rendering.py`, what
people write in records is `messages.py`. Knows nothing of other kinds of record.
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from decant.teacher_dump.inputs.messages import (
    Conversation,
    check_variables,
    is_answer,
    read_conversation,
)
from decant.teacher_dump.inputs.offsets import OffsetTokenizer, tokens_in_spans
from decant.teacher_dump.inputs.records import Ids, Mask, Record, SourceError, Unrenderable
from decant.teacher_dump.inputs.rendering import Rendered, render, render_prompt
from decant.teacher_dump.inputs.templates import ChatTemplate, training_template

log = logging.getLogger(__name__)


class Chats:
    """Renders conversations with a tokenizer's chat template, or another one."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        targets: str,
        chat_template_kwargs: dict[str, Any],
        chat_date: str,
        chat_template: str = "",
        accept_rendering: bool = False,
    ) -> None:
        """`chat_template` is the text of the template to use in place of the tokenizer's own.

        `accept_rendering`: the template may leave out words of the messages. The other arguments
        are as in `SequenceConfig`.
        """
        check_variables(chat_template_kwargs, "the config")
        self.tokenizer = tokenizer
        self.targets = targets
        self.chat_template = chat_template
        self.accept_rendering = accept_rendering
        self._make_template = functools.partial(
            ChatTemplate, tokenizer, variables=chat_template_kwargs, chat_date=chat_date
        )
        self._template = self._make_template(source=chat_template)
        self._variants: dict[str, ChatTemplate | None] = {}
        self._named: set[str] = set()

    def encode(self, records: list[Record]) -> Iterator[tuple[Ids, Mask] | Unrenderable]:
        """Yield ids and mask of each conversation, or why it has none, in place of it.

        Raises SourceError for what no conversation of the source would survive: messages or tools
        of another form, a template that asks for today's date.
        """
        rendered = [self._rendered(record) for record in records]
        texts = [found for found in rendered if isinstance(found, Rendered)]
        tokenized = self._tokenize(texts)
        for found in rendered:
            yield found if isinstance(found, Unrenderable) else next(tokenized)

    def prompt(self, record: Record) -> Ids:
        """Ids of a conversation up to where the assistant is to speak. Raises SourceError."""
        conversation = read_conversation(record)
        if is_answer(conversation.messages[-1]):
            raise SourceError(
                f"{record.where}: the messages end with the assistant's, so there is nothing left "
                "to answer: drop the last message"
            )
        self._require_template(record, "give prompt")
        text = render_prompt(self._template, conversation, accept=self.accept_rendering)
        return np.array(self._ids([text])[0], dtype=np.int64)

    @functools.cached_property
    def offset_tokenizer(self) -> OffsetTokenizer:
        """The tokenizer, with the characters of every token. Raises ValueError without offsets."""
        return OffsetTokenizer(self.tokenizer)

    def _tokenize(self, texts: list[Rendered]) -> Iterator[tuple[Ids, Mask]]:
        scores_all = self.targets == "all"
        if scores_all and not any(rendered.spans for rendered in texts):
            for ids in self._ids([rendered.text for rendered in texts]):
                yield np.array(ids, dtype=np.int64), np.ones(len(ids), dtype=bool)
            return
        tokenized = self.offset_tokenizer([rendered.text for rendered in texts]) if texts else []
        for rendered, (token_ids, offsets) in zip(texts, tokenized, strict=True):
            mask = tokens_in_spans(offsets, rendered.spans)
            yield token_ids, ~mask if scores_all else mask

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoding = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoding["input_ids"]
        return ids

    def _rendered(self, record: Record) -> Rendered | Unrenderable:
        try:
            conversation = read_conversation(record)
            self._require_template(record, "give prompt + response")
            if self.targets != "all":
                _ = self.offset_tokenizer
            return self._render(conversation)
        except Unrenderable as error:
            return error

    def _render(self, conversation: Conversation) -> Rendered:
        """With the template; if that fails, with the training variant that TRL has of it."""
        accept = self.accept_rendering
        try:
            return render(self._template, conversation, targets=self.targets, accept=accept)
        except Unrenderable as error:
            variant = self._training_variant(conversation)
            if variant is None:
                raise
            try:
                rendered = render(variant, conversation, targets=self.targets, accept=accept)
            except Unrenderable:
                raise error from None
            self._name(variant, error)
            return rendered

    def _training_variant(self, conversation: Conversation) -> ChatTemplate | None:
        """TRL's training variant of the template of the tokenizer; None where there is none."""
        if self.chat_template:
            return None
        source = self._template.source(conversation)
        if source not in self._variants:
            text, name = training_template(source)
            self._variants[source] = self._make_template(source=text, name=name) if text else None
        return self._variants[source]

    def _name(self, variant: ChatTemplate, reason: Unrenderable) -> None:
        if variant.name not in self._named:
            self._named.add(variant.name)
            log.warning(
                "records that the tokenizer's chat template does not render whole are rendered with"
                " %s, the first because of: %s",
                variant.name,
                reason,
            )

    def _require_template(self, record: Record, way_out: str) -> None:
        if not (self.chat_template or self.tokenizer.chat_template):
            raise ValueError(
                f"{record.where}: found messages, but the tokenizer has no chat template: name one"
                f" in sequences.chat_template, use that of an instruction-tuned model, or {way_out}"
            )
