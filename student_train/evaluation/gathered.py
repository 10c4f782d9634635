"""Figures of targets gathered over a pass: sums per sequence, spreads, bins, the worst ones.

Knows no model. Shapes: S sequences looked at, R targets of a chunk, F figures.
"""

import heapq
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from decant.storage.inspect.report import Spread
from decant.storage.inspect.sketches import Quantity
from decant.storage.inspect.statistics import RELIABILITY_BINS as NUM_BINS
from decant.storage.inspect.statistics import reliability_bin

RESAMPLES = 1000
"""Of the bootstrap over sequences."""
AT_ONCE = 50
"""Resamples whose weights are held at once."""
PER_BYTE = {"bits_per_byte": ("ce", 1 / math.log(2)), "kl_forward_per_byte": ("kl_forward", 1.0)}
"""Figure -> the one whose sum it is, times a factor, by the figure `bytes`."""
SPREADS = ("kl_forward", "kl_reverse", "ce")
"""Figures whose quantiles over targets are reported."""


@dataclass(frozen=True, slots=True, eq=False, order=False)
class Candidate:
    """A target on which the model is far from the teacher."""

    sequence: int
    """Index in the plan."""
    target: int
    """Index among the sequence's targets."""
    figures: dict[str, float]
    token_ids: list[int]
    """The model's most probable ids, and their probabilities."""
    probabilities: list[float]


@dataclass(slots=True, eq=False)
class Gathered:
    """What a pass over sequences found."""

    num_worst: int
    sequences: list[int] = field(default_factory=list)
    """[S] plan indices, in the order of the pass."""
    targets: list[int] = field(default_factory=list)
    """[S]."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """[S] of each figure, over the sequence's targets that have it."""
    counts: dict[str, list[float]] = field(default_factory=dict)
    """[S] how many have it."""
    spreads: dict[str, Quantity] = field(default_factory=dict)
    bins: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """[NUM_BINS, 3] of model and teacher by confidence: targets, correct ones, sum of it."""
    _worst: list[tuple[float, int, Candidate]] = field(default_factory=list)
    _number: itertools.count = field(default_factory=itertools.count)

    def add(self, sequence: int, figures: dict[str, NDArray[np.float64]]) -> None:
        """Take the figures [n] of all targets of one sequence; NaN where one is not known.

        Of a model of another tokenizer n is its own number of tokens, `teacher_ce` having another.
        """
        self.sequences.append(sequence)
        self.targets.append(len(figures["ce"]))
        for name, values in figures.items():
            known = values[~np.isnan(values)]
            self.sums.setdefault(name, []).append(float(known.sum()))
            self.counts.setdefault(name, []).append(float(len(known)))
            if name in SPREADS:
                self.spreads.setdefault(name, Quantity()).add(known)
        if "bytes" in figures:
            for name, (of, factor) in PER_BYTE.items():
                if of in figures:
                    self.sums.setdefault(name, []).append(factor * self.sums[of][-1])
                    self.counts.setdefault(name, []).append(self.sums["bytes"][-1])
        for name, confidence, correct in (
            ("model", "confidence", "correct"),
            ("teacher", "teacher_confidence", "teacher_correct"),
        ):
            if confidence in figures:
                bins = self.bins.setdefault(name, np.zeros((NUM_BINS, 3)))
                bins += binned(figures[confidence], figures[correct])

    def offer(self, badness: float, candidate: Candidate) -> None:
        """Keep a target if it is among the worst so far; of equal ones the first."""
        entry = (badness, -next(self._number), candidate)
        if len(self._worst) < self.num_worst:
            heapq.heappush(self._worst, entry)
        elif self._worst and entry > self._worst[0]:
            heapq.heapreplace(self._worst, entry)

    @property
    def threshold(self) -> float:
        """What a target's badness must exceed to be kept."""
        return self._worst[0][0] if len(self._worst) == self.num_worst else -np.inf

    def worst(self) -> list[Candidate]:
        """The worst targets, worst first."""
        return [candidate for _, _, candidate in sorted(self._worst, reverse=True)]

    def mean(self, name: str) -> float | None:
        """The mean of a figure over all targets that have it; None if none has."""
        count = sum(self.counts.get(name, ()))
        return sum(self.sums[name]) / count if count else None

    def sequence_gap(self) -> float | None:
        """Mean over sequences of the teacher's likelihood less the model's (loss.gap).

        A likelihood is the geometric mean of the probabilities of a sequence's actual tokens. None
        for a model of another tokenizer.
        """
        found = [
            math.exp(-teacher / n) - math.exp(-ours / n)
            for teacher, ours, n, m in zip(
                self.sums["teacher_ce"],
                self.sums["ce"],
                self.counts["teacher_ce"],
                self.counts["ce"],
                strict=True,
            )
            if n and n == m
        ]
        return sum(found) / len(found) if len(found) == len(self.sequences) > 0 else None

    def spread(self, name: str) -> Spread | None:
        """Its quantiles over targets."""
        return self.spreads[name].result() if name in self.spreads else None

    def calibration_error(self, name: str) -> float | None:
        """Of model or teacher: sum over bins of |correct - confidence|, over all targets."""
        bins = self.bins.get(name)
        if bins is None or not bins[:, 0].sum():
            return None
        return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())


def binned(confidence: NDArray[np.float64], correct: NDArray[np.float64]) -> NDArray[np.float64]:
    """[NUM_BINS, 3]; bin b holds the confidences in (b, b+1] / NUM_BINS; NaN is left out."""
    known = ~np.isnan(confidence)
    confidence, correct = confidence[known], correct[known]
    index = reliability_bin(confidence)
    columns = (np.ones_like(confidence), correct, confidence)
    return np.stack([np.bincount(index, c, NUM_BINS) for c in columns], axis=1)


def intervals(
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    seed: int,
    less: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> list[tuple[float, float] | None]:
    """95% intervals of the means of F figures, from sums and counts [S, F].

    With `less`, other sums and counts of the same sequences, of the differences from their means.

    Sequences are drawn with replacement RESAMPLES times (the percentile bootstrap): the targets of
    a sequence are not independent, sequences are taken to be. None of fewer than two sequences.
    """
    size = len(sums)
    if size < 2:
        return [None] * sums.shape[1]
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, RESAMPLES, AT_ONCE):
        rows = min(AT_ONCE, RESAMPLES - start)
        weights = np.zeros((rows, size))
        for row in weights:
            row += np.bincount(generator.integers(0, size, size), minlength=size)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = (weights @ sums) / (weights @ counts)
            if less is not None:
                drawn = drawn - (weights @ less[0]) / (weights @ less[1])
            means.append(drawn)
    low, high = np.nanquantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def paired_differences(
    a: Gathered, b: Gathered, names: tuple[str, ...], seed: int
) -> dict[str, tuple[float, tuple[float, float] | None]]:
    """Mean of B minus mean of A of each figure, and its interval over sequences.

    Over the sequences that both were gathered over; figures that one does not have are left out.
    """
    place = {sequence: index for index, sequence in enumerate(b.sequences)}
    of_a = [index for index, sequence in enumerate(a.sequences) if sequence in place]
    of_b = [place[a.sequences[index]] for index in of_a]
    names = tuple(n for n in names if a.mean(n) is not None and b.mean(n) is not None)
    if not of_a or not names:
        return {}
    sums_a, counts_a, sums_b, counts_b = (
        np.stack([np.array(values[n])[places] for n in names], axis=1)
        for its, places in ((a, of_a), (b, of_b))
        for values in (its.sums, its.counts)
    )
    means = sums_b.sum(axis=0) / counts_b.sum(axis=0) - sums_a.sum(axis=0) / counts_a.sum(axis=0)
    found = intervals(sums_b, counts_b, seed, less=(sums_a, counts_a))
    return {n: (float(m), i) for n, m, i in zip(names, means, found, strict=True)}
