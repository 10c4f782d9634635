"""Our entry points in vLLM's plugin groups, loaded by its processes wherever it starts them.

Without effect unless `HEAD_VARIABLE` asks for it, so that vLLM's other uses of this environment
stay as they are. vLLM is imported only then.
"""

import os
import threading
import time
from typing import Any

from decant.teacher_dump.engines.vllm.names import HEAD_VARIABLE, SERVER_VARIABLE

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
        from decant.teacher_dump.engines.vllm import scoring_head

        scoring_head.register(architecture)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: vLLM's would keep the GPU of a killed server."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def endpoint() -> Any:
    """Our routes for vLLM's server; asked for only if VLLM_PLUGINS names us."""
    from decant.teacher_dump.service.vllm_server import Endpoint

    return Endpoint()
