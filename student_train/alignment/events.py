"""The teacher's side of events: which of its kept ids complete a chunk as a student's token does.

The maths stand in docs/losses.md. Everything is a column over chunks, in float64 until it is kept.
Shapes: C chunks, K kept ids, E = K + 1 slots: the last is the observed completion where its token
is not among the kept ids.
"""

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decant.storage.cache.rows import Rows
from decant.student_train.alignment.pieces import Aligned
from decant.student_train.alignment.token_bytes import TEXT, TokenTable, ranges

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Events:
    """The events of C chunks."""

    token_ids: NDArray[np.int32]
    """[C, E] the student's last token of each event, -1 in unused slots, none twice in a row."""
    log_p: NDArray[np.floating]
    """[C, E] log P of each event, -inf in unused slots."""
    log_rest: NDArray[np.floating]
    """[C] log P of all the rest."""
    observed: NDArray[np.floating]
    """[C] log prob of the chunk's own tokens."""
    kept_mass: NDArray[np.float64]
    """[C] what the kept ids at the last token hold."""
    found_mass: NDArray[np.float64]
    """[C] what of it has an event."""


class Matching:
    """Two vocabularies, and which token of one completes what a token of the other does."""

    def __init__(self, teacher: TokenTable, student: TokenTable) -> None:
        self.teacher, self.student = teacher, student
        self.pairs = teacher.paired_with(student)
        """[V] the student's token for each of the teacher's, or -1."""
        # Tables of kept ids: the last entry is that of -1, an unused slot.
        self._pairs_of_kept = np.append(self.pairs, np.int32(-1))
        lengths = np.where(teacher.kind == TEXT, teacher.lengths, 0)
        self._lengths_of_kept = np.append(lengths, 0).astype(np.int32)
        data = np.append(teacher.data, np.uint8(0))
        self._first_of_kept = np.append(data[teacher.starts[:-1]], np.uint8(0))

    def with_ends(self, ends: dict[int, int]) -> "Matching":
        """The same where these tokens of the teacher's and the student's end turns."""
        pairs = self._pairs_of_kept
        if all(pairs[theirs] == ours for theirs, ours in ends.items()):
            return self
        pairs = pairs.copy()
        for theirs, ours in ends.items():
            pairs[pairs == ours] = -1
            pairs[theirs] = ours
        changed = copy.copy(self)
        changed._pairs_of_kept = pairs
        return changed

    def completions(self, kept: NDArray[np.int32], ends: "_Ends", one: Ids) -> NDArray[np.int32]:
        """[C, K] the student's token w of each kept v, or -1; `one` are the chunks of 1:1."""
        found = np.full(kept.shape, -1, np.int32)
        if not kept.shape[1]:
            return found
        found[one] = self._pairs_of_kept[kept[one]]
        others = np.setdiff1d(np.arange(len(kept)), one, assume_unique=True)
        if len(others):
            found[others] = self._by_bytes(kept[others], ends[others])
        return found

    def _by_bytes(self, kept: NDArray[np.int32], ends: "_Ends") -> NDArray[np.int32]:
        teacher, student = self.teacher, self.student
        # Bytes that v has to begin with, which are those of t_M; below 0: bytes that go before it.
        ahead = ends.student_before - ends.teacher_before + ends.teacher_cut
        usable = self._lengths_of_kept[kept] > np.maximum(ahead, 0)[:, None]
        starts_alike = self._first_of_kept[kept] == self._first_of_kept[ends.teacher_id][:, None]
        usable &= starts_alike | (ahead <= 0)[:, None]
        place = np.flatnonzero(usable)
        row = np.repeat(np.arange(len(kept)), np.count_nonzero(usable, axis=1))
        v = kept.ravel()[place].astype(np.int64)
        ahead = ahead[row]
        found = np.full(kept.size, -1, np.int32)

        begins = np.flatnonzero(ahead >= 0)
        head = teacher.beginnings(v[begins], ahead[begins])
        same = head == teacher.beginnings(ends.teacher_id[row[begins]], ahead[begins])
        begins, head = begins[same], head[same]
        r, ids = row[begins], v[begins]
        power = teacher.powers[teacher.lengths[ids] - ahead[begins]]
        space = student.beginnings(ends.student_id[r], ends.student_cut[r])
        found[place[begins]] = student.find(space * power + (teacher.hashes[ids] - head * power))

        behind = np.flatnonzero(ahead < 0)
        r, ids = row[behind], v[behind]
        head = student.beginnings(ends.student_id[r], ends.student_cut[r] - ahead[behind])
        power = teacher.powers[teacher.lengths[ids]]
        found[place[behind]] = student.find(head * power + teacher.hashes[ids])
        found = found.reshape(kept.shape)
        return without_repeats(found) if teacher.has_repeats else found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Ends:
    """The last tokens of C chunks."""

    teacher_id: Ids
    student_id: Ids
    teacher_before: Ids
    """Bytes of the chunk before the teacher's last token."""
    student_before: Ids
    teacher_cut: Ids
    """Bytes that the token has and the text has not."""
    student_cut: Ids

    def __getitem__(self, which: Ids) -> "_Ends":
        return _Ends(**{name: getattr(self, name)[which] for name in self.__slots__})


def events_of(both: Aligned, rows: Rows, matching: Matching) -> Events:
    """The events of the chunks of `both`, all of whose teacher's tokens are targets of `rows`.

    In the precision of the rows' log probs, which is float32 in every cache.
    """
    precision = rows.label_logprob.dtype
    chunks, teacher, student = both.chunks, both.teacher, both.student
    last_t = chunks.teacher_first + chunks.num_teacher - 1
    last_s = chunks.student_first + chunks.num_student - 1
    target_of_row = np.cumsum(rows.is_target) - 1
    targets = target_of_row[teacher.where[last_t]]
    ends = _Ends(
        teacher_id=teacher.ids[last_t],
        student_id=student.ids[last_s],
        teacher_before=teacher.starts[last_t] - chunks.starts,
        student_before=student.starts[last_s] - chunks.starts,
        teacher_cut=teacher.cut[last_t],
        student_cut=student.cut[last_s],
    )
    is_one = (chunks.num_teacher == 1) & (chunks.num_student == 1)
    is_one &= ends.teacher_cut == ends.student_cut
    label = rows.label_logprob[targets].astype(np.float64)
    pi = _sum_before_last(both, rows.label_logprob, target_of_row)

    kept = rows.token_ids[targets]
    num_slots = kept.shape[1]
    ids = np.full((len(chunks), num_slots + 1), -1, np.int32)
    ids[:, :num_slots] = matching.completions(kept, ends, np.flatnonzero(is_one))
    is_kept = _observe(ids, kept, ends)
    extra = ~is_kept & (~is_one | (ids < 0).all(axis=1))
    ours = ids[extra]
    ours[ours == ends.student_id[extra, None]] = -1
    ours[:, num_slots] = ends.student_id[extra]
    ids[extra] = ours
    is_unused = ids < 0

    log_p = np.empty(ids.shape, precision)
    if rows.logprobs is None:
        assert not num_slots  # labels alone: all that is not the label is the rest
        kept_mass = found_mass = np.zeros(len(chunks))
        with np.errstate(divide="ignore"):
            log_rest = log_complement(label)
    else:
        assert rows.log_tail is not None
        log_tail = rows.log_tail[targets, 0].astype(np.float64)
        log_p[:, :num_slots] = rows.logprobs[targets]
        without = is_unused[:, :num_slots]
        row = np.repeat(np.arange(len(chunks)), np.count_nonzero(without, axis=1))
        unmatched = np.bincount(row, np.exp(log_p[:, :num_slots][without]), len(chunks))
        rest = unmatched + np.exp(log_tail)
        rest[extra] -= np.exp(label[extra])
        kept_mass = -np.expm1(np.minimum(log_tail, 0))
        found_mass = kept_mass - unmatched
        with np.errstate(divide="ignore"):
            log_rest = np.log(np.maximum(rest, 0))
        as_stored = (unmatched == 0) & ~extra
        log_rest[as_stored] = log_tail[as_stored]
    log_p[extra, num_slots] = label[extra]
    log_p[is_unused] = -np.inf
    several = np.flatnonzero(pi < 0)
    log_p[several] += pi[several, None].astype(precision)
    with np.errstate(divide="ignore"):
        log_rest[several] = np.logaddexp(
            log_complement(pi[several]), pi[several] + log_rest[several]
        )
    return Events(
        token_ids=ids,
        log_p=log_p,
        log_rest=log_rest.astype(precision),
        observed=(pi + label).astype(precision),
        kept_mass=kept_mass,
        found_mass=found_mass,
    )


def log_complement(log_mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(1 - e^x) for x <= 0, without cancellation; -inf at 0."""
    log_mass = np.minimum(log_mass, 0.0)
    return np.log(-np.expm1(log_mass))


def without_repeats(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Rows of ids in which each stands once, where it first stood; -1 in the other places."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    row, place = np.nonzero((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
    ids = ids.copy()
    ids[row, order[row, place + 1]] = -1
    return ids


def _observe(ids: NDArray[np.int32], kept: NDArray[np.int32], ends: _Ends) -> NDArray[np.bool_]:
    """Make the observed completion an event wherever its token is kept; [C] whether it is."""
    is_label = kept == ends.teacher_id[:, None].astype(np.int32)
    is_kept = is_label.any(axis=1)
    row = np.flatnonzero(is_kept)
    if not len(row):
        return is_kept
    slot = is_label[row].argmax(axis=1)
    wrong = ids[row, slot] != ends.student_id[row]
    row, slot = row[wrong], slot[wrong]
    ours = ids[row]
    ours[ours == ends.student_id[row, None]] = -1
    ours[np.arange(len(row)), slot] = ends.student_id[row]
    ids[row] = ours
    return is_kept


def _sum_before_last(
    both: Aligned, label_logprob: NDArray, target_of_row: Ids
) -> NDArray[np.float64]:
    """[C] log prob of the teacher's tokens before the last of each chunk."""
    chunks = both.chunks
    number = chunks.num_teacher - 1
    tokens = ranges(chunks.teacher_first, number)
    chunk = np.repeat(np.arange(len(chunks)), number)
    values = label_logprob[target_of_row[both.teacher.where[tokens]]].astype(np.float64)
    return np.bincount(chunk, values, len(chunks))
