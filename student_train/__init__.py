"""Trains students from a cache: shards to batches to sparse divergences, no teacher in memory."""

from student_train.adapters import AdapterConfig
from student_train.batch import Batch
from student_train.config import EvalConfig, OptimizerConfig, StudentConfig, TrainConfig
from student_train.distiller import Distiller
from student_train.follow import FollowStream
from student_train.generation import GenerationConfig
from student_train.mixture import CacheShare, MixtureStream
from student_train.objective import LossConfig
from student_train.schedule import Schedule
from student_train.stream import CacheStream
from student_train.train import train

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
