"""Sequences of plain text: their bytes from the teacher's ids, encoded by the student's tokenizer.

What is special on the teacher's side becomes the student's token of the same role, or keeps the
sequence out: it never reaches the student as text.
"""

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from decant.storage import StoredRows
from decant.student_train.alignment.encoder import Encoder
from decant.student_train.alignment.events import Matching
from decant.student_train.alignment.pieces import Pieces
from decant.student_train.alignment.token_bytes import NO_BYTES, TEXT, TokenTable, ranges

LONGEST_CHARACTER = 4
"""Bytes of UTF-8."""


class LeftOut(Exception):
    """Why a sequence cannot be aligned."""


class _Part(NamedTuple):
    """What becomes a piece."""

    first: int
    """Its first row."""
    number: int
    """Rows."""
    token: int
    """The student's token for a special one; -1 for text, BEGIN for what begins every text."""
    cut: int
    """Bytes at the begin of the first token that are no part of the text."""
    begin: int
    """Bytes of a character that is not whole before the text."""
    text: str


BEGIN = -2
NOTHING = np.zeros(0, np.int64)


def text_pieces(
    pieces: Pieces, rows: StoredRows, sequences: list[int], matching: Matching, encode: Encoder
) -> dict[int, str]:
    """Add the pieces of these sequences, in order; return why some of them have none."""
    student = matching.student
    planned, reasons = _planned(rows, sequences, matching)
    found = iter(encode([part.text for parts in planned.values() for part in parts if part.text]))
    encoded = {
        sequence: [next(found) if part.text else NOTHING for part in parts]
        for sequence, parts in planned.items()
    }
    flat = np.concatenate([NOTHING, *itertools.chain.from_iterable(encoded.values())])
    data = student.text_of(flat)
    ends = np.append(0, np.cumsum(student.lengths[flat])).tolist()
    at = 0
    for sequence, parts in planned.items():
        cuts, changed = [], ""
        for part, ids in zip(parts, encoded[sequence], strict=True):
            back, expected = data[ends[at] : ends[at + len(ids)]], part.text.encode()
            at += len(ids)
            cuts.append(int(student.adds_space and back == b" " + expected))
            if back[cuts[-1] :] != expected and not changed:
                changed = _difference(expected, back)
        if changed:
            reasons[sequence] = changed
            continue
        if student.puts_bos:
            pieces.add(sequence, np.array([student.bos]))
        for part, ids, cut in zip(parts, encoded[sequence], cuts, strict=True):
            if part.token >= 0:
                token = np.array([part.token])
                pieces.add(sequence, token, is_special=True, teacher=(part.first, 1))
            elif len(ids):
                pieces.add(
                    sequence,
                    ids,
                    teacher=(part.first, part.number),
                    teacher_cut=part.cut,
                    student_begin=part.begin,
                    student_cut=cut,
                )
    return reasons


def _planned(
    rows: StoredRows, sequences: list[int], matching: Matching
) -> tuple[dict[int, list[_Part]], dict[int, str]]:
    """The parts of each sequence, or why it has none."""
    teacher = matching.teacher
    ids = rows.token_id.astype(np.int64)
    kind = teacher.kind[ids]
    is_text = kind == TEXT
    is_border = np.ones(len(ids), np.bool_)
    is_border[1:] = ~(is_text[1:] & is_text[:-1])
    is_border[rows.row_starts[:-1]] = True
    borders = np.append(np.flatnonzero(is_border), len(ids))
    lengths = np.where(is_text, teacher.lengths[ids], 0)
    data = teacher.data[ranges(teacher.starts[ids], lengths)].tobytes()
    ends = np.append(0, np.cumsum(lengths))
    places = np.searchsorted(borders, rows.row_starts)
    planned: dict[int, list[_Part]] = {}
    reasons = _swallowing(rows, sequences, teacher)
    for sequence in sequences:
        if sequence in reasons:
            continue
        mine = borders[places[sequence] : places[sequence + 1] + 1].tolist()
        parts: list[_Part] = []
        try:
            for first, stop in itertools.pairwise(mine):
                if is_text[first]:
                    is_begin = not parts or (len(parts) == 1 and parts[0].token == BEGIN)
                    puts = teacher.puts_space if is_begin else teacher.puts_space_again
                    raw = data[ends[first] : ends[stop]]
                    cut = int(puts and raw.startswith(b" "))
                    begin, text = _whole(raw[cut:])
                    parts.append(_Part(first, stop - first, -1, cut, begin, text))
                else:
                    token = _counterpart(ids, kind, first, not parts, matching)
                    parts.append(_Part(first, 1, token, 0, 0, ""))
        except LeftOut as reason:
            reasons[sequence] = str(reason)
        else:
            planned[sequence] = parts
    return planned, reasons


def _swallowing(rows: StoredRows, sequences: list[int], teacher: TokenTable) -> dict[int, str]:
    """Sequences with a token that takes white space along, so that the text is not known."""
    if not len(teacher.swallows):
        return {}
    found: dict[int, str] = {}
    places = np.flatnonzero(np.isin(rows.token_id, teacher.swallows))
    wanted = set(sequences)
    for place in places.tolist():
        sequence = int(np.searchsorted(rows.row_starts, place, side="right")) - 1
        index = int(rows.token_id[place])
        name = teacher.names.get(index) or teacher.text_of(np.array([index])).decode()
        if sequence in wanted:
            found.setdefault(
                sequence,
                f"the teacher's token {name} swallows white space beside it (lstrip or rstrip in "
                "its tokenizer), so what was there is unknown",
            )
    return found


def _counterpart(
    ids: NDArray[np.int64], kind: NDArray[np.int8], row: int, is_first: bool, matching: Matching
) -> int:
    """The student's token of the same role as a special one; BEGIN where each side has its own."""
    teacher, index = matching.teacher, int(ids[row])
    if kind[row] == NO_BYTES:
        raise LeftOut(f"the teacher's token {index} stands for no bytes that are known")
    if index == teacher.unk:
        raise LeftOut(
            f"the teacher's token {teacher.names[index]} stands for text that its vocabulary "
            "cannot say, so what was there is unknown"
        )
    if is_first and index == teacher.bos:
        return BEGIN
    if matching.pairs[index] < 0:
        raise LeftOut(
            f"the teacher's special token {teacher.names.get(index, str(index))} has no "
            "counterpart in the student's tokenizer. If it is of a chat template: the messages of "
            "this sequence are unknown; write them with `decant messages` and name the file in "
            "align.messages"
        )
    return int(matching.pairs[index])


def _whole(raw: bytes) -> tuple[int, str]:
    """The text of bytes without what was cut off of characters at its ends; the bytes before it.

    Raises LeftOut where they are no text.
    """
    begin = 0
    while begin < min(len(raw), LONGEST_CHARACTER - 1) and raw[begin] & 0xC0 == 0x80:
        begin += 1
    for stop in range(len(raw), max(begin, len(raw) - LONGEST_CHARACTER), -1):
        try:
            return begin, raw[begin:stop].decode()
        except UnicodeDecodeError as error:
            wrong = error
    if len(raw) - begin < LONGEST_CHARACTER:
        return begin, ""
    raise LeftOut(f"the teacher's tokens join to bytes that are no text: {wrong}")


def _difference(expected: bytes, back: bytes) -> str:
    """What a tokenizer made of a text, around the first byte that differs."""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, back, strict=False)) if a != b),
        min(len(expected), len(back)),
    )
    start = max(0, at - 10)
    ours, theirs = (x[start : at + 20].decode(errors="replace") for x in (expected, back))
    return f"the student's tokenizer changes the text: {ours!r} comes back as {theirs!r}"
