"""Records to token ids and masks: special tokens, prompt and response, the assistant's words.

Knows nothing of lengths, windows or vocabulary sizes: that is `sequences.py`. Which fields make
which kind of record is `kinds.py`.
"""

import functools
from typing import Any

import numpy as np

from decant.schemas.tokenizer import decode
from decant.teacher_dump.inputs.chats import Chats
from decant.teacher_dump.inputs.kinds import (
    ANSWERED,
    MESSAGES,
    READY,
    TEXT,
    Formed,
    as_question,
    formed,
)
from decant.teacher_dump.inputs.offsets import OffsetTokenizer, tokens_in_spans
from decant.teacher_dump.inputs.ready_ids import ready_ids
from decant.teacher_dump.inputs.records import Ids, Mask, Record, SourceError, Unrenderable

Encoded = tuple[Ids, Mask]


class Encoder:
    """Token ids and mask of each record of a batch, with few calls of the tokenizer.

    Texts are tokenised bare and framed by `head` and `tail` (what the tokenizer adds by itself, and
    the bos and eos the config asks for), so that neither is doubled where a text spells it out.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        targets: str,
        only_texts: bool,
        add_bos: bool,
        add_eos: bool,
        chat_template_kwargs: dict[str, Any],
        chat_date: str,
        chat_template: str = "",
        accept_rendering: bool = False,
    ) -> None:
        """`only_texts`: refuse any other kind of record; the rest as in `SequenceConfig`.

        `chat_template` is the text of the template, in place of the tokenizer's own.
        """
        self.tokenizer = tokenizer
        self.targets = targets
        self.only_texts = only_texts
        self.add_bos, self.add_eos = add_bos, add_eos
        self.chats = Chats(
            tokenizer,
            targets=targets,
            chat_template_kwargs=chat_template_kwargs,
            chat_date=chat_date,
            chat_template=chat_template,
            accept_rendering=accept_rendering,
        )

    def form(self, record: Record) -> Formed:
        """The record in its form. Raises SourceError if it is of no kind that is usable here."""
        found = formed(record)
        if self.only_texts and found.form != TEXT:
            raise SourceError(
                f"{record.where}: packing: concat joins plain texts, found {found.kind}: set"
                " packing to none"
            )
        if self.tokenizer is None and found.form != READY:
            raise SourceError(
                f"{record.where}: found {found.kind} but no tokenizer: expected input_ids; name the"
                " tokenizer"
            )
        return found

    def __call__(self, batch: list[Formed]) -> list[Encoded | Unrenderable]:
        """Ids and mask of each record, or why the chat template cannot render it.

        Raises SourceError naming the first bad record.
        """
        texts = [_string(f.record, "text") for f in batch if f.form == TEXT]
        pairs = [
            (_string(f.record, "prompt"), _string(f.record, "response"))
            for f in batch
            if f.form == ANSWERED
        ]
        bodies = iter(self._tokenize(texts) if texts else [])
        answers = iter(self._answers(pairs) if pairs else [])
        chats = self.chats.encode([f.record for f in batch if f.form == MESSAGES])
        encoded: list[Encoded | Unrenderable] = []
        for found in batch:
            if found.form == TEXT:
                encoded.append(self._framed(next(bodies), 0))
            elif found.form == ANSWERED:
                encoded.append(self._framed(*next(answers)))
            elif found.form == MESSAGES:
                encoded.append(next(chats))
            else:
                encoded.append(ready_ids(found.record, self.tokenizer))
        return encoded

    def prompts(self, batch: list[Record]) -> list[Ids]:
        """Ids of each record up to where an answer is to begin: its prompt, or all its messages.

        Raises SourceError naming the first record that has neither, or ends with an answer.
        """
        return [self._prompt(as_question(record)) for record in batch]

    def head(self, ids: Ids) -> list[int]:
        """The ids that a sequence begins with because the tokenizer, or add_bos, puts them there.

        None where it does not begin so; a bos that a chat template writes counts as well.
        """
        if self.tokenizer is None:
            return []
        bos = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
        head = self._habit[0] if self._habit else []
        before = [] if bos and bos[0] in head else [*bos, *head]
        for possible in (before, head, bos):
            if possible and ids[: len(possible)].tolist() == possible:
                return possible
        return []

    def _prompt(self, record: Record) -> Ids:
        if "messages" in record.fields:
            return self.chats.prompt(record)
        ids = self._tokenize([_string(record, "prompt")])[0]
        head, _ = self._affixes
        return np.array(ids if ids[: len(head)] == head else head + ids, dtype=np.int64)

    def _tokenize(self, strings: list[str]) -> list[list[int]]:
        encoding = self.tokenizer(
            strings, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoding["input_ids"]
        return ids

    def _answers(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """Ids of each prompt with its response, and how many of them are the prompt's alone.

        Both are tokenised as the one text that the teacher reads, and a token that holds any
        character of the response is the response's, also if it begins in the prompt.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return [self._joined(prompt, response) for prompt, response in pairs]
        found = []
        texts = [prompt + response for prompt, response in pairs]
        for (prompt, _), text, (ids, offsets) in zip(
            pairs, texts, self._offsets(texts), strict=True
        ):
            inside = np.flatnonzero(tokens_in_spans(offsets, [(len(prompt), len(text))]))
            found.append((ids.tolist(), int(inside[0]) if len(inside) else len(ids)))
        return found

    def _joined(self, prompt: str, response: str) -> tuple[list[int], int]:
        """The same without offsets: tokenised apart, if together they read like the one text."""
        before, after, whole = self._tokenize([prompt, response, prompt + response])
        if decode(self.tokenizer, before + after) != decode(self.tokenizer, whole):
            raise SourceError(
                f"the tokenizer gives no character offsets, and of prompt {prompt[-20:]!r} and"
                f" response {response[:20]!r} it makes other text together than apart, so where the"
                " response begins is unknown: use its fast version, or give input_ids and loss_mask"
            )
        return before + after, len(before)

    def _framed(self, body: list[int], num_prompt: int) -> Encoded:
        """Ids with head and tail; the targets begin after the first `num_prompt` of the body."""
        head, tail = self._affixes
        response = body[num_prompt:]
        head = head if body[: len(head)] != head else []
        tail = tail if response[len(response) - len(tail) :] != tail else []
        ids = np.array(head + body + tail, dtype=np.int64)
        if self.targets == "all" or not num_prompt:
            return ids, np.ones(len(ids), dtype=bool)
        return ids, np.arange(len(ids)) >= len(head) + num_prompt

    @functools.cached_property
    def _offsets(self) -> OffsetTokenizer:
        return OffsetTokenizer(self.tokenizer)

    @functools.cached_property
    def _habit(self) -> tuple[list[int], list[int]] | None:
        """What the tokenizer by itself puts before and after a text; None if it changes it."""
        bare = self._tokenize(["a"])[0]
        framed: list[int] = self.tokenizer("a", verbose=False)["input_ids"]
        starts = [i for i in range(len(framed)) if framed[i : i + len(bare)] == bare]
        return (framed[: starts[0]], framed[starts[0] + len(bare) :]) if starts else None

    @functools.cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        """What goes before and after a text: the tokenizer's own habit, then add_bos, add_eos."""
        if self._habit is None:
            raise ValueError(
                "the tokenizer makes other ids of a text with special tokens than alone"
            )
        head, tail = self._habit
        if self.add_bos and self._special("bos") not in head:
            head = [self._special("bos"), *head]
        if self.add_eos and self._special("eos") not in tail:
            tail = [*tail, self._special("eos")]
        return head, tail

    def _special(self, name: str) -> int:
        token_id = getattr(self.tokenizer, f"{name}_token_id")
        if token_id is None:
            raise ValueError(
                f"the tokenizer has no {name} token, which add_{name} asks for: set add_{name}:"
                f" false, or name a {name} token in the tokenizer's configuration"
            )
        return int(token_id)


def _string(record: Record, name: str) -> str:
    value = record.fields[name]
    if not isinstance(value, str) or (name == "text" and not value):
        raise SourceError(
            f"{record.where}: {name} is {value!r:.60}: expected a{' non-empty' * (name == 'text')}"
            " string; repair or remove the record"
            f"{', or set empty: drop' * (value == '' or value is None)}"
        )
    return value
