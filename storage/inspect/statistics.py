"""Everything that is counted, summed or sketched over rows; two such statistics can be merged.

Counts, sums and histograms are exact. Quantiles come from KLL sketches (Karnin, Lang, Liberty,
arXiv 1603.05346): exact up to 2,000 values, then within 0.2% of the rank. Memory does not grow with
the cache. Shapes: n targets, K slots, b targets of a block, V vocabulary.
"""

from itertools import pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from decant.schemas import Manifest
from decant.storage.cache.logprobs import empty
from decant.storage.cache.rows import Rows
from decant.storage.inspect.examples import CONTEXT, Target, target
from decant.storage.inspect.report import (
    AtTemperature,
    ReliabilityBin,
)
from decant.storage.inspect.sketches import Quantity, SequenceHashes
from decant.storage.inspect.truncation_cost import (
    LOWEST_TAIL,
    Means,
    TruncationSums,
    target_costs,
)

FLOOR = np.float32(-1e4)
"""Log probs below it count as this, so that 0 log 0 is 0."""
RELIABILITY_BINS = 15
"""Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599."""
HISTOGRAM_BINS = 20
LENGTH_EDGES = np.array([1, 2, 3, *(m << i for i in range(28) for m in (4, 5, 6, 7))])
"""Four bins for each doubling."""
WORST = 20
WORST_ENTRIES = 3
MU = 0.5
"""Of AKL: the mass of its head."""
BLOCK = 1024
"""Targets at a time where whole [K, b] arrays are made: they stay in the processor's cache."""


def bucket_entropy(
    logprobs: NDArray[np.float32],
    log_z: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    temperature: float,
) -> NDArray[np.float32]:
    """[n] entropy of p_T in nats with everything that is not kept as one class.

    -sum_kept p_T log p_T - r log r, where log p_T = logprobs / T - log_z and r = exp(log_tail);
    the entropy over the vocabulary is larger by r times the entropy inside the tail.
    """
    shape = logprobs.shape
    log_p = np.divide(logprobs, np.float32(temperature), out=empty(shape, np.float32))
    log_p -= log_z[:, None]
    p = np.exp(log_p, out=empty(shape, np.float32))
    kept = np.einsum("nk,nk->n", p, np.maximum(log_p, FLOOR, out=log_p))
    return -(kept + np.exp(log_tail) * np.maximum(log_tail, FLOOR))


def within_tail(
    log_cap: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    outside: NDArray[np.integer] | int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[n], [n]: what the full entropy has beyond `bucket_entropy`, at least and at most.

    That is r times the entropy inside the tail of `outside` ids, none of which has more than
    exp(log_cap): r log(r / cap) <= r H(tail) <= r log(outside).
    """
    tail, floored = np.exp(log_tail), np.maximum(log_tail, LOWEST_TAIL)
    least = tail * np.maximum(floored - np.maximum(log_cap, LOWEST_TAIL), 0)
    most = tail * np.log(np.maximum(outside, 1, dtype=np.float32))
    return np.minimum(least, most), most


def reliability_bin(confidence: NDArray) -> NDArray[np.intp]:
    """[n] the bin b that each confidence lies in, (b, b+1] / RELIABILITY_BINS; 0 is in the first.

    Bins are open below as in Guo et al.; training and `evaluate` have the same.
    """
    index = np.ceil(confidence.astype(np.float64) * RELIABILITY_BINS).astype(np.intp) - 1
    return np.clip(index, 0, RELIABILITY_BINS - 1)


class Statistics:
    """What the rows of a cache add up to."""

    def __init__(self, manifest: Manifest) -> None:
        self._temperatures = manifest.temperatures
        self._vocab_size = manifest.shared_vocab_size
        truncation = manifest.truncation
        self._ragged = truncation.rule.varies
        self._has_curve = truncation.rule.is_top
        self._has_logprobs = manifest.layout.has_logprobs
        slots = truncation.slots
        unit = np.linspace(0, 1, HISTOGRAM_BINS + 1)
        # Of the kept entries and a bucket, or of the whole vocabulary.
        classes = slots + 1 if self._has_logprobs else manifest.shared_vocab_size
        nats = np.linspace(0, np.log(classes), HISTOGRAM_BINS + 1)
        self.length = Quantity(LENGTH_EDGES)
        self.num_kept, self.top1_probability, self.akl_head = Quantity(), Quantity(), Quantity()
        self.mass = [Quantity(unit) for _ in self._temperatures]
        self.entropy = [Quantity(nats) for _ in self._temperatures]
        whole = np.linspace(0, np.log(self._vocab_size), HISTOGRAM_BINS + 1)
        self.entropy_least = [Quantity(whole) for _ in self._temperatures]
        self.entropy_most = [Quantity() for _ in self._temperatures]
        self.below_mu = np.zeros(len(self._temperatures), np.int64)
        """Targets whose kept mass is below MU, at each temperature."""
        self.targets = self.top1 = self.label_kept = 0
        self.label_nats = 0.0
        self.reliability = np.zeros((3, RELIABILITY_BINS))
        """Targets, summed confidence, correct ones."""
        self.curve = TruncationSums(slots)
        self.hashes = SequenceHashes()
        self.is_kept, self.is_in_data = np.zeros((2, self._vocab_size), bool)
        """[V] whether an id is among the kept ones; among the tokens."""
        self.worst: list[Target] = []
        """The least retained mass first."""

    def add(self, rows: Rows) -> None:
        """Take the rows of whole sequences."""
        self.length.add(np.diff(rows.row_starts))
        hashes = [
            xxhash.xxh3_64_intdigest(rows.input_ids[start:stop].tobytes())
            for start, stop in pairwise(rows.row_starts)
        ]
        self.hashes.add(np.array(hashes, np.uint64))
        self.is_in_data[rows.input_ids] = True
        if not len(rows.label_logprob):
            return
        self._add_targets(rows)
        if rows.logprobs is not None:
            self._add_top1(rows, rows.logprobs)
            self._add_masses(rows)
            self._add_kept(rows, rows.logprobs)
            self._add_worst(rows)
        elif rows.draws is not None:
            self._add_drawn(rows)

    def _add_targets(self, rows: Rows) -> None:
        self.targets += len(rows.label_logprob)
        self.label_nats -= float(rows.label_logprob.sum(dtype=np.float64))
        self.label_kept += int((rows.token_ids == rows.labels[:, None]).sum())

    def _add_drawn(self, rows: Rows) -> None:
        assert rows.entropy is not None
        self.num_kept.add((rows.token_ids >= 0).sum(axis=1))
        self.is_kept[rows.token_ids[rows.token_ids >= 0]] = True
        for quantity in (self.entropy[0], self.entropy_least[0], self.entropy_most[0]):
            quantity.add(rows.entropy)

    def _add_top1(self, rows: Rows, logprobs: NDArray[np.float32]) -> None:
        correct = rows.token_ids[:, 0] == rows.labels
        self.top1 += int(correct.sum())
        confidence = np.exp(np.minimum(logprobs[:, 0], 0))
        self.top1_probability.add(confidence)
        bins = reliability_bin(confidence)
        for row, weights in enumerate((None, confidence, correct)):
            self.reliability[row] += np.bincount(bins, weights, RELIABILITY_BINS)

    def _add_masses(self, rows: Rows) -> None:
        assert rows.logprobs is not None and rows.log_tail is not None
        for i, log_tail in enumerate(rows.log_tail.T):
            mass = -np.expm1(np.minimum(log_tail, 0))
            self.mass[i].add(mass)
            self.below_mu[i] += int((mass < MU).sum())
        for i, temperature in list(enumerate(self._temperatures))[1:]:
            log_z, log_tail = rows.log_z[:, i], rows.log_tail[:, i]
            entropy = bucket_entropy(rows.logprobs, log_z, log_tail, temperature)
            self._add_entropy(i, entropy, rows)

    def _add_entropy(self, i: int, entropy: NDArray[np.float32], rows: Rows) -> None:
        """Take the `bucket_entropy` at a temperature, and what it is at least and at most."""
        assert rows.logprobs is not None and rows.log_tail is not None
        n, slots = rows.token_ids.shape
        if rows.draws is None and not self._ragged:
            num_kept, cap = np.full(n, slots), rows.logprobs[:, -1]
        else:  # of drawn ids nothing follows for the others
            used = rows.token_ids >= 0
            exact = used if rows.draws is None else used & (rows.draws == 0)
            num_kept, cap = used.sum(axis=1), np.where(exact, rows.logprobs, 0).min(axis=1)
        log_cap = cap / np.float32(self._temperatures[i]) - rows.log_z[:, i]
        log_cap[cap == 0] = 0  # no exact entry, or one that has it all
        outside = self._vocab_size - num_kept
        least, most = within_tail(log_cap, rows.log_tail[:, i], outside)
        self.entropy[i].add(entropy)
        self.entropy_least[i].add(entropy + least)
        self.entropy_most[i].add(entropy + most)

    def _add_kept(self, rows: Rows, logprobs: NDArray[np.float32]) -> None:
        """What takes all entries at T=1: a block at a time, entries along the first axis."""
        n, slots = rows.token_ids.shape
        assert rows.log_tail is not None
        num_kept = (rows.token_ids >= 0).sum(axis=1) if self._ragged else np.full(n, slots)
        self.num_kept.add(num_kept)
        used = rows.token_ids if not self._ragged else rows.token_ids[rows.token_ids >= 0]
        self.is_kept[used] = True
        entropy, head = np.empty(n, np.float32), np.empty(n, np.float32)
        sizes = np.diff(rows.target_starts)
        starts = rows.target_starts[:-1][sizes > 0]
        costs = np.zeros((3 * slots + 1, len(starts) if self._has_curve else 0))
        for start in range(0, n, BLOCK):
            block = slice(start, start + BLOCK)
            log_p = np.maximum(logprobs[block].T, FLOOR, order="C")
            p, log_tail = np.exp(log_p), rows.log_tail[block, 0]
            tail = np.exp(log_tail) * np.maximum(log_tail, FLOOR)
            entropy[block] = -(np.einsum("kb,kb->b", p, log_p) + tail)
            mass = p.copy()
            for row in range(1, slots):  # cumsum, whole rows at a time
                mass[row] += mass[row - 1]
            head[block] = np.maximum((mass <= np.float32(MU)).sum(axis=0), 1)
            if self._has_curve:
                ragged = num_kept[block] if self._ragged else None
                found = target_costs(log_p, p, log_tail, ragged, self._vocab_size)
                _sum_by_sequence(found, start, starts, costs)
        np.minimum(head, num_kept, out=head)
        if self._has_curve:
            self.curve.add(costs, sizes[sizes > 0])
        self._add_entropy(0, entropy, rows)
        self.akl_head.add(head)

    def _add_worst(self, rows: Rows) -> None:
        """The first of each context: what follows `<s>` is the same in every sequence."""
        contexts: set[tuple[int, ...]] = set()
        assert rows.log_tail is not None
        for index in np.argsort(-rows.log_tail[:, 0], kind="stable").tolist():
            at = int(np.searchsorted(rows.target_starts, index, side="right")) - 1
            start = int(rows.row_starts[at])
            row = start + int(rows.positions[index])
            context = tuple(rows.input_ids[max(row - CONTEXT, start) : row].tolist())
            if context not in contexts:
                contexts.add(context)
                inside = int(index - rows.target_starts[at])
                self.worst.append(target(rows[at], inside, int(rows.sequence[at]), WORST_ENTRIES))
            if len(contexts) == WORST:
                break
        self._keep_worst()

    def _keep_worst(self) -> None:
        order = sorted(self.worst, key=lambda t: (-(t.tail_mass or 0), t.sequence, t.position))
        first = {found.context_ids: found for found in reversed(order)}
        self.worst = [found for found in order if first[found.context_ids] is found][:WORST]

    def merge(self, other: "Statistics") -> None:
        """Take what another of the same cache has."""
        for mine, its in (
            (self.length, other.length),
            (self.num_kept, other.num_kept),
            (self.top1_probability, other.top1_probability),
            (self.akl_head, other.akl_head),
            *zip(self.mass, other.mass, strict=True),
            *zip(self.entropy, other.entropy, strict=True),
            *zip(self.entropy_least, other.entropy_least, strict=True),
            *zip(self.entropy_most, other.entropy_most, strict=True),
        ):
            mine.merge(its)
        self.targets += other.targets
        self.top1 += other.top1
        self.label_kept += other.label_kept
        self.below_mu += other.below_mu
        self.label_nats += other.label_nats
        self.reliability += other.reliability
        self.curve.merge(other.curve)
        self.hashes.merge(other.hashes)
        self.is_kept |= other.is_kept
        self.is_in_data |= other.is_in_data
        self.worst += other.worst
        self._keep_worst()

    def at_temperatures(self) -> tuple[AtTemperature, ...]:
        """One for each stored temperature; none without targets."""
        found = []
        for i, temperature in enumerate(self._temperatures):
            entropy = [q[i].result() for q in (self.entropy, self.entropy_least, self.entropy_most)]
            bucket, least, most = entropy
            if bucket is None or least is None or most is None:
                continue
            share = float(self.below_mu[i] / self.targets) if self._has_logprobs else None
            found.append(
                AtTemperature(
                    temperature=temperature,
                    retained_mass=self.mass[i].result(),
                    retained_mass_histogram=self.mass[i].histogram(),
                    teacher_entropy=bucket,
                    teacher_entropy_histogram=self.entropy[i].histogram(),
                    teacher_entropy_least=least,
                    teacher_entropy_least_histogram=self.entropy_least[i].histogram(),
                    teacher_entropy_most=most,
                    akl_inexact=share,
                )
            )
        return tuple(found)

    def reliability_bins(self) -> tuple[ReliabilityBin, ...]:
        """The reliability curve; empty without targets or log probs."""
        if not self.targets or not self._has_logprobs:
            return ()
        return tuple(
            ReliabilityBin(
                targets=int(count),
                confidence=confidence / count if count else None,
                accuracy=correct / count if count else None,
            )
            for count, confidence, correct in self.reliability.T.tolist()
        )

    def calibration_error(self) -> float | None:
        """sum_bins |accuracy - confidence| weighted by targets; None where there are no bins."""
        if not self.targets or not self._has_logprobs:
            return None
        return float(np.abs(self.reliability[1] - self.reliability[2]).sum() / self.targets)

    def truncation_means(self) -> Means | None:
        """At every k; None where entries are no top k, or without targets."""
        return self.curve.means() if self.targets and self._has_curve else None


def _sum_by_sequence(
    values: NDArray[np.float32],
    first: int,
    starts: NDArray[np.integer],
    sums: NDArray[np.float64],
) -> None:
    """Add the columns [Q, b] of targets `first`, `first` + 1, ... to the sums [Q, S] of sequences.

    `starts` [S] are the first targets of these.
    """
    last = first + values.shape[1]
    begin = int(np.searchsorted(starts, first, side="right")) - 1
    stop = int(np.searchsorted(starts, last, side="left"))
    edges = np.maximum(starts[begin:stop] - first, 0)
    sums[:, begin:stop] += np.add.reduceat(values, edges, axis=1, dtype=np.float64)
