"""Divergences between a stored sparse teacher distribution and a student, unfused and fused."""

from decant.student_train.losses.divergences import sparse_divergence
from decant.student_train.losses.fused import FusedLoss, fused_linear_divergence
from decant.student_train.losses.kinds import DIVERGENCES, TAIL_MODES
from decant.student_train.losses.targets import SparseTargets

__all__ = [
    "DIVERGENCES",
    "TAIL_MODES",
    "FusedLoss",
    "SparseTargets",
    "fused_linear_divergence",
    "sparse_divergence",
]
