"""Sample responses with vLLM, in a process of its own; see `generation.py`.

Knows the process alone (`vllm_process`); how vLLM is asked is `vllm_sampling`'s.
"""

import logging
from collections.abc import Sequence

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.seam import EngineError, Prompt, Response, Sampling
from decant.teacher_dump.engines.vllm.messages import Load, Ready, SamplingJob
from decant.teacher_dump.engines.vllm.process import (
    Ended,
    WorkerProcess,
    require_vllm,
    torch_is_cpu_only,
)

log = logging.getLogger(__name__)


class VllmGenerator:
    """A causal LM that vLLM samples from."""

    def __init__(
        self, config: TeacherConfig, model_path: str, *, sampling: Sampling, max_length: int
    ) -> None:
        """Load the teacher; see `open_generator`."""
        require_vllm()
        self._job = SamplingJob(
            load=Load(
                model_path=model_path,
                trust_remote_code=config.trust_remote_code,
                dtype=config.dtype,
                max_batch_tokens=config.max_batch_tokens,
                max_length=max_length,
                tensor_parallel=config.tensor_parallel,
                route="prompt_logprobs",
                on_cpu=torch_is_cpu_only(),
            ),
            sampling=sampling,
        )
        self._worker: WorkerProcess | None = None
        self._start()

    def generate(self, prompts: Sequence[Prompt]) -> list[Response]:
        """One response per prompt, in the order given; see `Generator.generate`.

        If the worker ends, EngineError says how; the next call loads the teacher again.
        """
        if self._worker is None:
            log.warning("the vLLM process is gone; loading the teacher again")
            self._start()
        assert self._worker is not None
        try:
            self._worker.send(list(prompts))
            responses: list[Response] = self._worker.receive()
        except Ended:
            self.close()
            raise
        return responses

    def close(self) -> None:
        """End the worker; calling it again does no harm."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _start(self) -> None:
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
        log.info("vLLM %s samples responses, %s", ready.version, ready.dtype)
