"""Chunks: the shortest stretches of bytes that both tokenisations of a text begin and end together.

Positions are bytes. Several texts lie one after the other in one line of positions, with a gap of
at least one between them, so that no chunk reaches from one into the next.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chunks:
    """C chunks in the order of the text; token indices are those of the arrays they were cut of."""

    starts: Positions
    """[C] first byte."""
    ends: Positions
    """[C] the byte behind the last."""
    teacher_first: Positions
    """[C] index of the first of the teacher's tokens."""
    num_teacher: Positions
    """[C] M: how many they are, at least 1."""
    student_first: Positions
    """[C] index of the first of the student's tokens."""
    num_student: Positions
    """[C] N: how many they are, at least 1."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, which: NDArray) -> "Chunks":
        """Some of them, by mask or index."""
        return Chunks(**{name: getattr(self, name)[which] for name in self.__slots__})


def chunks_of(
    teacher_starts: Positions,
    teacher_ends: Positions,
    student_starts: Positions,
    student_ends: Positions,
) -> Chunks:
    """Cut where both have a boundary; tokens [start, end) of each side are given in order.

    Stretches that one side does not cover, or not to its ends, are in no chunk. A token without
    bytes belongs to the chunk that begins where it stands.
    """
    size = 2 + max(
        int(teacher_ends.max(initial=0)), int(student_ends.max(initial=0))
    )  # every position, and one behind
    cuts = np.flatnonzero(
        _marked(size, teacher_starts, teacher_ends) & _marked(size, student_starts, student_ends)
    )
    begins, stops = cuts[:-1], cuts[1:]
    teacher_first, num_teacher = _inside(teacher_starts, begins, stops)
    student_first, num_student = _inside(student_starts, begins, stops)
    chunks = Chunks(
        starts=begins,
        ends=stops,
        teacher_first=teacher_first,
        num_teacher=num_teacher,
        student_first=student_first,
        num_student=num_student,
    )
    chunks = chunks[(num_teacher > 0) & (num_student > 0)]
    whole = _covers(chunks.teacher_first, chunks.num_teacher, chunks, teacher_starts, teacher_ends)
    whole &= _covers(chunks.student_first, chunks.num_student, chunks, student_starts, student_ends)
    return chunks[whole]


def _marked(size: int, starts: Positions, ends: Positions) -> NDArray[np.bool_]:
    """[size] where tokens begin or end."""
    marks = np.zeros(size, np.bool_)
    marks[starts] = True
    marks[ends] = True
    return marks


def _inside(
    token_starts: Positions, begins: Positions, stops: Positions
) -> tuple[Positions, Positions]:
    """Of the tokens that start in each stretch, the first and the number."""
    first = np.searchsorted(token_starts, begins, side="left")
    return first, np.searchsorted(token_starts, stops, side="left") - first


def _covers(
    first: Positions, number: Positions, chunks: Chunks, starts: Positions, ends: Positions
) -> NDArray[np.bool_]:
    """Whether the tokens of each chunk fill it."""
    return (starts[first] == chunks.starts) & (ends[first + number - 1] == chunks.ends)
