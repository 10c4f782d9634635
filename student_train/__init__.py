"""Trains students from a cache: shards to batches to sparse divergences, no teacher in memory."""

from decant.student_train.config.loss import LossConfig
from decant.student_train.config.run import (
    EvalConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
)
from decant.student_train.config.schedule import Schedule
from decant.student_train.data.batch import Batch
from decant.student_train.data.follow import FollowStream
from decant.student_train.data.mixture import CacheShare, MixtureStream
from decant.student_train.data.stream import CacheStream
from decant.student_train.evaluation.answers import GenerationConfig
from decant.student_train.loop import train
from decant.student_train.model.adapters import AdapterConfig
from decant.student_train.model.distiller import Distiller

__all__ = [
    "AdapterConfig",
    "Batch",
    "CacheShare",
    "CacheStream",
    "Distiller",
    "EvalConfig",
    "FollowStream",
    "GenerationConfig",
    "LossConfig",
    "MixtureStream",
    "OptimizerConfig",
    "Schedule",
    "StudentConfig",
    "TrainConfig",
    "train",
]
