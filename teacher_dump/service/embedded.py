"""A teacher service over an engine of ours."""

import asyncio
import logging
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from decant.schemas import Truncation
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.packed_rows import Reduction, pack_scored
from decant.teacher_dump.engines.seam import SequenceError
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.service.routes import (
    HEALTH_PATH,
    MAX_BODY_BYTES,
    Service,
    is_authorised,
    refused,
)
from decant.teacher_dump.teacher import Teacher

log = logging.getLogger(__name__)


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
        return await loop.run_in_executor(
            self._thread, self._score, reduction, sequences, first_sequence
        )

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


async def listen(service: Service, host: str, port: int, key: str) -> None:
    """Answer requests until SIGINT or SIGTERM."""

    async def handle(request: web.Request) -> web.Response:
        if request.path == HEALTH_PATH:
            return web.Response()
        if key and not is_authorised(request.headers.get("Authorization"), key):
            answer = refused(401, "the API key is missing or wrong")
        else:
            length = request.headers.get("Content-Length")
            answer = await service.answer(request.method, request.path, length, request.read)
        return web.Response(
            status=answer.status,
            body=answer.body,
            content_type=answer.media_type,
            headers=answer.headers,
        )

    application = web.Application(client_max_size=MAX_BODY_BYTES)
    application.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(application, access_log=None)
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
