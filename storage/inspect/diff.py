"""Two caches of the same data: where two teachers, two k or two precisions say something else.

For one target let A keep the ids S_a with probabilities p and leave r_a to its tail, B the ids S_b
with q and r_b. Both are known on I = S_a and S_b together, and so is what each gives to all else:

    p_* = r_a + sum_{S_a without I} p        q_* = r_b + sum_{S_b without I} q

I and the bucket `*` are the finest classes of which both probabilities are known: of an id that one
of them does not keep, only a bound is. Over these classes

    KL(A || B) = sum (p log(p/q) - p + q) over I and *,   and KL(B || A) likewise.

It is the generalised KL, as in the decoding error: what is decoded sums to 1 only within its
rounding, at T=1 with f16 and at other temperatures with both codes, and p log(p/q) alone takes what
is missing from 1 for a divergence, of either sign. No term is below 0, and it is 0 only at p = q.
Neither exceeds the KL over the vocabulary (it is an f-divergence of measures, so data processing
holds: Csiszar, 1967), and both reach it when the tails have the same shape. `common_mass` says how
much of A and of B lies in I. An empty bucket counts as e^-87, as in the losses.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Distributions, FormatError, Manifest, ScoredSequence
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.same_tokenizer import same_ids
from decant.storage.inspect.examples import (
    Target,
    read_tokenizer,
    target,
    with_texts,
)
from decant.storage.inspect.report import Spread
from decant.storage.inspect.sketches import Quantity
from decant.storage.inspect.statistics import WORST
from decant.storage.inspect.truncation_cost import LOWEST_TAIL

BLOCK = 2048
"""Targets compared at a time, at least."""
ENTRIES = 3
SLOT_BITS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class AtTemperatureDiff:
    """How far apart the distributions are at a temperature that both caches store."""

    temperature: float
    kl_ab: Spread
    """Generalised KL(A || B) per target over the common entries and one bucket, nats."""
    kl_ba: Spread
    """KL(B || A)."""
    common_mass_a: Spread
    """Of the ids that both keep, under A."""
    common_mass_b: Spread


@dataclass(frozen=True, kw_only=True, slots=True)
class DifferingTarget:
    """A target that the two see differently."""

    kl_ab: float
    """At T=1."""
    kl_ba: float
    a: Target
    b: Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What `diff` found; A is the first cache."""

    url_a: str
    url_b: str
    sequences: int
    targets: int
    """Targets of both; everything below is of these."""
    targets_only_a: int
    """Tokens that are a target in A alone."""
    targets_only_b: int
    top1_agreement: float | None
    """Share of targets with the same first entry. This and all that takes log probs is None or
    empty where one of the two stores none of kept entries."""
    same_ids: float | None
    """Share of A's kept ids that B keeps too, or the other way round: the larger of the two; None
    where one keeps none."""
    teacher_ce_a: float | None
    """Mean of -label_logprob, nats."""
    teacher_ce_b: float | None
    label_difference: Spread | None
    """Absolute difference of `label_logprob`, nats."""
    logprob_difference: Spread | None
    """Largest absolute difference of a common entry's log prob in each target, nats."""
    temperatures: tuple[AtTemperatureDiff, ...]
    worst_targets: tuple[DifferingTarget, ...]
    """The 20 of the largest KL(A || B) + KL(B || A) at T=1, worst first."""


_Block = Distributions[NDArray[Any]]
"""Targets of whole sequences of one cache, or a run of them."""


def diff(
    url_a: str | os.PathLike[str],
    url_b: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compare two complete caches of the same sequences, target by target, in bounded memory.

    `progress` is called with (sequences done, sequences in all). Raises ValueError, with the first
    difference, if they are not of the same sequences or ids; FormatError if one is damaged.
    """
    readers = CacheReader(url_a), CacheReader(url_b)
    _check_comparable(readers[0], readers[1])
    sums = _Sums(readers[0].manifest, readers[1].manifest)
    waiting: list[tuple[int, ScoredSequence, ScoredSequence]] = []
    size, total = 0, len(readers[0])
    for index, (a, b) in enumerate(zip(*readers, strict=True)):
        _check_same(readers[0], readers[1], index, a, b)
        waiting.append((index, a, b))
        size += a.num_targets
        if size >= BLOCK:
            sums.add(waiting)
            waiting, size = [], 0
        if progress:
            progress(index + 1, total)
    if waiting:
        sums.add(waiting)
    return sums.result(readers[0], readers[1])


def _check_comparable(a: CacheReader, b: CacheReader) -> None:
    one, other = a.manifest, b.manifest
    try:
        same_ids(a, b)
    except FormatError as error:
        raise ValueError(f"{a.url} and {b.url} cannot be compared: {error}") from error
    for name, mine, its in (
        ("shared_vocab_size", one.shared_vocab_size, other.shared_vocab_size),
        ("number of sequences", len(a), len(b)),
    ):
        if mine != its:
            raise ValueError(
                f"{a.url} and {b.url} cannot be compared: {name} {mine!r} against {its!r}"
            )


def _check_same(
    a: CacheReader, b: CacheReader, index: int, one: ScoredSequence, other: ScoredSequence
) -> None:
    if np.array_equal(one.input_ids, other.input_ids):
        return
    size = min(len(one.input_ids), len(other.input_ids))
    differs = (one.input_ids[:size] != other.input_ids[:size]).nonzero()[0]
    at = int(differs[0]) if len(differs) else size
    raise ValueError(
        f"{a.url} and {b.url} hold other data: sequence {index} (sample {one.sample_id!r} against "
        f"{other.sample_id!r}) differs from position {at} on"
    )


class _Sums:
    """What is summed over blocks of targets."""

    def __init__(self, a: Manifest, b: Manifest) -> None:
        self._has_logprobs = a.layout.has_logprobs and b.layout.has_logprobs
        self._at = [
            (t, a.temperatures.index(t), b.temperatures.index(t))
            for t in a.temperatures
            if t in b.temperatures
        ]
        self._spreads = [[Quantity() for _ in range(4)] for _ in self._at]
        self._label, self._logprob = Quantity(), Quantity()
        self._sequences = self._targets = self._only_a = self._only_b = self._top1 = 0
        self._kept = np.zeros(3)
        """Entries of both, of A, of B."""
        self._nats = np.zeros(2)
        self._worst: list[DifferingTarget] = []

    def add(self, pairs: list[tuple[int, ScoredSequence, ScoredSequence]]) -> None:
        """Take pairs of sequences with the same tokens."""
        both = [_common(a, b) for _, a, b in pairs]
        self._sequences += len(pairs)
        for (_, one, other), (i, j) in zip(pairs, both, strict=True):
            self._only_a += one.num_targets - len(i)
            self._only_b += other.num_targets - len(j)
        a = _block((s, i) for (_, s, _), (i, _) in zip(pairs, both, strict=True))
        b = _block((s, j) for (_, _, s), (_, j) in zip(pairs, both, strict=True))
        n = len(a.label_logprob)
        if not n:
            return
        self._targets += n
        self._nats -= [s.label_logprob.sum(dtype=np.float64) for s in (a, b)]
        self._label.add(np.abs(a.label_logprob - b.label_logprob))
        rows, slot_a, slot_b = matches(a.token_ids, b.token_ids)
        self._kept += [len(rows), (a.token_ids >= 0).sum(), (b.token_ids >= 0).sum()]
        if a.logprobs is None or b.logprobs is None:
            return
        self._top1 += int((a.token_ids[:, 0] == b.token_ids[:, 0]).sum())
        apart = np.zeros(n, np.float32)
        log_p, log_q = a.logprobs[rows, slot_a], b.logprobs[rows, slot_b]
        np.maximum.at(apart, rows, np.abs(log_p - log_q))
        self._logprob.add(apart)
        for spreads, (temperature, at_a, at_b) in zip(self._spreads, self._at, strict=True):
            found = divergences(a, b, (rows, slot_a, slot_b), temperature, at_a, at_b)
            for spread, values in zip(spreads, found, strict=True):
                spread.add(values)
            if temperature == 1:
                self._add_worst(pairs, both, found[0], found[1])

    def _add_worst(
        self,
        pairs: list[tuple[int, ScoredSequence, ScoredSequence]],
        both: list[tuple[NDArray[np.intp], NDArray[np.intp]]],
        kl_ab: NDArray[np.float64],
        kl_ba: NDArray[np.float64],
    ) -> None:
        starts = np.cumsum([0] + [len(i) for i, _ in both])
        for row in np.argsort(-(kl_ab + kl_ba), kind="stable")[:WORST].tolist():
            at = int(np.searchsorted(starts, row, side="right")) - 1
            index, one, other = pairs[at]
            i, j = (int(side[row - starts[at]]) for side in both[at])
            self._worst.append(
                DifferingTarget(
                    kl_ab=float(kl_ab[row]),
                    kl_ba=float(kl_ba[row]),
                    a=target(one, i, index, ENTRIES),
                    b=target(other, j, index, ENTRIES),
                )
            )
        self._worst.sort(key=lambda d: (-d.kl_ab - d.kl_ba, d.a.sequence, d.a.position))
        del self._worst[WORST:]

    def result(self, a: CacheReader, b: CacheReader) -> Difference:
        """The figures so far."""
        n, worst = self._targets, self._worst
        tokenizer = read_tokenizer(a) if worst else None
        if tokenizer:
            ones = with_texts((d.a for d in worst), tokenizer)
            others = with_texts((d.b for d in worst), tokenizer)
            worst = [
                DifferingTarget(kl_ab=d.kl_ab, kl_ba=d.kl_ba, a=one, b=other)
                for d, one, other in zip(worst, ones, others, strict=True)
            ]
        temperatures = []
        for (temperature, _, _), quantities in zip(self._at, self._spreads, strict=True):
            kl_ab, kl_ba, mass_a, mass_b = (quantity.result() for quantity in quantities)
            if kl_ab and kl_ba and mass_a and mass_b:
                temperatures.append(
                    AtTemperatureDiff(
                        temperature=temperature,
                        kl_ab=kl_ab,
                        kl_ba=kl_ba,
                        common_mass_a=mass_a,
                        common_mass_b=mass_b,
                    )
                )
        return Difference(
            url_a=a.url,
            url_b=b.url,
            sequences=self._sequences,
            targets=n,
            targets_only_a=self._only_a,
            targets_only_b=self._only_b,
            top1_agreement=self._top1 / n if n and self._has_logprobs else None,
            same_ids=float(self._kept[0] / fewer) if (fewer := self._kept[1:].min()) else None,
            teacher_ce_a=float(self._nats[0]) / n if n else None,
            teacher_ce_b=float(self._nats[1]) / n if n else None,
            label_difference=self._label.result(),
            logprob_difference=self._logprob.result(),
            temperatures=tuple(temperatures),
            worst_targets=tuple(worst),
        )


def matches(
    ids_a: NDArray[np.int32], ids_b: NDArray[np.int32]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Every id that both keep of a target, as (row, slot in A, slot in B).

    `ids_a` [n, K_a] and `ids_b` [n, K_b] are distinct in a row but for -1, which is in no match.
    """

    def keys(ids: NDArray[np.int32], second: int) -> NDArray[np.int64]:
        slots = np.arange(ids.shape[1], dtype=np.int64)
        return (ids.astype(np.int64) << (SLOT_BITS + 1)) | (second << SLOT_BITS) | slots

    ordered = np.sort(np.concatenate([keys(ids_a, 0), keys(ids_b, 1)], axis=1), axis=1)
    ids = ordered >> (SLOT_BITS + 1)
    rows, at = np.nonzero((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0))
    mask = (1 << SLOT_BITS) - 1
    return rows, ordered[rows, at] & mask, ordered[rows, at + 1] & mask


def divergences(
    a: _Block,
    b: _Block,
    common: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]],
    temperature: float,
    at_a: int,
    at_b: int,
) -> tuple[NDArray[np.float64], ...]:
    """KL(A || B), KL(B || A), the common mass of A and of B: [n] each, at one temperature.

    The KLs are the generalised ones over the common entries and one bucket.
    """
    rows, slot_a, slot_b = common
    n = len(a.label_logprob)
    log_p, common_p, log_rest_p = _classes(a, rows, slot_a, temperature, at_a)
    log_q, common_q, log_rest_q = _classes(b, rows, slot_b, temperature, at_b)
    kl_ab = np.bincount(rows, generalised(log_p, log_q), n) + generalised(log_rest_p, log_rest_q)
    kl_ba = np.bincount(rows, generalised(log_q, log_p), n) + generalised(log_rest_q, log_rest_p)
    return kl_ab, kl_ba, common_p, common_q


def generalised(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Terms p log(p/q) - p + q of the generalised KL, >= 0, exact also where p is nearly q.

    With g = log p - log q a term is p (g + expm1(-g)), which loses no digits to p - q.
    """
    gap, p = log_p - log_q, np.exp(log_p)
    near = np.abs(gap) < 1
    close = np.maximum(gap + np.expm1(-gap, where=near, out=np.zeros_like(gap)), 0)
    return np.where(near, p * close, p * gap - p + np.exp(log_q))


def _classes(
    block: _Block, rows: NDArray[np.intp], slots: NDArray[np.intp], temperature: float, at: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Log probs of the common entries, their mass [n], and the log mass of all else [n].

    The rest is summed from what is in it; as 1 - the common mass it would cancel.
    """
    assert block.logprobs is not None and block.log_tail is not None
    log_p = block.logprobs.astype(np.float64) / temperature - block.log_z[:, at, None]
    p = np.exp(log_p)
    found = log_p[rows, slots]
    mass = np.bincount(rows, p[rows, slots], len(p))
    p[rows, slots] = 0
    rest = p.sum(axis=1) + np.exp(block.log_tail[:, at].astype(np.float64))
    log_rest: NDArray[np.float64] = np.log(np.maximum(rest, np.exp(float(LOWEST_TAIL))))
    return found, mass.astype(np.float64), log_rest


def _common(a: ScoredSequence, b: ScoredSequence) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which targets of A and of B are at the same positions."""
    if np.array_equal(a.positions, b.positions):
        every = np.arange(a.num_targets)
        return every, every
    _, i, j = np.intersect1d(a.positions, b.positions, assume_unique=True, return_indices=True)
    return i, j


def _block(parts: Iterator[tuple[ScoredSequence, NDArray[np.intp]]]) -> _Block:
    chosen = list(parts)

    names = chosen[0][0].known()
    return Distributions(
        **{name: np.concatenate([getattr(s, name)[i] for s, i in chosen]) for name in names}
    )
