"""Scores token sequences with a teacher and writes their sparse distributions into a cache."""

from teacher_dump.config import DumpConfig
from teacher_dump.dump import dump
from teacher_dump.engines import EngineError, TeacherConfig
from teacher_dump.prepare import ConfigChanged
from teacher_dump.records import SourceError
from teacher_dump.sequences import SequenceConfig
from teacher_dump.sources import SourceConfig

__all__ = [
    "ConfigChanged",
    "DumpConfig",
    "EngineError",
    "SequenceConfig",
    "SourceConfig",
    "SourceError",
    "TeacherConfig",
    "dump",
]
