"""Our entry points in vLLM's plugin groups, loaded by its processes wherever it starts them.

Without effect unless `HEAD_VARIABLE` asks for it, so that vLLM's other uses of this environment
stay as they are. vLLM is imported only then.
"""

import os
import threading
import time
from typing import Any

PLUGIN = "decant"
"""Our name in the groups vllm.general_plugins and vllm.endpoint_plugins, and in VLLM_PLUGINS."""
HEAD_VARIABLE = "DECANT_SCORING_HEAD"
"""Architecture that is to carry the scoring head."""
SERVER_VARIABLE = "DECANT_SERVER_PID"
"""The process that serves; those it starts are to end with it."""
WATCH_SECONDS = 1.0


def put_head_on() -> None:
    """Register the scoring head in this process, if one is asked for.

    A process of a server's also watches its parent from now on.
    """
    server = os.environ.get(SERVER_VARIABLE)
    if server and int(server) != os.getpid():
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    architecture = os.environ.get(HEAD_VARIABLE)
    if architecture:
        from decant.teacher_dump.engines.vllm import scoring_head as vllm_model

        vllm_model.register(architecture)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: vLLM's would keep the GPU of a killed server."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def endpoint() -> Any:
    """Our routes for vLLM's server; asked for only if VLLM_PLUGINS names us."""
    from decant.teacher_dump.service.vllm_server import Endpoint

    return Endpoint()


class WorkerExtension:
    """What we add to every worker of vLLM, to be called by `collective_rpc`."""

    model_runner: Any

    def clear_kv_cache(self) -> None:
        """Zero the keys and values of all sequences, none of which may be running.

        vLLM reads whole blocks and multiplies what lies beyond a sequence by zero, so a NaN that
        one sequence leaves behind spoils the next one in its block.
        """
        for tensor in self.model_runner.kv_caches:
            tensor.zero_()
