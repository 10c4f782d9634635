"""Teacher services for tests: `python -m teacher_dump serve` as a process, and one that misbehaves.

The processes are forked as `tests.commands` does; the misbehaving one is a real HTTP server in a
thread of this process, with a real engine behind it.
"""

import asyncio
import collections
import contextlib
import functools
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from decant.schemas import TeacherInfo
from decant.teacher_dump.config import ServeConfig, ServiceLimits
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.http.messages import PROTOCOL, SCORE_PATH, TeacherCard
from decant.teacher_dump.engines.packed_rows import Reduction
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.service.embedded import EngineBackend, Server
from decant.teacher_dump.service.routes import Service
from decant.teacher_dump.service.serve import make_service
from decant.teacher_dump.teacher import describe_teacher, hash_weights
from tests.support.commands import Command, setting

READY_SECONDS = 300


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class ServedTeacher:
    """`python -m teacher_dump serve` in a process of its own, on a port that stays the same."""

    def __init__(self, path: Path, *options: str, key: str = "") -> None:
        """Start it and wait until it serves; its key, if any, is in $SERVICE_KEY."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._key = key
        self.start(path, *options)

    def start(self, path: Path, *options: str) -> None:
        """Start a service of this teacher on the port."""
        if self._key:
            options = (*options, "--api_key_env", "SERVICE_KEY")
        self._command = Command(
            "teacher_dump",
            "serve",
            *("--teacher.path", str(path), "--teacher.dtype", "float32"),
            *("--port", str(self.port), *options),
            first=setting({"SERVICE_KEY": self._key}),
        )
        wait_for(self._is_ready)

    def kill(self) -> None:
        """SIGKILL, as a machine that fails."""
        self._command.kill_after(0)
        self._command.result()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._command.signal_when(lambda: True, signal.SIGTERM)
        return self._command.result().code

    def said(self) -> str:
        """Its log so far."""
        return self._command.stderr()

    def _is_ready(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, OSError):
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds."""
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


class Unreliable:
    """A service in this process that answers the next score requests with given failures."""

    def __init__(self, service: Service) -> None:
        """Serve at `url` until `close`."""
        self._service = service
        self.failures: collections.deque[int | str] = collections.deque()
        """HTTP statuses, "drop" for a closed connection, or what is done to an answer: "damage"
        cuts it short, "nan" and "ids" put absurd words into its last target."""
        self.most_at_once = self._now = self.num_requests = 0
        self.delay = 0.0
        self.row_words = 0
        """Of a target, for "ids"."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def close(self) -> None:
        """End the server."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _start(self) -> str:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _handle(self, request: web.Request) -> web.Response:
        scores = request.path == SCORE_PATH
        if scores:
            self.num_requests += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            await asyncio.sleep(self.delay if scores else 0)
            failure = self.failures.popleft() if scores and self.failures else None
            if failure == "drop":
                assert request.transport is not None
                request.transport.abort()
            if isinstance(failure, int):
                return web.Response(status=failure, text='{"error": "made to fail"}')
            length = request.headers.get("Content-Length")
            answer = await self._service.answer(request.method, request.path, length, request.read)
            body = answer.body
            if failure == "damage":
                body = body[:-4]
            elif failure == "nan":
                body = body[:-4] + np.float32(np.nan).tobytes()
            elif failure == "ids":
                start = len(body) - 4 * self.row_words
                body = body[:start] + np.int32(2**31 - 1).tobytes() + body[start + 4 :]
            return web.Response(status=answer.status, body=body, headers=answer.headers)
        finally:
            if scores:
                self._now -= 1


@contextlib.contextmanager
def unreliable(path: Path, max_length: int = 0, tokenizer: str = "") -> Iterator[Unreliable]:
    """An unreliable service of the teacher at `path`, for sequences of so many tokens."""
    teacher_config = TeacherConfig(path=str(path), dtype="float32", tokenizer=tokenizer)
    config = ServeConfig(teacher=teacher_config, max_length=max_length)
    teacher = hash_weights(describe_teacher(config.teacher))
    with contextlib.ExitStack() as stack:
        service, backend = make_service(config, teacher)
        assert isinstance(backend, EngineBackend)
        stack.callback(backend.close)
        server = Unreliable(service)
        stack.callback(server.close)
        yield server


def http_config(*urls: str, **options: object) -> TeacherConfig:
    """A client's configuration; small requests, so that there are many."""
    settings: dict[str, object] = {"max_batch_tokens": 128, "wait_seconds": 60.0}
    return functools.partial(TeacherConfig, engine="http", endpoints=urls)(**(settings | options))  # type: ignore[arg-type]


def card_of(max_length: int = 128) -> TeacherCard:
    """What a service says of a teacher that is not there, of 320 output rows."""
    return TeacherCard(
        protocol=PROTOCOL,
        teacher=TeacherInfo(
            name="t", fingerprint="f", architecture="a", engine="e 1", dtype="d", vocab_size=320
        ),
        route="",
        tokenizer_fingerprint="",
        max_positions=0,
        max_length=max_length,
    )


class Instant:
    """A backend that answers zeros, each request after `delay` seconds."""

    def __init__(self, delay: float = 0.0) -> None:
        """Nothing is scored yet."""
        self.delay = delay
        self.num_scored = 0

    def check(self, reduction: Reduction) -> None:
        """Everything can be had."""

    async def score(
        self, reduction: Reduction, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> list[NDArray[np.int32] | None]:
        """Zeros."""
        await asyncio.sleep(self.delay)
        self.num_scored += 1
        words = reduction.row_words
        return [np.zeros((int(s.is_target.sum()), words), np.int32) for s in sequences]


class Guarded:
    """A service as `decant serve` guards it, in this process, without a teacher behind it."""

    def __init__(self, limits: ServiceLimits, *, key: str = "", delay: float = 0.0) -> None:
        """Serve at `url` until `close`; one request is scored at a time."""
        self.card, self.backend = card_of(), Instant(delay)
        service = Service(self.card, {"a.json": b"{}"}, self.backend, limits, at_once=1)
        self._server = Server(service, key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self.url = f"http://127.0.0.1:{self.port}"

    async def _start(self) -> int:
        self._runner = self._server.runner()
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return int(self._runner.addresses[0][1])

    def close(self) -> None:
        """End the server."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@contextlib.contextmanager
def guarded(key: str = "", delay: float = 0.0, **limits: float) -> Iterator[Guarded]:
    """A guarded service with these limits."""
    server = Guarded(ServiceLimits(**limits), key=key, delay=delay)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()
