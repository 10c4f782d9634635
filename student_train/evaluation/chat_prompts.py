"""Prompts as the student was trained on them: in the chat template that its cache was dumped with.

A student of another tokenizer was trained in its own template, which is then the tokenizer's.
"""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from decant.schemas import Manifest
from decant.schemas.strict import canonical
from decant.student_train.config.evaluation import GenerationConfig

MARK = "an answer that no template holds"
Messages = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ChatPrompts:
    """How conversations are put to the student."""

    tokenizer: Any
    template: str
    """In place of the tokenizer's own; "" = that one."""
    variables: dict[str, Any]
    """Of every conversation; a record's own come on top."""
    date: str
    """The day on which the conversations of the cache took place, for templates that ask."""
    wraps_texts: bool
    """Whether a prompt of text is what a user says."""

    def ids(self, messages: Messages, record: dict[str, Any]) -> list[int]:
        """Up to where the assistant is to speak. Raises ValueError if the template cannot say it.

        `record` may have `tools` and `chat_template_kwargs`.
        """
        text = self._render(messages, record, prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def ends(self) -> tuple[int, ...]:
        """The special tokens, if any, with which an answer ends in the template."""
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        try:
            text = self._render(said, {}, prompt=False)
        except ValueError:
            return ()
        behind = text[text.rfind(MARK) + len(MARK) :]
        added = {i: token.special for i, token in self.tokenizer.added_tokens_decoder.items()}
        ids = self.tokenizer(behind, add_special_tokens=False).input_ids
        return tuple(token for token in ids if added.get(token))[:1]

    def _render(self, messages: Messages, record: dict[str, Any], *, prompt: bool) -> str:
        more: dict[str, Any] = {"chat_template": self.template} if self.template else {}
        if self.date:
            day = datetime.date.fromisoformat(self.date)
            more["strftime_now"] = day.strftime
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=record.get("tools"),
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **more | self.variables | (record.get("chat_template_kwargs") or {}),
                )
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template cannot render it: {error}") from error


def chat_prompts(
    config: GenerationConfig, tokenizer: Any, manifest: Manifest, *, is_aligned: bool
) -> ChatPrompts | None:
    """How a student of this cache is asked; None for prompts as they are, without a template.

    Raises ValueError where the template is not the one that the cache was dumped with.
    """
    settings = manifest.sequences
    if config.prompts == "text":
        return None
    wraps = config.prompts == "chat" or manifest.messages
    template = _template(config.chat_template)
    own = getattr(tokenizer, "chat_template", None)
    if not (template or own):
        if config.prompts == "chat":
            raise ValueError(
                "eval.generation.prompts: chat needs a chat template, and the tokenizer has none: "
                "name its file in eval.generation.chat_template"
            )
        return None
    known = settings.get("chat_template_xxh3_128")
    found = xxhash.xxh3_128(canonical(template or own)).hexdigest()
    if wraps and known and found != known and not is_aligned:
        raise ValueError(
            f"eval.generation: the cache was dumped with another chat template (hash {known}) than "
            f"{config.chat_template or 'that of its tokenizer'} ({found}): name the file that "
            "sequences.chat_template of the dump named in eval.generation.chat_template, or set "
            "eval.generation.prompts: text"
        )
    return ChatPrompts(
        tokenizer=tokenizer,
        template=template,
        variables={} if is_aligned else dict(settings.get("chat_template_kwargs") or {}),
        date=str(settings.get("chat_date") or ""),
        wraps_texts=wraps,
    )


def _template(path: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"eval.generation.chat_template {path} cannot be read: {error}") from error
