"""Teacher engines: sequences of token ids in, sparse distributions out.

The seam is `Engine`; `open_engine` imports the one that is asked for and no other.
"""

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.opening import open_engine
from decant.teacher_dump.engines.seam import Engine, EngineError

__all__ = ["Engine", "EngineError", "TeacherConfig", "open_engine"]
