"""Teacher engines: sequences of token ids in, sparse distributions out.

The seam is `Engine`; `open_engine` imports the one that is asked for and no other.
"""

from decant.teacher_dump.engines.seam import Engine, EngineError, TeacherConfig, open_engine

__all__ = ["Engine", "EngineError", "TeacherConfig", "open_engine"]
