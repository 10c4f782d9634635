"""Scores token sequences with a teacher and writes their sparse distributions into a cache.

A name is loaded when it is first used: the command line's help needs none of them.
"""

from typing import TYPE_CHECKING

from decant.lazy import lazily

if TYPE_CHECKING:
    from decant.teacher_dump.config import DumpConfig
    from decant.teacher_dump.engines import EngineError, TeacherConfig
    from decant.teacher_dump.inputs.config import SequenceConfig, SourceConfig
    from decant.teacher_dump.inputs.records import SourceError
    from decant.teacher_dump.job.run import dump
    from decant.teacher_dump.job.start import ConfigChanged
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "ConfigChanged": "decant.teacher_dump.job.start",
            "DumpConfig": "decant.teacher_dump.config",
            "EngineError": "decant.teacher_dump.engines.seam",
            "SequenceConfig": "decant.teacher_dump.inputs.config",
            "SourceConfig": "decant.teacher_dump.inputs.config",
            "SourceError": "decant.teacher_dump.inputs.records",
            "TeacherConfig": "decant.teacher_dump.engines.config",
            "dump": "decant.teacher_dump.job.run",
        },
    )

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
