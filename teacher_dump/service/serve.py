"""Offer a teacher to dump jobs on other machines: `python -m teacher_dump serve`.

With engine vllm this process becomes vLLM's own server, to which our routes are added
(`engines/vllm_server.py`); with engine transformers it serves by itself. Either way the routes are
those of `service.py`.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from decant.schemas import Truncation, tokenizer_fingerprint
from decant.teacher_dump.config import ServeConfig
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.http.messages import PROTOCOL, TeacherCard, key_from
from decant.teacher_dump.engines.packed_rows import Reduction, pack_scored
from decant.teacher_dump.engines.seam import SequenceError
from decant.teacher_dump.engines.vllm.process import require_vllm
from decant.teacher_dump.inputs.sequences import TokenSequence
from decant.teacher_dump.service.routes import (
    HEALTH_PATH,
    MAX_BODY_BYTES,
    Service,
    is_authorised,
    refused,
    tokenizer_files,
)
from decant.teacher_dump.teacher import Teacher, describe_teacher, hash_weights

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(config: ServeConfig) -> None:
    """Serve until the process is told to end. Raises ValueError if the user must change something.

    With engine vllm this does not return: the process is replaced by vLLM's server.
    """
    if config.teacher.engine == "vllm":
        require_vllm()
    key = key_from(config.api_key_env, "api_key_env")
    if not key and config.host not in LOOPBACK:
        log.warning("no api_key_env: whoever reaches %s:%d can use it", config.host, config.port)
    _probe(config.host, config.port)
    teacher = hash_weights(describe_teacher(config.teacher), progress=log.info)
    if config.teacher.engine == "vllm":
        from decant.teacher_dump.service.vllm_server import become_server

        become_server(
            config.teacher,
            teacher.model_path,
            os.path.expanduser(config.teacher.tokenizer or teacher.model_path)
            if teacher.tokenizer
            else "",
            card_of(config, teacher),
            host=config.host,
            port=config.port,
            key_variable=config.api_key_env,
        )
    service, backend = make_service(config, teacher)
    try:
        asyncio.run(_listen(service, config.host, config.port, key))
    finally:
        backend.close()


def _probe(host: str, port: int) -> None:
    """Raise ValueError if nothing can listen there, before minutes go into hashing and loading."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; set host or port"
        ) from error


def card_of(config: ServeConfig, teacher: Teacher) -> TeacherCard:
    """What the service says of its teacher. Raises ValueError if max_length does not suit it."""
    limit = teacher.max_positions
    if limit and config.max_length > limit:
        raise ValueError(f"max_length is {config.max_length}, the teacher takes at most {limit}")
    if not (max_length := config.max_length or limit):
        raise ValueError("the model's configuration states no longest sequence: set max_length")
    return TeacherCard(
        protocol=PROTOCOL,
        teacher=teacher.info,
        route="",
        tokenizer_fingerprint=tokenizer_fingerprint(teacher.tokenizer) if teacher.tokenizer else "",
        max_positions=limit,
        max_length=max_length,
    )


def make_service(config: ServeConfig, teacher: Teacher) -> tuple[Service, "EngineBackend"]:
    """Load the teacher into this process and put its routes before it."""
    card = card_of(config, teacher)
    backend = EngineBackend(config.teacher, teacher, card.max_length)
    return Service(card, tokenizer_files(teacher.tokenizer), backend), backend


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


async def _listen(service: Service, host: str, port: int, key: str) -> None:
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
