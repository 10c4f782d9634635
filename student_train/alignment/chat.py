"""Conversations: the student's own chat template, aligned inside of the assistant's messages.

Templates differ in all that stands around messages, so nothing there is compared; what ends a
message on one side is what ends it on the other. The words come from the conversation, never from
the teacher's tokens.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Conversation
from decant.storage import StoredRows
from decant.student_train.alignment.encoder import Encoder
from decant.student_train.alignment.pieces import Pieces
from decant.student_train.alignment.texts import LeftOut
from decant.student_train.alignment.token_bytes import SPECIAL, TEXT, TokenTable

Ids = NDArray[np.int64]


class Chats:
    """Renders and encodes conversations as a student reads them."""

    def __init__(self, tokenizer: Any, where: str, encode: Encoder) -> None:
        """Keep the tokenizer of transformers, and what encodes with it.

        Raises ValueError if it has no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {where} has no chat template, and the cache holds conversations:"
                " give it one (chat_template.jinja beside it), as the student would be used"
            )
        self._tokenizer = tokenizer
        self.encode = encode
        """Texts to ids, special tokens being what they are."""

    def rendered(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where the assistant's messages stand in it.

        White space at their ends is left out, which templates strip or add. Raises LeftOut if the
        template cannot render it, or leaves out what the assistant says.
        """
        messages = list(conversation.messages)
        whole = self._render(messages, conversation, prompt=False)
        spans, at = [], 0
        for index in answers(conversation):
            said = messages[index]["content"].strip()
            try:
                before = self._render(messages[:index], conversation, prompt=True)
            except LeftOut:  # of no messages, perhaps
                before = ""
            if len(before) > at and whole.startswith(before):
                at = len(before)
            begin = whole.find(said, at)
            if begin < 0:
                raise LeftOut(
                    "the student's chat template does not write what the assistant says: "
                    f"{said!r:.60}"
                )
            at = begin + len(said)
            spans.append((begin, at))
        return whole, spans

    def _render(self, messages: list[Any], conversation: Conversation, *, prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=list(conversation.tools) if conversation.tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
                **conversation.chat_template_kwargs,
            )
        except Exception as error:  # templates raise what they like
            raise LeftOut(f"the student's chat template cannot render it: {error}") from error
        return str(text)


def answers(conversation: Conversation) -> list[int]:
    """Which of its messages are the assistant's, and are to be learned."""
    return [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
        and message.get("weight", 1) != 0
        and message["content"].strip()
    ]


def chat_pieces(
    pieces: Pieces,
    rows: StoredRows,
    conversations: dict[int, str],
    teacher: TokenTable,
    student: TokenTable,
    chats: Chats,
) -> tuple[dict[int, str], dict[int, int]]:
    """Add the pieces of these sequences, given the conversation of each, as a cache holds it.

    Returns why some have none, and the student's token for each of the teacher's that ends turns.
    """
    reasons: dict[int, str] = {}
    found: dict[int, tuple[str, list[tuple[int, int]]]] = {}
    for sequence, text in conversations.items():
        try:
            where = f"sample {rows.sample_ids[sequence]}"
            found[sequence] = chats.rendered(Conversation.of_text(text, where))
        except LeftOut as reason:
            reasons[sequence] = str(reason)
    encoded = chats.encode([text for text, _ in found.values()])
    ends: dict[int, int] = {}
    for (sequence, (text, spans)), ids in zip(found.items(), encoded, strict=True):
        start, stop = rows.row_starts[sequence : sequence + 2].tolist()
        try:
            theirs = _stretches(rows, start, stop, teacher)
            turns = _turns(text, spans, theirs, ids, student)
        except LeftOut as reason:
            reasons[sequence] = str(reason)
            continue
        at = 0
        for turn in turns:
            pieces.add(sequence, ids[at : turn.student[0]])
            pieces.add(
                sequence,
                ids[turn.student[0] : turn.student[1]],
                teacher=(turn.teacher[0], turn.teacher[1] - turn.teacher[0]),
                teacher_begin=turn.teacher_begin + turn.teacher_cut,
                teacher_cut=turn.teacher_cut,
                student_begin=turn.student_begin + turn.student_cut,
                student_cut=turn.student_cut,
            )
            at = turn.student[1]
            row = turn.teacher[1]
            if turn.is_whole and row < stop and at < len(ids):
                theirs_id, our_id = int(rows.token_id[row]), int(ids[at])
                if teacher.kind[theirs_id] == SPECIAL and student.kind[our_id] == SPECIAL:
                    end = ids[at : at + 1]
                    pieces.add(sequence, end, is_special=True, teacher=(row, 1))
                    ends.setdefault(theirs_id, our_id)
                    at += 1
        pieces.add(sequence, ids[at:])
    return reasons, ends


class _Stretch(NamedTuple):
    """Text of the teacher's between special tokens, all of it targets or none."""

    first: int
    """Its first row."""
    starts: Ids
    """Where each of its tokens begins in the text, and the last ends."""
    text: bytes


class _Turn(NamedTuple):
    """One message of the assistant's on both sides."""

    teacher: tuple[int, int]
    """Rows, the last one excluded."""
    teacher_begin: int
    """Where the first of them begins, counted from the begin of the message: 0 or less."""
    teacher_cut: int
    """1 where that is a space before the message, which the message then begins without."""
    student: tuple[int, int]
    """Tokens, the last one excluded."""
    student_begin: int
    """As `teacher_begin`."""
    student_cut: int
    """As `teacher_cut`."""
    is_whole: bool
    """Whether the last tokens on both sides end with the message."""


def _stretches(rows: StoredRows, start: int, stop: int, teacher: TokenTable) -> list[_Stretch]:
    """The stretches of a sequence's targets."""
    ids = rows.token_id[start:stop].astype(np.int64)
    usable = (teacher.kind[ids] == TEXT) & rows.is_target[start:stop]
    borders = np.flatnonzero(np.diff(usable.astype(np.int8), prepend=0, append=0))
    found = []
    for first, last in zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True):
        mine = ids[first:last]
        starts = np.append(0, np.cumsum(teacher.lengths[mine]))
        found.append(_Stretch(start + first, starts, teacher.text_of(mine)))
    return found


def _turns(
    text: str,
    spans: list[tuple[int, int]],
    theirs: list[_Stretch],
    ids: Ids,
    student: TokenTable,
) -> list[_Turn]:
    """Where each message stands on both sides; those after a sequence was cut are left out.

    Raises LeftOut if the tokens of either side do not say it.
    """
    data = text.encode()
    starts = _placed(ids, data, student)
    # A character begins at every byte but those that go on with one.
    heads = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)
    characters = np.append(heads, len(data))
    turns: list[_Turn] = []
    number, offset = 0, 0
    for begin, end in spans:
        first, last = int(characters[begin]), int(characters[end])
        said = data[first:last]
        place, length = -1, len(said)
        while number < len(theirs):
            place = theirs[number].text.find(said, offset)
            if place >= 0:
                break
            if number == len(theirs) - 1 and offset == 0:  # perhaps the sequence was cut in it
                head = theirs[number].text
                place = len(head) - len(head.lstrip())
                length = len(head) - place
                if length and said.startswith(head[place:]):
                    break
                place = -1
            number, offset = number + 1, 0
        if place < 0:
            if turns or not theirs:
                break  # the sequence was cut before it
            raise LeftOut(
                f"the teacher's targets do not say {said[:40].decode(errors='replace')!r}"
            )
        stretch = theirs[number]
        rows = _overlapping(stretch.starts, place, place + length)
        tokens = _overlapping(starts, first, first + length)
        is_whole = (
            length == len(said)
            and stretch.starts[rows[1]] == place + length
            and starts[tokens[1]] == first + length
        )
        if (student.kind[ids[slice(*tokens)]] == SPECIAL).any():
            raise LeftOut("what the assistant says holds a special token of the student's")
        begin_t, begin_s = int(stretch.starts[rows[0]]) - place, int(starts[tokens[0]]) - first
        turns.append(
            _Turn(
                teacher=(stretch.first + rows[0], stretch.first + rows[1]),
                teacher_begin=begin_t,
                teacher_cut=int(begin_t == -1 and stretch.text[place - 1 : place] == b" "),
                student=tokens,
                student_begin=begin_s,
                student_cut=int(begin_s == -1 and data[first - 1 : first] == b" "),
                is_whole=bool(is_whole),
            )
        )
        offset = place + length
    if not turns:
        raise LeftOut("no message of the assistant's is among the teacher's targets")
    return turns


def _overlapping(starts: Ids, begin: int, end: int) -> tuple[int, int]:
    """Which tokens hold bytes of [begin, end); `starts` has one more than there are."""
    first = int(np.searchsorted(starts, begin, side="right")) - 1
    return first, int(np.searchsorted(starts, end, side="left"))


def _placed(ids: Ids, data: bytes, student: TokenTable) -> Ids:
    """The byte of a rendered text at which each of the student's tokens begins, and the last ends.

    Special tokens are found by their names; what stands between two of them has to be the bytes of
    the tokens there, but for white space that special tokens swallow, or a space that is put there.
    Raises LeftOut if it is not.
    """
    special = np.flatnonzero(student.kind[ids] == SPECIAL).tolist()
    starts = np.zeros(len(ids) + 1, np.int64)
    at = token = 0
    for index in [*special, len(ids)]:
        name = student.names[int(ids[index])].encode() if index < len(ids) else b""
        stop = data.find(name, at) if name else len(data)
        mine = ids[token:index]
        joined, between = student.text_of(mine), data[at : max(stop, at)]
        put = int(joined.startswith(b" ") and not between.startswith(b" "))
        place = between.find(joined[put:])
        around = between[: max(place, 0)] + between[place + len(joined) - put :]
        if stop < 0 or place < 0 or around.strip():
            raise LeftOut(
                "the student's tokenizer changes the text: "
                f"{between[:40].decode(errors='replace')!r} comes back as "
                f"{joined[:40].decode(errors='replace')!r}"
            )
        begin = at + place - put
        starts[token : index + 1] = begin + np.append(0, np.cumsum(student.lengths[mine]))
        at, token = stop + len(name), index + 1
        if index < len(ids):
            starts[index], starts[index + 1] = stop, at
    return starts
