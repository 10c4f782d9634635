"""A process that holds vLLM, seen from the engine: start, send, receive, end.

The process ends with the engine, however the engine ends: it watches the pipe.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from typing import Any

from decant.search_path import FOLDER
from decant.teacher_dump.engines.seam import EngineError
from decant.teacher_dump.engines.vllm.messages import Failed

CLOSE_SECONDS = 10
TAIL_LINES = 25
WORKER = (
    "import sys; from decant.teacher_dump.engines.vllm.worker import main; main(int(sys.argv[1]))"
)


class Ended(EngineError):
    """The process is gone, or has said that it gives up."""


class WorkerProcess:
    """A started `vllm_worker`."""

    def __init__(self, job: Any) -> None:
        """Start the process and give it its job."""
        self._log_file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._log_file,
                stderr=self._log_file,
                env=worker_environment(torch_is_cpu_only()),
                start_new_session=True,  # an interrupt from the keyboard is ours to act upon
            )
        self._connection = Connection(ours.detach())
        try:
            self.send(job)
        except BaseException:
            self.close()
            raise

    def send(self, message: Any) -> None:
        """Give the worker a message. Raises Ended."""
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            # It may have said why before it went.
            self.receive()

    def receive(self) -> Any:
        """The worker's next message. Raises Ended."""
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            code = self.process.wait()
            cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            hint = "; the memory may be too small" if code == -signal.SIGKILL else ""
            raise Ended(
                f"the vLLM process ended {cause}{hint}. Its last lines:\n{self._last_lines()}"
            ) from error
        if isinstance(message, Failed):
            lines = "" if message.is_clear else f". Its last lines:\n{self._last_lines()}"
            raise Ended(message.message + lines)
        return message

    def close(self) -> None:
        """End the worker and the processes of its own; calling it again does no harm."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log_file.close()

    def _last_lines(self) -> str:
        size = os.fstat(self._log_file.fileno()).st_size
        text = os.pread(self._log_file.fileno(), 8192, max(0, size - 8192)).decode(errors="replace")
        return "\n".join(text.splitlines()[-TAIL_LINES:])


def require_vllm() -> None:
    """Raise EngineError unless vLLM is installed; does not import it."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "teacher.engine vllm is not installed here: pip install 'decant[vllm]', best in an "
            "environment of its own, or use teacher.engine: transformers"
        )


def torch_is_cpu_only() -> bool:
    """Whether the installed torch, and so vLLM, has no accelerator; touches no device."""
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def worker_environment(on_cpu: bool, engine_in_worker: bool = True) -> dict[str, str]:
    """The variables of a process that runs vLLM; what the user has set wins over our defaults.

    `engine_in_worker` keeps vLLM's engine core in that process, which saves a copy of all numbers.
    """
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "HF_HUB_OFFLINE": "1",  # the model is a directory here
    }
    if on_cpu:
        defaults |= {
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "TORCH_COMPILE_DISABLE": "1",  # it needs a C++ compiler at run time
        }
    ours = {
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",  # the working directory may hold a `datasets.py` of the user's
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not engine_in_worker)),
    }
    return defaults | dict(os.environ) | ours
