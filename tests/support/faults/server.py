"""The process that forks commands: a line of JSON asks for one, a line of JSON has its end."""

import contextlib
import ctypes
import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

PRELOAD = (
    "datasets",
    "decant.__main__",
    "decant.commands",
    "decant.storage.edit.subset",
    "decant.storage.exchange.importing",
    "decant.storage.exchange.export",
    "decant.storage.inspect.collect",
    "decant.storage.inspect.html",
    "decant.student_train.loop",
    "decant.student_train.rounds.run",
    "decant.student_train.verdict",
    "decant.teacher_dump.job.run",
    "decant.teacher_dump.planning.predict",
    "decant.teacher_dump.engines.transformers.engine",
    "decant.teacher_dump.engines.transformers.generate",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torchao.quantization",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)


def serve(library: ctypes.CDLL) -> None:
    """Answer until stdin ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            pid = os.fork()
            if not pid:
                _child(library, asked, Path(folder))
            code = _end_of(pid, asked["seconds"])
            texts = {
                n: (Path(folder) / n).read_text(errors="replace") for n in ("stdout", "stderr")
            }
        print(json.dumps({"code": code, **texts}), flush=True)


def _end_of(pid: int, seconds: float) -> int | None:
    """Exit code, minus the signal that ended it; None if it had to be killed."""
    handle = os.pidfd_open(pid)
    try:
        in_time = select.select([handle], [], [], seconds)[0]
        if not in_time:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status) if in_time else None
    finally:
        os.close(handle)


def _child(library: ctypes.CDLL, asked: dict[str, Any], output: Path) -> None:
    code = 70
    try:
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            file = os.open(output / name, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, value in asked["environment"].items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        if asked["folder"]:
            os.chdir(asked["folder"])
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, value in asked["limits"].items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        if asked["fault"]:
            _arm(library, **asked["fault"])
        from decant.__main__ import main

        sys.argv = ["decant", *asked["arguments"]]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _arm(
    library: ctypes.CDLL,
    *,
    under: list[str],
    kinds: list[str],
    at: int,
    how: int,
    lasting: bool,
    half: bool,
    log: str,
    clock_back: int,
) -> None:
    if clock_back:
        library.faults_turn_clock_back(ctypes.c_long(clock_back), ctypes.c_long(2))
    library.faults_arm(
        "\n".join(under).encode(errors="surrogateescape"),
        "".join(f"{kind}," for kind in kinds).encode(),
        ctypes.c_long(at),
        ctypes.c_int(how),
        ctypes.c_int(lasting),
        ctypes.c_int(half),
        log.encode(),
    )


def _warm_up() -> None:
    """Import and remember what every command would begin with."""
    for module in PRELOAD:
        __import__(module)
    from transformers import AutoModelForCausalLM

    from decant.commands import ALL
    from decant.storage.cli.commands import dispatch
    from tests.support import models

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # a thread, which no fork would have
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for _, entries in ALL:
            for entry in entries:
                dispatch("decant", "", ALL, [entry.name, "--help"])
        models.save_teacher(Path(folder))
        AutoModelForCausalLM.from_pretrained(folder)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    assert threading.active_count() == 1, threading.enumerate()


if __name__ == "__main__":
    _warm_up()
    serve(ctypes.CDLL(sys.argv[1]))
