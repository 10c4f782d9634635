"""`python -m tests.support.rounds_job CONFIG`: rounds whose commands are forked from here."""

import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from decant.student_train.rounds.config import RoundsConfig
from decant.student_train.rounds.run import run_rounds


class Child:
    """A command in a fork of this process."""

    def __init__(self, words: Sequence[str]) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            sys.argv = list(words[2:])
            code = 1
            try:
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stderr.flush()
                os._exit(code)

    def wait(self) -> int:
        """Its exit code, or minus the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def send_signal(self, sig: int, /) -> None:
        """Send it a signal."""
        os.kill(self._pid, sig)


if __name__ == "__main__":
    run_rounds(RoundsConfig(**json.loads(Path(sys.argv[1]).read_text())), Child)
