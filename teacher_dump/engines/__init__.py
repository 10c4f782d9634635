"""Teacher engines: sequences of token ids in, sparse distributions out.

The seam is `Engine`; `open_engine` imports the one that is asked for and no other.
"""

from teacher_dump.engines.base import Engine, EngineError, TeacherConfig, open_engine

__all__ = ["Engine", "EngineError", "TeacherConfig", "open_engine"]
