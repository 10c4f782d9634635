"""Scores token sequences with a teacher and writes their sparse distributions into a cache."""

from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import EngineError, TeacherConfig
from decant.teacher_dump.inputs.config import SourceConfig
from decant.teacher_dump.inputs.records import SourceError
from decant.teacher_dump.inputs.sequences import SequenceConfig
from decant.teacher_dump.job.run import dump
from decant.teacher_dump.job.start import ConfigChanged

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
