"""What a cache would lose if it were cut at fewer entries per target.

Notation for one target at T=1: p_1 >= ... >= p_n the kept entries, r the mass of the V - n ids that
are not kept, r_k = p_(k+1) + ... + p_n + r the mass beyond the first k. All that k entries and r_k
tell is u_k: the first k entries as they are and r_k in equal parts r_k / (V - k) for the others,
which is the distribution of the greatest entropy that agrees with them (`tail="uniform"` in
docs/losses.md). With `*` the stored bucket, of mass r under p and (V - n) r_k / (V - k) under u_k,

    fkl(k) = KL(p || u_k) over 1..n and *
           = sum_{k<j<=n} p_j log(p_j / s) + r log(r / ((V - n) s)),       s = r_k / (V - k)
    rkl(k) = KL(u_k || p) over 1..n and *
           = sum_{k<j<=n} s log(s / p_j) + (V - n) s log((V - n) s / r)

By the chain rule of the KL divergence (Cover & Thomas, Elements of Information Theory, 2.5), over
the whole vocabulary

    KL(p || u_k) = fkl(k) + r KL(p_tail || uniform),  whose last term is KL(p || u_n):

fkl(k) is exactly how much farther from the teacher k entries are than the stored ones, whatever the
tail looks like. It is the cost to a student that knows nothing of the tail; one that spreads the
bucket better than evenly loses less. No tail entry exceeds p_n, so p_tail has at least the entropy
log(r / p_n) and

    KL(p || u_n) = r KL(p_tail || uniform) <= beyond = r log((V - n) p_n / r),

so that what k entries cost against the whole vocabulary lies between fkl(k) and fkl(k) + beyond.

KL(u_k || p) = rkl(k) + (V - n) s KL(uniform || p_tail) >= rkl(k), and there is no bound from above:
an id of the tail may have any small probability. rkl(k) is no cost of a loss either. A loss that
weighs by the student (reverse KL, AKL, JSD, ...) leaves out what the student's own mass outside of
the k ids does, which no cache knows.

Means are over targets, their standard errors over sequences: with the sums S_i of sequence i, its
n_i targets and the weight w_i that it stands for, the mean is m = sum w_i S_i / sum w_i n_i and its
variance about N/(N-1) sum w_i^2 (S_i - m n_i)^2 / (sum w_i n_i)^2 (the ratio estimator; Cochran,
Sampling Techniques, 6.4): targets of one sequence are alike, sequences are taken to be independent.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOWEST_TAIL = np.float32(-87)
"""Log mass that an empty tail counts as, as in the losses: near the smallest float32."""
TINY = np.float32(1e-38)


@dataclass(frozen=True, slots=True)
class Means:
    """Means over targets and their standard errors over sequences, for k = 1 to K."""

    mass: NDArray[np.float64]
    """[K] of 1 - r_k."""
    mass_error: NDArray[np.float64]
    fkl: NDArray[np.float64]
    """[K] nats."""
    fkl_error: NDArray[np.float64]
    """[K]; infinite with fewer than two sequences."""
    rkl: NDArray[np.float64]
    """[K] nats."""
    beyond: float
    """Nats."""
    beyond_error: float


class TruncationSums:
    """Sums over sequences of what means and their errors are made of."""

    def __init__(self, slots: int) -> None:
        """For K = `slots` entries."""
        size = 3 * slots + 1
        self._slots = slots
        self._sum, self._square, self._product = (np.zeros(size) for _ in range(3))
        """[3K+1] over sequences: w S, (w S)^2 and (w S)(w n)."""
        self._count = self._count_square = 0.0
        """Of w n."""
        self._sequences = 0

    def add(self, sums: NDArray[np.float64], targets: NDArray, weight: float = 1.0) -> None:
        """Take sequences: the sums [3K+1, s] of their targets, as `target_costs` has them."""
        sums, count = sums * weight, targets * np.float64(weight)
        self._sum += sums.sum(axis=1)
        self._square += np.einsum("qs,qs->q", sums, sums)
        self._product += sums @ count
        self._count += float(count.sum())
        self._count_square += float(count @ count)
        self._sequences += len(targets)

    def merge(self, other: "TruncationSums") -> None:
        """Take what another of the same K has."""
        for name in ("_sum", "_square", "_product", "_count", "_count_square", "_sequences"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def means(self) -> Means:
        """The means; there must be targets."""
        m, n = self._sum / self._count, self._sequences
        spread = self._square - 2 * m * self._product + m * m * self._count_square
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.sqrt(np.maximum(spread, 0) * np.divide(n, n - 1)) / self._count
        error = np.full_like(m, np.inf) if n < 2 else error
        parts, errors = np.split(m[:-1], 3), np.split(error[:-1], 3)
        return Means(
            mass=parts[0],
            mass_error=errors[0],
            fkl=parts[1],
            fkl_error=errors[1],
            rkl=parts[2],
            beyond=float(m[-1]),
            beyond_error=float(error[-1]),
        )


def target_costs(
    log_p: NDArray[np.float32],
    p: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    num_kept: NDArray[np.integer] | None,
    vocab_size: int,
) -> NDArray[np.float32]:
    """[3K+1, b] of b targets, entries along the first axis: 1 - r_k, fkl(k), rkl(k), beyond.

    `log_p` and `p` are [K, b], 0 in `p` and anything finite in `log_p` where a slot is unused;
    `num_kept` [b] where it varies.
    """
    slots, size = p.shape
    k = np.arange(1, slots + 1, dtype=np.float32)[:, None]
    kept = np.float32(slots) if num_kept is None else num_kept.astype(np.float32)
    tail, floored = np.exp(log_tail), np.maximum(log_tail, LOWEST_TAIL)
    outside = vocab_size - kept
    log_outside = np.log(np.maximum(outside, 1))
    used_log_p = log_p if num_kept is None else np.where(k <= kept, log_p, 0)
    mass = _beyond_each(p) + tail
    p_log_p = _beyond_each(p * log_p) + tail * floored
    sum_log_p = _beyond_each(used_log_p)
    log_mass = np.log(np.maximum(mass, TINY))
    log_share = log_mass - np.log(np.maximum(vocab_size - np.minimum(k, kept), 1))
    found = np.empty((3 * slots + 1, size), np.float32)
    kept_mass, fkl, rkl = (found[i * slots : (i + 1) * slots] for i in range(3))
    np.subtract(1, mass, out=kept_mass)
    fkl[:] = p_log_p - mass * log_share - tail * log_outside
    np.exp(log_share, out=rkl)
    rkl *= outside * (log_outside - floored) - sum_log_p
    rkl += mass * log_share
    fkl[-1] = rkl[-1] = 0
    if num_kept is not None:
        fkl[k >= kept] = rkl[k >= kept] = 0
        last = np.take_along_axis(log_p, num_kept[None].astype(np.intp) - 1, axis=0)[0]
    else:
        last = log_p[-1]
    # Below 0 these are by rounding alone: a KL, and a bound of one.
    found[-1] = tail * (log_outside + last - floored)
    np.maximum(found[slots:], 0, out=found[slots:])
    return found


def _beyond_each(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """[K, b] the sum of the rows below each, the smallest first; 0 in the last row."""
    sums = np.zeros_like(values)
    for row in range(len(values) - 1, 0, -1):  # whole rows at a time: a sixth of cumsum's time
        np.add(sums[row], values[row], out=sums[row - 1])
    return sums
