"""Trains students from a cache: shards to batches to sparse divergences, no teacher in memory."""

from student_train.batch import Batch
from student_train.config import EvalConfig, OptimizerConfig, StudentConfig, TrainConfig
from student_train.distiller import Distiller, LossConfig
from student_train.stream import CacheStream
from student_train.train import train

__all__ = [
    "Batch",
    "CacheStream",
    "Distiller",
    "EvalConfig",
    "LossConfig",
    "OptimizerConfig",
    "StudentConfig",
    "TrainConfig",
    "train",
]
