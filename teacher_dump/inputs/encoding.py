"""Records to token ids and masks: the kinds of record, special tokens, the assistant's words.

Knows nothing of lengths, windows or vocabulary sizes: that is `sequences.py`.
"""

import functools
from typing import Any

import numpy as np

from decant.teacher_dump.inputs.chats import Chats
from decant.teacher_dump.inputs.records import Ids, Mask, Record, SourceError, Unrenderable

KINDS = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt + response": ("prompt", "response"),
    "input_ids": ("input_ids",),
}
ACCEPTED = "text; messages (+ tools); prompt + response; input_ids (+ loss_mask)"


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
        self.chats = Chats(
            tokenizer,
            targets=targets,
            chat_template_kwargs=chat_template_kwargs,
            chat_date=chat_date,
        )

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
        chats = self.chats.encode([r for r, k in zip(batch, kinds, strict=True) if k == "messages"])
        encoded: list[tuple[Ids, Mask]] = []
        for record, kind in zip(batch, kinds, strict=True):
            if kind == "text":
                encoded.append(self._framed([], next(bodies)))
            elif kind == "prompt + response":
                encoded.append(self._framed(next(bodies), next(bodies)))
            elif kind == "messages":
                chat = next(chats)
                if isinstance(chat, Unrenderable):
                    raise chat
                encoded.append(chat)
            else:
                encoded.append(_given(record))
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
        return self.chats.prompt(record)

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


def _string(record: Record, name: str) -> str:
    value = record.fields[name]
    if not isinstance(value, str) or (name == "text" and not value):
        raise SourceError(
            f"{record.where}: {name} is {value!r:.60}: expected a{' non-empty' * (name == 'text')}"
            f" string; repair or remove the record{', or set empty: drop' * (value == '')}"
        )
    return value


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
