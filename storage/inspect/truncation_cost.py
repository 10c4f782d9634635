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
bucket better than evenly loses less. KL(u_k || p) = rkl(k) + (V - n) s KL(uniform || p_tail) >=
rkl(k). No tail entry exceeds p_n, so p_tail has at least the entropy log(r / p_n) and

    KL(p || u_n) = r KL(p_tail || uniform) <= beyond = r log((V - n) p_n / r).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.01
"""Nats of forward KL per target that a smaller k may cost and still be recommended."""
LOWEST_TAIL = np.float32(-87)
"""Log mass that an empty tail counts as, as in the losses: near the smallest float32."""
TINY = np.float32(1e-38)


@dataclass(frozen=True, slots=True)
class TruncationSums:
    """Sums over targets, for k = 1 to K."""

    mass: NDArray[np.float64]
    """[K] of 1 - r_k."""
    fkl: NDArray[np.float64]
    """[K]."""
    rkl: NDArray[np.float64]
    """[K]."""
    beyond: float

    def __add__(self, other: "TruncationSums") -> "TruncationSums":
        return TruncationSums(
            self.mass + other.mass,
            self.fkl + other.fkl,
            self.rkl + other.rkl,
            self.beyond + other.beyond,
        )


def truncation_sums(
    log_p: NDArray[np.float32],
    p: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    num_kept: NDArray[np.integer] | None,
    vocab_size: int,
) -> TruncationSums:
    """The sums over b targets of the quantities above, entries along the first axis.

    `log_p` and `p` are [K, b], 0 in `p` and anything finite in `log_p` where a slot is unused;
    `num_kept` [b] where it varies.
    """
    slots, _ = p.shape
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
    fkl = p_log_p - mass * log_share - tail * log_outside
    rkl = np.exp(log_share)
    rkl *= outside * (log_outside - floored) - sum_log_p
    rkl += mass * log_share
    fkl[-1] = rkl[-1] = 0
    if num_kept is not None:
        fkl[k >= kept] = rkl[k >= kept] = 0
        last = np.take_along_axis(log_p, num_kept[None].astype(np.intp) - 1, axis=0)[0]
    else:
        last = log_p[-1]
    beyond = np.maximum(tail * (log_outside + last - floored), 0)
    return TruncationSums(
        mass=(1 - mass).sum(axis=1, dtype=np.float64),
        fkl=np.maximum(fkl, 0, out=fkl).sum(axis=1, dtype=np.float64),
        rkl=np.maximum(rkl, 0, out=rkl).sum(axis=1, dtype=np.float64),
        beyond=float(beyond.sum(dtype=np.float64)),
    )


def _beyond_each(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """[K, b] the sum of the rows below each, the smallest first; 0 in the last row."""
    sums = np.zeros_like(values)
    for row in range(len(values) - 1, 0, -1):  # whole rows at a time: a sixth of cumsum's time
        np.add(sums[row], values[row], out=sums[row - 1])
    return sums
