"""Divergences between a stored sparse teacher distribution and a student, unfused and fused.

Public names are loaded when they are first used: `kinds` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decant.student_train.losses.divergences import sparse_divergence
    from decant.student_train.losses.events import EventTargets
    from decant.student_train.losses.fused import (
        FusedLoss,
        LossPart,
        fused_linear_divergence,
        fused_linear_divergences,
    )
    from decant.student_train.losses.kinds import DIVERGENCES, TAIL_MODES
    from decant.student_train.losses.targets import SparseTargets

__all__ = [
    "DIVERGENCES",
    "TAIL_MODES",
    "EventTargets",
    "FusedLoss",
    "LossPart",
    "SparseTargets",
    "fused_linear_divergence",
    "fused_linear_divergences",
    "sparse_divergence",
]

_MODULES = {
    "DIVERGENCES": "kinds",
    "TAIL_MODES": "kinds",
    "EventTargets": "events",
    "FusedLoss": "fused",
    "LossPart": "fused",
    "SparseTargets": "targets",
    "fused_linear_divergence": "fused",
    "fused_linear_divergences": "fused",
    "sparse_divergence": "divergences",
}
"""Where each name is made, under `decant.student_train.losses`."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"decant.student_train.losses.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
