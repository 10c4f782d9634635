"""The border check: does what the teacher will read say what the record says?

Of a sample of each kind of record, the tokens are decoded again and compared with the record's own
strings: each is there, in order, with its spaces, and those that are to be learnt, and no others,
lie in the targets. Knows nothing of how the tokens came about, so that whatever goes wrong there
(a tokenizer that loses spaces, a template that drops an answer, a mask that slips) is seen here.
"""

import dataclasses
import logging
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from decant.schemas.tokenizer import decode
from decant.storage.inspect.marked import BEGIN, END, marked, stretches
from decant.teacher_dump.inputs.kinds import ANSWERED, MESSAGES, READY, TEXT, Formed
from decant.teacher_dump.inputs.messages import is_answer, read_conversation, reasoning_of
from decant.teacher_dump.inputs.records import Ids, Mask, SourceError
from decant.teacher_dump.inputs.rendering import THINK_TAGS

log = logging.getLogger(__name__)

FIRST = 16
"""Records of each kind that are looked at, from the first on."""
SPREAD = 1.25
"""Then one record each time their number has grown by this factor."""
TELLING = 8
"""Letters of a string that a template has not by chance as well."""
LONGEST = 20_000
"""Tokens of a record that is looked at; of longer ones there are others."""
MOST_SAID = 3
"""Warnings that are written where the user accepts what does not fit."""

Stretch = tuple[str, bool]
Transform = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Said:
    """A string of the record's own."""

    what: str
    text: str
    is_target: bool
    in_order: bool = True
    """Whether it comes after the last such string."""
    is_alone: bool = False
    """Whether nothing of the record but such strings can be a target, so that it is one once."""


class BorderCheck:
    """Offered every encoded record, looks at some, and stops at the first that does not fit."""

    def __init__(self, tokenizer: Any, *, targets: str, accept: bool = False) -> None:
        """`targets` is as in `SequenceConfig`; with `accept` what does not fit is a warning."""
        self._tokenizer = tokenizer
        self._all = targets == "all"
        self._accept = accept
        self._seen: dict[str, int] = {}
        self._next: dict[str, int] = {}
        self._warnings = 0
        self._told_of_bos = False
        self.examples: dict[str, str] = {}
        """Of each kind of record the first one as text, its targets between marks."""

    def look(self, found: Formed, ids: Ids, mask: Mask) -> None:
        """The next record. Raises SourceError if its tokens do not say what it says."""
        number = self._seen.get(found.kind, 0)
        self._seen[found.kind] = number + 1
        due = self._next.setdefault(found.kind, 0)
        if number < due or len(ids) > LONGEST:
            return
        self._next[found.kind] = number + 1 if number < FIRST else int(number * SPREAD)
        is_target = mask.copy()
        problem = ""
        if self._has_unknown(found, ids):
            self._warn(
                f"{found.record.where} holds letters that the tokenizer does not know: they are"
                f" read, and learnt, as {self._tokenizer.unk_token}"
            )
        elif found.form != READY and len(ids):
            problem = difference(found, self._tokenizer, ids, mask, everything=self._all)
        if found.kind not in self.examples and len(ids):
            is_target[0] = False
            text = marked(ids, is_target, self._decode)
            self.examples[found.kind] = text
            log.info(
                "the first record of kind %s (%s), targets between %s and %s:\n%s",
                *(found.kind, found.record.where, BEGIN, END, text),
            )
            if not self._told_of_bos and self._lacks_bos(found, ids):
                self._told_of_bos = True
                log.warning(
                    "warning: records of kind %s begin without %s, the bos token that the tokenizer"
                    " has: if the teacher was trained with it, set sequences.add_bos: true",
                    *(found.kind, self._tokenizer.bos_token),
                )
        if not problem:
            return
        message = (
            f"{found.record.where}: the tokens of sample {found.record.sample_id!r} do not say "
            f"what the record says: {problem}"
        )
        if not self._accept:
            raise SourceError(
                f"{message}. Look at it with its targets marked: {self._shown(ids, mask)!r:.400}. "
                "Mend the record, the chat template or the tokenizer, or set "
                "sequences.accept_rendering: true if it is right as it is"
            )
        self._warn(f"accepted: {message}")

    def _warn(self, text: str) -> None:
        self._warnings += 1
        if self._warnings <= MOST_SAID:
            log.warning("%s", text)

    def _lacks_bos(self, found: Formed, ids: Ids) -> bool:
        t = self._tokenizer
        if found.form == READY or t.bos_token_id in (None, t.eos_token_id):
            return False
        return bool(ids[0] != t.bos_token_id)

    def _has_unknown(self, found: Formed, ids: Ids) -> bool:
        t = self._tokenizer
        if found.form == READY or t.unk_token_id in (None, t.bos_token_id, t.eos_token_id):
            return False
        return bool((ids == t.unk_token_id).any())

    def _shown(self, ids: Ids, mask: Mask) -> str:
        return marked(ids, mask, self._decode, characters=360)

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids)


def difference(
    found: Formed, tokenizer: Any, ids: Ids, is_target: Mask, *, everything: bool
) -> str:
    """What the tokens lack of the record's own strings, or have as a target besides; or ""."""
    parts = stretches(ids, is_target, lambda some: decode(tokenizer, some))
    said = strings_of(found, everything=everything)
    tokens = {*map(str, tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens}
    check = _answer_difference if found.form == ANSWERED else _difference
    problem = ""
    for transform in _transforms(tokenizer, tokens):
        changed = [(transform(text), targets) for text, targets in parts]
        strings = [dataclasses.replace(s, text=transform(s.text)) for s in said]
        now = check(changed, strings, _without(tokens) if found.form != MESSAGES else None)
        if not now:
            return ""
        problem = problem or now
    return problem


def strings_of(found: Formed, *, everything: bool) -> list[Said]:
    """The strings that the tokens must hold; spaces around messages are the template's business.

    What tools say, and what goes with a call of one, templates may write as JSON: it is not here.
    """
    fields = found.record.fields
    if found.form == TEXT:
        return [Said("its text", fields["text"], True)]
    if found.form == ANSWERED:
        whole = everything or not fields["prompt"]
        return [
            Said("its prompt", fields["prompt"], whole),
            Said("its response", fields["response"], True),
        ]
    conversation = read_conversation(found.record)
    said = []
    is_alone = not everything and not any(
        "tool_calls" in message or reasoning_of(message) for message in conversation.messages
    )
    for index, message in enumerate(conversation.messages):
        if message["role"] == "tool" or "tool_calls" in message:
            continue
        answers = is_answer(message)
        learnt = index not in conversation.excluded and (everything or answers)
        for piece in THINK_TAGS.split(message["content"]):
            what = f"message {index + 1} ({message['role']})"
            if piece.strip() and not THINK_TAGS.fullmatch(piece):
                said.append(Said(what, piece.strip(), learnt, answers, is_alone))
    return said


def _difference(parts: list[Stretch], said: list[Said], without_tokens: Transform | None) -> str:
    """Find each string, answers one after the other, in stretches that are targets as it is.

    With `without_tokens` nothing else may be there but what that takes away.
    """
    text = "".join(part for part, _ in parts)
    flags = np.concatenate([np.full(len(part), targets) for part, targets in parts])
    place, rest = 0, flags.copy()
    for string in said:
        least = place if string.in_order else 0
        start = _found(text, flags, string, least)
        if start < 0:
            return _absence(text, least, string)
        rest[start : start + len(string.text)] = False
        if string.in_order:
            place = start + len(string.text)
        if without_tokens is not None and (besides := _besides(text, string.text, without_tokens)):
            return f"there is {besides!r:.80} besides {string.what}"
    unsaid = "".join(letter if learnt else "\n" for letter, learnt in zip(text, rest, strict=True))
    for string in said:
        if string.is_alone and len(string.text) >= TELLING and string.text in unsaid:
            return f"{string.what}, {string.text!r:.80}, is a target once more"
    return ""


def _besides(text: str, said: str, without_tokens: Transform) -> str:
    """What is around a string, spaces and added tokens aside."""
    first, at = "", text.find(said)
    while at >= 0:
        besides = (without_tokens(text[:at]) + without_tokens(text[at + len(said) :])).strip()
        if not besides:
            return ""
        first = first or besides
        at = text.find(said, at + 1)
    return first


def _found(text: str, flags: Mask, string: Said, start: int) -> int:
    """Where the string begins, at `start` or later, if it is a target, or none, as it should be."""
    while (start := text.find(string.text, start)) >= 0:
        inside = flags[start : start + len(string.text)]
        if inside.all() if string.is_target else not inside.any():
            return start
        start += 1
    return -1


def _absence(text: str, place: int, string: Said) -> str:
    shown = f"{string.what}, {string.text!r:.80},"
    if text.find(string.text, place) >= 0:
        return f"{shown} is {'no' if string.is_target else 'a'} target in part or whole"
    if string.text in text:
        return f"{shown} stands before what comes before it in the record"
    loose = re.sub(r"\s+", "", string.text)
    if loose and loose in re.sub(r"\s+", "", text):
        return f"{shown} is there with other spaces"
    return f"{shown} is not there"


def _answer_difference(
    parts: list[Stretch], said: list[Said], without_tokens: Transform | None
) -> str:
    """The same for a prompt and a response, whose border may lie inside of a token."""
    assert without_tokens is not None
    prompt, response = said
    text = "".join(part for part, _ in parts)
    learnt = "".join(part for part, targets in parts if targets)
    joined = Said("its prompt and response", prompt.text + response.text, True)
    if joined.text not in text:
        return _absence(text, 0, joined)
    if besides := _besides(text, joined.text, without_tokens):
        return f"there is {besides!r:.80} besides {joined.what}"
    if prompt.is_target:
        return "" if joined.text in learnt else f"{joined.what} are no targets in part or whole"
    at = learnt.find(response.text)
    if at < 0:
        return f"{response.what}, {response.text!r:.80}, is not a target in part or whole"
    before = without_tokens(learnt[:at])
    if before.strip() and not prompt.text.endswith(before):
        return f"{before!r:.80}, which is not of its response, is a target"
    return ""


def _without(tokens: set[str]) -> Transform:
    """Take the added tokens out of a text."""
    if not tokens:
        return str
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)
    return lambda text: pattern.sub("", text)


def _transforms(tokenizer: Any, tokens: set[str]) -> list[Transform]:
    """Ways to look at texts that do not count as differences, the strictest first."""
    escaped = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    beside = re.compile(rf"\s*({escaped})\s*")

    def without_spaces_beside_tokens(text: str) -> str:
        return beside.sub(r"\1", text) if tokens else text

    def normalised(text: str) -> str:
        folded = unicodedata.normalize("NFKD", without_spaces_beside_tokens(text)).casefold()
        return "".join(c for c in folded if not unicodedata.combining(c))

    found: list[Transform] = [str, without_spaces_beside_tokens]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.normalizer is not None:
        found.append(normalised)
    return found
