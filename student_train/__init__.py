"""Trains students from a cache: shards to batches to sparse divergences, no teacher in memory.

Public names are loaded when they are first used, so that the configuration and the help of the
command line need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decant.student_train.config.evaluation import EvalConfig, GenerationConfig
    from decant.student_train.config.loss import LossConfig
    from decant.student_train.config.mixture import CacheShare
    from decant.student_train.config.run import OptimizerConfig, TrainConfig
    from decant.student_train.config.schedule import Schedule
    from decant.student_train.config.student import (
        AdapterConfig,
        CutConfig,
        QatConfig,
        StudentConfig,
    )
    from decant.student_train.data.batch import Batch
    from decant.student_train.data.follow import FollowStream
    from decant.student_train.data.mixture import MixtureStream
    from decant.student_train.data.stream import CacheStream
    from decant.student_train.loop import train
    from decant.student_train.model.distiller import Distiller

__all__ = [
    "AdapterConfig",
    "Batch",
    "CacheShare",
    "CacheStream",
    "CutConfig",
    "Distiller",
    "EvalConfig",
    "FollowStream",
    "GenerationConfig",
    "LossConfig",
    "MixtureStream",
    "OptimizerConfig",
    "QatConfig",
    "Schedule",
    "StudentConfig",
    "TrainConfig",
    "train",
]

_MODULES = {
    "AdapterConfig": "config.student",
    "Batch": "data.batch",
    "CacheShare": "config.mixture",
    "CacheStream": "data.stream",
    "CutConfig": "config.student",
    "Distiller": "model.distiller",
    "EvalConfig": "config.evaluation",
    "FollowStream": "data.follow",
    "GenerationConfig": "config.evaluation",
    "LossConfig": "config.loss",
    "MixtureStream": "data.mixture",
    "OptimizerConfig": "config.run",
    "QatConfig": "config.student",
    "Schedule": "config.schedule",
    "StudentConfig": "config.student",
    "TrainConfig": "config.run",
    "train": "loop",
}
"""Where each name is made, under `decant.student_train`."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"decant.student_train.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
