"""The process that holds vLLM: windows of token ids in, packed rows out; or prompts, responses.

vLLM replaces functions of torch, binds threads and takes memory: it gets a process of its own. The
engine's side is `vllm_process`; how vLLM is asked is `vllm_setup`'s. vLLM is imported when a job
arrives, never with this file.
"""

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from decant.teacher_dump.engines.vllm import (
    prompt_logprobs as vllm_prompt_logprobs,
)
from decant.teacher_dump.engines.vllm import (
    setup as vllm_setup,
)
from decant.teacher_dump.engines.vllm.messages import (
    Failed,
    Job,
    Ready,
    Refused,
    SamplingJob,
    ScoredWindow,
    Window,
)


def main(descriptor: int) -> None:
    """Serve the engine at the other end of a socket until it closes."""
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    try:
        job: Job | SamplingJob = connection.recv()
        # Reads ahead, so that neither side waits for the other to read; ends with the engine.
        threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
        answer: Callable[[Any], Any]
        if isinstance(job, SamplingJob):
            from decant.teacher_dump.engines.vllm import sampling

            answer, ready = sampling.load(job)
        else:
            answer, ready = load(job)
        connection.send(ready)
        while True:
            connection.send(answer(requests.get()))
    except Refused as error:
        connection.send(Failed(str(error), True))
    except Exception as error:
        traceback.print_exc()
        connection.send(Failed(f"{type(error).__name__}: {error}", False))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # vLLM's own threads and exit handlers have nothing left to do


def _receive(connection: Connection, requests: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            requests.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def load(job: Job) -> tuple[Callable[[Window], ScoredWindow], Ready]:
    """Load the teacher and say how windows are scored. Raises Refused."""
    import vllm

    setup = vllm_setup.choose(job.load)
    reduction = job.reduction
    if setup.num_rows < reduction.vocab_size:
        raise Refused(
            f"the teacher has {setup.num_rows} output rows, fewer than {reduction.vocab_size} ids"
        )
    if setup.ready.route == "prompt_logprobs":
        vllm_prompt_logprobs.check(reduction, setup.num_rows, setup.ready.why)
        score = vllm_prompt_logprobs.score
    else:
        from decant.teacher_dump.engines.vllm import scoring_head

        score = scoring_head.score
    llm = vllm.LLM(**setup.options)

    def answer(window: Window) -> ScoredWindow:
        rows = score(llm, reduction, window)
        for index, part in enumerate(rows):
            if part is None:  # or what another sequence left behind: see `clear_kv_cache`
                llm.collective_rpc("clear_kv_cache")
                (rows[index],) = score(llm, reduction, window.only(index))
            if rows[index] is None:
                llm.collective_rpc("clear_kv_cache")
                return ScoredWindow(window.number, rows[: index + 1])
        return ScoredWindow(window.number, rows)

    return answer, setup.ready
