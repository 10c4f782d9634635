"""How far skewed divergences are mixed on each sequence: DistiLLM-2's curriculum.

The maths stands in docs/losses.md. Shapes: N targets, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_LAM = 0.01
"""Of a sequence."""
_NO_GAP = 1e-5
"""Added to the gap of a sequence, which may be 0."""
TEACHER_FIRST = {"skew_fkl": True, "skew_rkl": False}
"""Kinds that take a lam of each sequence, and whether the teacher is the side that samples."""


def likelihoods(log_probs_N: Tensor, sequence_N: Tensor) -> Tensor:
    """Return [S]: the geometric mean of the probabilities of each sequence's targets.

    `sequence_N` says which of the S sequences a target is of, numbers from 0 on.
    """
    sums_S = log_probs_N.new_zeros(int(sequence_N.max()) + 1)
    counts_S = torch.zeros_like(sums_S).index_add_(0, sequence_N, torch.ones_like(log_probs_N))
    return (sums_S.index_add_(0, sequence_N, log_probs_N) / counts_S.clamp(min=1)).exp()


def lam_of_sequences(
    log_p_N: Tensor, log_q_N: Tensor, sequence_N: Tensor, *, kind: str, lam: float, gap: float
) -> Tensor:
    """Return [N]: 1 - (1 - lam) gap / d, within [LEAST_LAM, lam], d that of the target's sequence.

    d is the likelihood that the side which samples gives the sequence minus that of the other:
    teacher minus student for skew_fkl, student minus teacher for skew_rkl. `gap` is what d is on
    average where the training begins. `log_p_N` and `log_q_N` are teacher's and student's log probs
    of the actual tokens.
    """
    d_S = likelihoods(log_p_N, sequence_N) - likelihoods(log_q_N, sequence_N)
    if not TEACHER_FIRST[kind]:
        d_S = -d_S
    lam_S = (1 - (1 - lam) * gap / (d_S + _NO_GAP)).clamp(min=min(LEAST_LAM, lam), max=lam)
    return lam_S.index_select(0, sequence_N)
