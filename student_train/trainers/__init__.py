"""A cache in other people's training loops: a dataset, its order, and trainers that use them.

Public names are loaded when they are first used: `CacheDataset` needs torch alone, the trainers
transformers or TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decant.student_train.trainers.dataset import CacheDataset, Collator, RowGroupSampler
    from decant.student_train.trainers.hf import DistillationTrainer
    from decant.student_train.trainers.sft import DistillationSFTTrainer

__all__ = [
    "CacheDataset",
    "Collator",
    "DistillationSFTTrainer",
    "DistillationTrainer",
    "RowGroupSampler",
]

_MODULES = {
    "CacheDataset": "dataset",
    "Collator": "dataset",
    "DistillationSFTTrainer": "sft",
    "DistillationTrainer": "hf",
    "RowGroupSampler": "dataset",
}
"""Where each name is made, under `decant.student_train.trainers`."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"decant.student_train.trainers.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
