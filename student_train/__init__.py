"""Trains students from a cache: shards to batches to sparse divergences, no teacher in memory."""

from decant.student_train.config.evaluation import EvalConfig, GenerationConfig
from decant.student_train.config.loss import LossConfig
from decant.student_train.config.mixture import CacheShare
from decant.student_train.config.run import OptimizerConfig, TrainConfig
from decant.student_train.config.schedule import Schedule
from decant.student_train.config.student import AdapterConfig, StudentConfig
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
