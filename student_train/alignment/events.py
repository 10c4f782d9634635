"""The teacher's side of events: which of its kept ids complete a chunk as a student's token does.

The maths stand in docs/losses.md. Everything is a column over chunks, in float64 until it is kept.
Shapes: C chunks, K kept ids, E slots: K, and one more where an observed completion needs it.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Distributions
from decant.storage.cache.logprobs import empty
from decant.student_train.alignment.pieces import Aligned
from decant.student_train.alignment.token_bytes import TEXT, TokenTable, ranges

Ids = NDArray[np.int64]
_FIRST_BYTES = np.array([0, 0xFF, 0xFFFF], np.int32)
"""The bits of none, of one and of two."""


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
        data = np.append(teacher.data, np.zeros(2, np.uint8)).astype(np.int64)
        first, second = (data[teacher.starts[:-1] + i] for i in (0, 1))
        # The first two bytes in the low bits, the length in the high ones.
        heads = np.minimum(lengths, 0x7FFF) << 16 | second << 8 | first
        self._heads_of_kept = np.append(heads, 0).astype(np.int32)

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

    def completions(
        self, kept: NDArray[np.int32], ends: "_Ends", is_one: NDArray[np.bool_]
    ) -> NDArray[np.int32]:
        """[C, K] the student's token w of each kept v, or -1; `is_one` [C]: the chunks of 1:1."""
        found = empty(kept.shape, np.int32)
        if not kept.shape[1]:
            return found
        np.take(self._pairs_of_kept, kept, out=found, mode="wrap")
        others = np.flatnonzero(~is_one)
        if len(others):
            found[others] = self._by_bytes(kept[others], ends[others])
        return found

    def _by_bytes(self, kept: NDArray[np.int32], ends: "_Ends") -> NDArray[np.int32]:
        teacher, student = self.teacher, self.student
        # Bytes that v has to begin with, which are those of t_M; below 0: bytes that go before it.
        ahead = ends.student_before - ends.teacher_before + ends.teacher_cut
        heads = np.take(self._heads_of_kept, kept, mode="wrap")
        longer = np.maximum(ahead, 0) << 16 | 0xFFFF
        usable = heads > longer.astype(np.int32)[:, None]
        heads ^= self._heads_of_kept[ends.teacher_id][:, None]
        heads &= _FIRST_BYTES[np.clip(ahead, 0, 2)][:, None]
        usable &= heads == 0
        place = np.flatnonzero(usable)
        row = np.repeat(np.arange(len(kept)), np.count_nonzero(usable, axis=1))
        v = kept.ravel()[place].astype(np.int64)
        ahead = ahead[row]
        found: NDArray[np.int32] = np.full(kept.size, -1, np.int32)

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


def events_of(
    both: Aligned,
    at_ends: Distributions[NDArray[Any]],
    label_logprob: NDArray[np.floating],
    matching: Matching,
) -> Events:
    """The events of C chunks, in the precision of the log probs: float32 in every cache.

    `at_ends` are the teacher's distributions of the last token of each chunk, `label_logprob` its
    log probs of the actual tokens of all rows.
    """
    chunks, teacher, student = both.chunks, both.teacher, both.student
    precision = at_ends.label_logprob.dtype
    last_t = chunks.teacher_first + chunks.num_teacher - 1
    last_s = chunks.student_first + chunks.num_student - 1
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
    label = at_ends.label_logprob.astype(np.float64)
    pi = _sum_before_last(both, label_logprob)

    ids = matching.completions(at_ends.token_ids, ends, is_one)
    is_kept = _observe(ids, at_ends.token_ids, ends)
    extra = np.flatnonzero(~is_kept & (~is_one | (ids < 0).all(axis=1)))
    ids, slot = _with_observed(ids, extra, ends.student_id)
    is_unused = ids < 0

    if at_ends.logprobs is None:  # labels alone: all that is not the label is the rest
        log_p = np.empty(ids.shape, precision)
        kept_mass = found_mass = np.zeros(len(chunks))
        with np.errstate(divide="ignore"):
            log_rest = log_complement(label)
    else:
        assert at_ends.log_tail is not None
        log_p, num_slots = at_ends.logprobs, at_ends.logprobs.shape[1]
        if ids.shape[1] > num_slots:
            log_p = np.pad(log_p, ((0, 0), (0, 1)), constant_values=-np.inf)
        log_tail = at_ends.log_tail[:, 0].astype(np.float64)
        mass = np.exp(log_p)
        mass *= is_unused
        unmatched = np.einsum("ce->c", mass).astype(np.float64)
        unmatched[extra] += np.exp(log_p[extra, slot])  # of the id whose slot was taken
        rest = unmatched + np.exp(log_tail)
        rest[extra] -= np.exp(label[extra])
        kept_mass = -np.expm1(np.minimum(log_tail, 0))
        found_mass = kept_mass - unmatched
        with np.errstate(divide="ignore"):
            log_rest = np.log(np.maximum(rest, 0))
        as_stored = unmatched == 0
        as_stored[extra] = False
        log_rest[as_stored] = log_tail[as_stored]
    # By index: masks of many changes are several times slower.
    log_p.reshape(-1)[np.flatnonzero(is_unused)] = -np.inf
    log_p[extra, slot] = label[extra]
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


def last_rows(both: Aligned) -> Ids:
    """[C] the row of the teacher's last token of each chunk."""
    last = both.chunks.teacher_first + both.chunks.num_teacher - 1
    return both.teacher.where[last]


def _with_observed(
    ids: NDArray[np.int32], extra: Ids, student_id: Ids
) -> tuple[NDArray[np.int32], Ids]:
    """Make the observed completion of these chunks an event in a slot that has none.

    A column is added where there is a chunk without one. Returns also the slots.
    """
    ours = ids[extra]
    ours[ours == student_id[extra, None]] = -1
    if not (ours < 0).any(axis=1).all():
        ids, ours = (np.pad(x, ((0, 0), (0, 1)), constant_values=-1) for x in (ids, ours))
    slot = ours.shape[1] - 1 - (ours[:, ::-1] < 0).argmax(axis=1) if len(extra) else extra
    ours[np.arange(len(extra)), slot] = student_id[extra]
    ids[extra] = ours
    return ids, slot


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
    is_kept = np.zeros(len(kept), np.bool_)
    if not kept.shape[1]:
        return is_kept
    place = np.flatnonzero(kept == ends.teacher_id[:, None].astype(np.int32))  # one in a row
    row, slot = np.divmod(place, kept.shape[1])
    is_kept[row] = True
    wrong = ids[row, slot] != ends.student_id[row]
    row, slot = row[wrong], slot[wrong]
    ours = ids[row]
    ours[ours == ends.student_id[row, None]] = -1
    ours[np.arange(len(row)), slot] = ends.student_id[row]
    ids[row] = ours
    return is_kept


def _sum_before_last(both: Aligned, label_logprob: NDArray) -> NDArray[np.float64]:
    """[C] log prob of the teacher's tokens before the last of each chunk."""
    chunks = both.chunks
    number = chunks.num_teacher - 1
    tokens = ranges(chunks.teacher_first, number)
    chunk = np.repeat(np.arange(len(chunks)), number)
    sums = np.bincount(chunk, label_logprob[both.teacher.where[tokens]], len(chunks))
    return sums.astype(np.float64)
