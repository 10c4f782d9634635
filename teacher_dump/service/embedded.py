"""A teacher service over an engine of ours."""

import asyncio
import logging
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from aiohttp import ClientError, web
from numpy.typing import NDArray

from decant.schemas import Truncation
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.packed_rows import Reduction, pack_scored
from decant.teacher_dump.engines.seam import SequenceError
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.service.connection import Connection, Door, response_of
from decant.teacher_dump.service.routes import (
    HEALTH_PATH,
    Answer,
    Refusal,
    Service,
    is_authorised,
    note,
    refused,
)
from decant.teacher_dump.teacher import Teacher

log = logging.getLogger(__name__)


AT_ONCE = 2
"""Requests that the backend has: one that is scored, and the next."""

GONE = refused(400, "the client has left")


class EngineBackend:
    """A `TransformersEngine` that scores one request after another, in a thread."""

    def __init__(self, config: TeacherConfig, teacher: Teacher, max_length: int) -> None:
        """Load the teacher."""
        from decant.teacher_dump.engines.transformers.engine import TransformersEngine

        self._engine = TransformersEngine(
            config,
            teacher.model_path,
            vocab_size=teacher.shared_vocab_size,
            truncation=Truncation(),  # each request says its own
            temperatures=(1.0,),
            max_length=max_length,
        )
        self._thread = ThreadPoolExecutor(1, "score")

    def check(self, reduction: Reduction) -> None:
        """Everything can be had."""

    async def score(
        self, reduction: Reduction, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> list[NDArray[np.int32] | None]:
        """Packed rows of each sequence; None ends the list: its logits are not finite."""
        loop = asyncio.get_running_loop()
        scored = loop.run_in_executor(
            self._thread, self._score, reduction, sequences, first_sequence
        )
        try:
            return await asyncio.shield(scored)
        except asyncio.CancelledError:
            await asyncio.wait({scored})  # the thread goes on: the turn ends with it
            raise

    def close(self) -> None:
        """Free the teacher."""
        self._thread.shutdown(cancel_futures=True)
        self._engine.close()

    def _score(
        self, reduction: Reduction, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> list[NDArray[np.int32] | None]:
        engine = self._engine.reducing(
            vocab_size=reduction.vocab_size,
            truncation=reduction.truncation,
            temperatures=reduction.temperatures,
        )
        rows: list[NDArray[np.int32] | None] = []
        end = len(sequences)
        while (done := len(rows)) < end:
            try:
                for scored in engine.score(sequences[done:end], first_sequence + done):
                    rows.append(pack_scored(scored))
            except SequenceError as error:
                end = done + error.index
        return rows if end == len(sequences) else [*rows, None]


class Server:
    """The routes of a service as HTTP."""

    def __init__(self, service: Service, key: str) -> None:
        """Answer those who have the key; "": everybody."""
        self._service, self._key, self._limits = service, key, service.limits

    def runner(self) -> web.ServerRunner:
        """What listens; made within the event loop."""
        return web.ServerRunner(Door(self._handle, self._limits))

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.head_came()
        try:
            return await self._respond(request, connection)
        except asyncio.CancelledError:
            note(connection.client, request.method, request.path, GONE)
            raise

    async def _respond(
        self, request: web.BaseRequest, connection: Connection
    ) -> web.StreamResponse:
        where = connection.client, request.method, request.path
        answer = await self._answer(request, connection.client)
        note(*where, answer)
        response = response_of(answer)
        size = len(answer.body)
        try:
            with self._service.sending(answer, connection.drop):
                async with asyncio.timeout(self._limits.seconds(size)):
                    await response.prepare(request)
                    await response.write_eof()
        except TimeoutError:
            note(*where, refused(408, f"the answer of {size} bytes is not taken in time"))
            connection.drop()
        except OSError:
            note(*where, GONE)
        return response

    async def _answer(self, request: web.BaseRequest, client: str) -> Answer:
        if request.path == HEALTH_PATH:
            return Answer(200, b"")
        if self._key and not is_authorised(request.headers.get("Authorization"), self._key):
            return refused(401, "the API key is missing or wrong")

        async def read() -> bytes:
            return await _body(request)

        length = request.headers.get("Content-Length")
        return await self._service.answer(request.method, request.path, length, read, client)


async def _body(request: web.BaseRequest) -> bytes:
    """The body, as it is. Raises Refusal."""
    if coding := request.headers.get("Content-Encoding"):
        raise Refusal(415, f"a body with Content-Encoding {coding}: send it as it is")
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    parts = []
    try:
        while part := await request.content.readany():
            parts.append(part)
    except (OSError, web.RequestPayloadError, ClientError) as error:
        size = sum(map(len, parts))
        raise Refusal(400, f"the client has left after {size} bytes of its body") from error
    return b"".join(parts)


async def listen(service: Service, host: str, port: int, key: str) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    runner = Server(service, key).runner()
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        for address in runner.addresses:
            log.info("serving on http://%s:%d", *address[:2])
        await _told_to_end()
    finally:
        await runner.cleanup()


async def _told_to_end() -> None:
    """Wait for SIGINT or SIGTERM."""
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await told.wait()
