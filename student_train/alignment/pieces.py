"""Pieces of sequences: what lies between special tokens, in the tokens of either side.

A piece is a stretch of bytes, or one special token that stands for one byte. Producers of pieces
say which of the teacher's rows and which student's ids are in each; here they become one line of
positions. Python objects are per piece, never per token.
"""

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from decant.student_train.alignment.chunks import Chunks, chunks_of
from decant.student_train.alignment.token_bytes import TokenTable, ranges

Ids = NDArray[np.int64]


@dataclass(slots=True)
class Pieces:
    """Pieces in the order of the sequences, a column each."""

    sequence: list[int] = field(default_factory=list)
    """Which sequence it is in; never less than before."""
    is_special: list[bool] = field(default_factory=list)
    """Whether it is one special token on either side."""
    teacher_row: list[int] = field(default_factory=list)
    """The row of its first token on the teacher's side."""
    num_teacher: list[int] = field(default_factory=list)
    """How many rows it has, perhaps none."""
    teacher_begin: list[int] = field(default_factory=list)
    """The byte of the piece at which the first of them begins, perhaps below 0."""
    teacher_cut: list[int] = field(default_factory=list)
    """Bytes that the first of them has too many: 1 for a space that a tokenizer puts."""
    num_student: list[int] = field(default_factory=list)
    """How many of the student's tokens it has, perhaps none."""
    student_begin: list[int] = field(default_factory=list)
    """As `teacher_begin`."""
    student_cut: list[int] = field(default_factory=list)
    """As `teacher_cut`."""
    student_ids: list[Ids] = field(default_factory=list)
    """The student's tokens of each piece."""

    def add(
        self,
        sequence: int,
        student_ids: Ids,
        *,
        is_special: bool = False,
        teacher: tuple[int, int] = (0, 0),
        teacher_begin: int = 0,
        teacher_cut: int = 0,
        student_begin: int = 0,
        student_cut: int = 0,
    ) -> None:
        """Add a piece; `teacher` are its first row and the number of rows."""
        self.sequence.append(sequence)
        self.is_special.append(is_special)
        self.teacher_row.append(teacher[0])
        self.num_teacher.append(teacher[1])
        self.teacher_begin.append(teacher_begin)
        self.teacher_cut.append(teacher_cut)
        self.num_student.append(len(student_ids))
        self.student_begin.append(student_begin)
        self.student_cut.append(student_cut)
        self.student_ids.append(student_ids)

    def in_order(self) -> "Pieces":
        """The same, sequence after sequence."""
        order = sorted(range(len(self.sequence)), key=self.sequence.__getitem__)
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Pieces(**{name: [column[i] for i in order] for name, column in columns.items()})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Side:
    """The tokens of one side that lie in pieces, in order."""

    ids: Ids
    """[n] vocabulary ids."""
    where: Ids
    """[n] the row of the cache, or the index among all of the student's tokens."""
    starts: Ids
    """[n] first byte, on the line of all pieces."""
    ends: Ids
    """[n] the byte behind the last."""
    cut: Ids
    """[n] bytes that the token has and the text has not, at its begin."""

    @staticmethod
    def of(
        ids: Ids,
        where: Ids,
        piece: Ids,
        table: TokenTable,
        special: NDArray[np.bool_],
        begins: Ids,
        cuts: Ids,
    ) -> "Side":
        """Place tokens, given the piece of each; begins and cuts are of the pieces."""
        lengths = np.where(special[piece], 1, table.lengths[ids])
        is_first = np.ones(len(ids), np.bool_)
        is_first[1:] = piece[1:] != piece[:-1]
        cut = np.where(is_first, cuts[piece], 0)
        lengths -= cut
        ends = np.cumsum(lengths)
        first = np.flatnonzero(is_first)
        numbers = np.diff(np.append(first, len(ids)))
        shift = begins[piece[first]] - (ends[first] - lengths[first])
        ends += np.repeat(shift, numbers)
        return Side(ids=ids, where=where, starts=ends - lengths, ends=ends, cut=cut)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Aligned:
    """Both sides of some sequences, and their chunks."""

    teacher: Side
    student: Side
    chunks: Chunks
    token_ids: NDArray[np.int32]
    """All of the student's tokens, sequence after sequence."""
    row_starts: Ids
    """[S+1] those of sequence s are token_ids[row_starts[s]:row_starts[s+1]]."""


def aligned(
    pieces: Pieces, num_sequences: int, teacher_ids: Ids, teacher: TokenTable, student: TokenTable
) -> Aligned:
    """Lay the pieces in one line and cut it into chunks; `teacher_ids` are those of all rows."""
    sequence = np.array(pieces.sequence, np.int64)
    special = np.array(pieces.is_special, np.bool_)
    row, num_teacher = np.array(pieces.teacher_row, int), np.array(pieces.num_teacher, int)
    num_student = np.array(pieces.num_student, np.int64)
    begin_t, begin_s = np.array(pieces.teacher_begin, int), np.array(pieces.student_begin, int)
    cut_t, cut_s = np.array(pieces.teacher_cut, int), np.array(pieces.student_cut, int)
    student_ids = np.concatenate([*pieces.student_ids, np.zeros(0, np.int64)])
    number = np.arange(len(sequence))
    piece_t, piece_s = np.repeat(number, num_teacher), np.repeat(number, num_student)
    rows = ranges(row, num_teacher)
    ids_t = teacher_ids[rows]

    def spans(ids: Ids, piece: Ids, table: TokenTable, begins: Ids) -> Ids:
        lengths = np.where(special[piece], 1, table.lengths[ids])
        return begins + np.bincount(piece, lengths, len(number)).astype(np.int64)

    ends = np.maximum(
        spans(ids_t, piece_t, teacher, begin_t), spans(student_ids, piece_s, student, begin_s)
    )
    lowest = np.minimum(np.minimum(begin_t, begin_s), 0)
    width = ends - lowest + 1  # a byte between pieces, which no chunk crosses
    base = np.cumsum(width) - width - lowest
    teacher_side = Side.of(ids_t, rows, piece_t, teacher, special, base + begin_t, cut_t)
    student_side = Side.of(
        student_ids, np.arange(len(student_ids)), piece_s, student, special, base + begin_s, cut_s
    )
    starts = np.zeros(num_sequences + 1, np.int64)
    starts[1:] = np.cumsum(np.bincount(sequence, num_student, num_sequences))
    return Aligned(
        teacher=teacher_side,
        student=student_side,
        chunks=chunks_of(
            teacher_side.starts, teacher_side.ends, student_side.starts, student_side.ends
        ),
        token_ids=student_ids.astype(np.int32),
        row_starts=starts,
    )
