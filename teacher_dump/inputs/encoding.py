"""Records to token ids and masks: the kinds of record, special tokens, the assistant's words.

Knows nothing of lengths, windows or vocabulary sizes: that is `sequences.py`.
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

KINDS = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt + response": ("prompt", "response"),
    "input_ids": ("input_ids",),
}
ACCEPTED = "text; messages (+ tools); prompt + response; input_ids (+ loss_mask)"
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

TEMPLATE_WAYS_OUT = (
    "use a chat template with {% generation %} around the assistant's words, give prompt + response"
    " records, or set targets: all"
)

Chat = tuple[Record, list[dict[str, Any]]]


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
    ) -> None:
        """`only_texts`: refuse any other kind of record; the rest as in `SequenceConfig`."""
        self.tokenizer = tokenizer
        self.targets = targets
        self.only_texts = only_texts
        self.add_bos, self.add_eos = add_bos, add_eos
        self.template_variables = {
            **chat_template_kwargs,
            "strftime_now": lambda layout: _strftime(chat_date, layout),
        }

    def __call__(self, batch: list[Record]) -> list[tuple[Ids, Mask]]:
        """Ids and mask of each record. Raises SourceError naming the first bad one."""
        kinds = [self._kind(record) for record in batch]
        strings = [
            _string(record, name)
            for record, kind in zip(batch, kinds, strict=True)
            if kind in ("text", "prompt + response")
            for name in KINDS[kind]
        ]
        bodies = iter(self._tokenize(strings) if strings else [])
        chats = self._chats([r for r, k in zip(batch, kinds, strict=True) if k == "messages"])
        encoded: list[tuple[Ids, Mask]] = []
        for record, kind in zip(batch, kinds, strict=True):
            if kind == "text":
                encoded.append(self._framed([], next(bodies)))
            elif kind == "prompt + response":
                encoded.append(self._framed(next(bodies), next(bodies)))
            else:
                encoded.append(next(chats) if kind == "messages" else _given(record))
        return encoded

    def prompts(self, batch: list[Record]) -> list[Ids]:
        """Ids of each record up to where an answer is to begin: its prompt, or all its messages.

        Raises SourceError naming the first record that has neither, or ends with an answer.
        """
        return [self._prompt(record) for record in batch]

    def _prompt(self, record: Record) -> Ids:
        kinds = [name for name in ("prompt", "messages") if record.fields.get(name) is not None]
        if len(kinds) != 1:
            raise SourceError(
                f"{record.where}: the record has {' and '.join(kinds) or 'nothing'} to answer, its "
                f"fields are {sorted(record.fields)}: expected either prompt or messages"
            )
        if kinds == ["prompt"]:
            ids = self._tokenize([_string(record, "prompt")])[0]
            head, _ = self._affixes
            return np.array(ids if ids[: len(head)] == head else head + ids, dtype=np.int64)
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

    def _kind(self, record: Record) -> str:
        present = {name for name, value in record.fields.items() if value is not None}
        kinds = [kind for kind, names in KINDS.items() if present.issuperset(names)]
        if len(kinds) != 1:
            found = f"both {' and '.join(kinds)}" if kinds else "no kind of sample"
            raise SourceError(
                f"{record.where}: the record is {found}, its fields are {sorted(present)}: expected"
                f" exactly one of {ACCEPTED}; rename or drop fields"
            )
        if self.only_texts and kinds != ["text"]:
            raise SourceError(
                f"{record.where}: packing: concat joins plain texts, found {kinds[0]}: set packing"
                " to none"
            )
        if "loss_mask" in present and kinds != ["input_ids"]:
            raise SourceError(
                f"{record.where}: loss_mask belongs to input_ids and has no effect on {kinds[0]}:"
                " drop it, or give input_ids"
            )
        if self.tokenizer is None and kinds != ["input_ids"]:
            raise SourceError(
                f"{record.where}: found {kinds[0]} but no tokenizer: expected input_ids; name the"
                " tokenizer"
            )
        return kinds[0]

    def _tokenize(self, strings: list[str]) -> list[list[int]]:
        encoding = self.tokenizer(
            strings, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoding["input_ids"]
        return ids

    def _framed(self, prompt: list[int], response: list[int]) -> tuple[Ids, Mask]:
        head, tail = self._affixes
        body = prompt + response
        head = head if body[: len(head)] != head else []
        tail = tail if response[len(response) - len(tail) :] != tail else []
        ids = np.array(head + body + tail, dtype=np.int64)
        if self.targets == "all" or not prompt:
            return ids, np.ones(len(ids), dtype=bool)
        return ids, np.arange(len(ids)) >= len(head) + len(prompt)

    @functools.cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        """What goes before and after a text: the tokenizer's own habit, then add_bos, add_eos."""
        bare = self._tokenize(["a"])[0]
        habit: list[int] = self.tokenizer("a")["input_ids"]
        starts = [i for i in range(len(habit)) if habit[i : i + len(bare)] == bare]
        if not starts:
            raise ValueError(f"the tokenizer makes {bare} of 'a' but {habit} with special tokens")
        head, tail = habit[: starts[0]], habit[starts[0] + len(bare) :]
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

    def _chats(self, records: list[Record]) -> Iterator[tuple[Ids, Mask]]:
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


def _string(record: Record, name: str) -> str:
    value = record.fields[name]
    if not isinstance(value, str) or (name == "text" and not value):
        raise SourceError(
            f"{record.where}: {name} is {value!r:.60}: expected a{' non-empty' * (name == 'text')}"
            f" string; repair or remove the record{', or set empty: drop' * (value == '')}"
        )
    return value


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


def _given(record: Record) -> tuple[Ids, Mask]:
    ids = _integers(record, "input_ids")
    if record.fields.get("loss_mask") is None:
        return ids, np.ones(len(ids), dtype=bool)
    mask = _integers(record, "loss_mask")
    if len(mask) != len(ids) or not np.isin(mask, (0, 1)).all():
        raise SourceError(
            f"{record.where}: loss_mask has {len(mask)} values, {np.unique(mask)[:5]}:"
            f" expected one 0 or 1 for each of the {len(ids)} input_ids"
        )
    return ids, mask.astype(bool)


def _integers(record: Record, name: str) -> Ids:
    try:
        array = np.array(record.fields[name])
    except ValueError:  # rows of unequal length
        array = np.empty((0, 0))
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iub"):
        raise SourceError(
            f"{record.where}: {name} is {record.fields[name]!r:.60}: expected a list of integers"
        )
    return array.astype(np.int64)


def _strftime(chat_date: str, layout: str) -> str:
    if not chat_date:
        raise ValueError(
            "it asks for today's date, which would change the sequences from day to day: set"
            " chat_date, or the date in chat_template_kwargs"
        )
    return datetime.date.fromisoformat(chat_date).strftime(layout)
