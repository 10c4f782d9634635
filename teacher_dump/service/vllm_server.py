"""The teacher service on vLLM's own server: our routes beside vLLM's, on the same engine.

vLLM loads `Endpoint` through its plugin group vllm.endpoint_plugins, in the server's process; the
scoring head reaches the engine's processes as everywhere (`vllm_plugin`). `become_server` starts
it. Imports vLLM; only a serving process loads this file.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import sys
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from typing import Any, NoReturn

import numpy as np
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from starlette.datastructures import Headers, State
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.inputs import tokens_input
from vllm.v1.engine.exceptions import EngineDeadError

from decant.teacher_dump.config import ServiceLimits
from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.http.messages import TeacherCard
from decant.teacher_dump.engines.packed_rows import Reduction
from decant.teacher_dump.engines.remote.texts import shown
from decant.teacher_dump.engines.seam import EngineError
from decant.teacher_dump.engines.vllm import (
    prompt_logprobs as vllm_prompt_logprobs,
)
from decant.teacher_dump.engines.vllm import (
    setup as vllm_setup,
)
from decant.teacher_dump.engines.vllm.messages import Load, Refused
from decant.teacher_dump.engines.vllm.names import PLUGIN, SERVER_VARIABLE
from decant.teacher_dump.engines.vllm.process import torch_is_cpu_only, worker_environment
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.service.routes import (
    HEALTH_PATH,
    PATHS,
    RETRY_SECONDS,
    Answer,
    Refusal,
    Service,
    is_authorised,
    note,
    refused,
    tokenizer_files,
)
from decant.teacher_dump.tokenizer import load_tokenizer

log = logging.getLogger("teacher_dump.serve")

SERVICE_VARIABLE = "DECANT_SERVICE"
"""Tells the plugin, as JSON, what `become_server` knows."""
PIECE_BYTES = 256 << 10
"""Of an answer, that wait to be taken."""
SERVER_MODULE = "vllm.entrypoints.launchers.api_server.entry"


def become_server(
    config: TeacherConfig,
    model_path: str,
    tokenizer_path: str,
    card: TeacherCard,
    *,
    host: str,
    port: int,
    key_variable: str,
    max_length: int,
    limits: ServiceLimits,
) -> NoReturn:
    """Replace this process by vLLM's server of the teacher. Raises EngineError.

    It scores sequences of up to `max_length` tokens, with 0 of as many as vLLM reads.

    `tokenizer_path` is "" if the service offers no tokenizer.
    """
    on_cpu = torch_is_cpu_only()
    load = Load(
        model_path=model_path,
        trust_remote_code=config.trust_remote_code,
        dtype=config.dtype,
        max_batch_tokens=config.max_batch_tokens,
        max_length=max_length,
        tensor_parallel=config.tensor_parallel,
        route="",
        on_cpu=on_cpu,
    )
    os.environ.update(worker_environment(on_cpu, engine_in_worker=False))
    try:
        vllm_setup.require_plugin()
        setup = vllm_setup.choose(load)
    except Refused as error:
        raise EngineError(f"vLLM cannot run the teacher {model_path}: {error}") from error
    ready = setup.ready
    log.info(
        "vLLM %s: %s, route %s%s",
        ready.version,
        ready.dtype,
        ready.route,
        f" ({ready.why})" if ready.why else "",
    )
    card = card.served_by(ready.route, ready.max_length)
    os.environ[SERVICE_VARIABLE] = json.dumps(
        {
            "card": card.to_bytes().decode(),
            "why": ready.why,
            "tokenizer": tokenizer_path,
            "trust_remote_code": config.trust_remote_code,
            "key_variable": key_variable,
            "address": f"{host}:{port}",
            "limits": dataclasses.asdict(limits),
        }
    )
    os.environ[SERVER_VARIABLE] = str(os.getpid())
    os.environ["VLLM_PLUGINS"] = _with_plugin(os.environ.get("VLLM_PLUGINS"))
    options = {
        **setup.options,
        "host": host,
        "port": port,
        "uvicorn_log_level": "warning",
        "disable_uvicorn_access_log": True,
        "disable_fastapi_docs": True,
    }
    arguments = [*_arguments(options), "--middleware", f"{Guard.__module__}.{Guard.__name__}"]
    log.info("starting vLLM's server on %s:%d", host, port)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", SERVER_MODULE, *arguments])


def _with_plugin(allowed: str | None) -> str:
    """VLLM_PLUGINS with ours: vLLM adds routes of plugins that are named there alone."""
    names = allowed.split(",") if allowed else []
    return ",".join(names if PLUGIN in names else [*names, PLUGIN])


def _arguments(options: dict[str, Any]) -> list[str]:
    """Options of `vllm.LLM` as a command line."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            arguments.append(f"--{flag}={text}")
    return arguments


class Endpoint:
    """Our plugin of vLLM's server; see vLLM's `EndpointPlugin`."""

    name = PLUGIN
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes."""

        async def handle(request: Request) -> Response:
            service: Service = request.app.state.decant_service
            method, path, client = request.method, request.url.path, _client(request.scope)

            async def read() -> bytes:
                try:
                    return await request.body()
                except ClientDisconnect as error:
                    raise Refusal(400, "the client has left within its body") from error

            length = request.headers.get("content-length")
            answer = await service.answer(method, path, length, read, client)
            note(client, method, path, answer)
            return _Sent(service, answer)

        for path, method in PATHS.items():
            app.add_api_route(path, handle, methods=[method], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Put the service behind them."""
        given = json.loads(os.environ[SERVICE_VARIABLE])
        card = TeacherCard.from_bytes(given["card"].encode(), SERVICE_VARIABLE)
        tokenizer = None
        if given["tokenizer"]:
            tokenizer = load_tokenizer(
                given["tokenizer"], trust_remote_code=given["trust_remote_code"]
            )
        backend = AsyncBackend(engine_client, card, given["why"])
        limits = ServiceLimits(**given["limits"])
        state.decant_service = Service(card, tokenizer_files(tokenizer), backend, limits)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        log.info("serving on http://%s", given["address"])


class AsyncBackend:
    """vLLM's engine client: sequences of all requests run together."""

    def __init__(self, client: Any, card: TeacherCard, why: str) -> None:
        """`why` says why the route of the card is not the first choice."""
        self._client, self._card, self._why = client, card, why
        self._running = 0
        self._is_cleaning = False
        self._changed = asyncio.Condition()

    def check(self, reduction: Reduction) -> None:
        """Raise ValueError if the route cannot give this."""
        if self._card.route == "prompt_logprobs":
            try:
                vllm_prompt_logprobs.check(reduction, self._card.teacher.vocab_size, self._why)
            except Refused as error:
                raise EngineError(str(error)) from error

    async def score(
        self, reduction: Reduction, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> list[NDArray[np.int32] | None]:
        """Packed rows of each sequence; None ends the list: its logits are not finite."""
        try:
            async with self._among_others():
                rows = await asyncio.gather(
                    *(
                        self._one(reduction, sequence, first_sequence + place)
                        for place, sequence in enumerate(sequences)
                    )
                )
            for place, part in enumerate(rows):
                if part is None:  # or what another sequence left behind: see `clear_kv_cache`
                    async with self._alone():
                        await self._client.collective_rpc("clear_kv_cache")
                        part = await self._one(reduction, sequences[place], first_sequence + place)
                        rows[place] = part
                        if part is None:
                            await self._client.collective_rpc("clear_kv_cache")
                            return rows[: place + 1]
        except EngineDeadError as error:
            raise Refusal(503, f"the engine has ended: {error}") from error
        return rows

    async def _one(
        self, reduction: Reduction, sequence: TokenSequence, number: int
    ) -> NDArray[np.int32] | None:
        ids, positions = sequence.input_ids, np.flatnonzero(sequence.is_target)
        prompt, name = tokens_input(ids.tolist()), uuid.uuid4().hex
        if self._card.route == "prompt_logprobs":
            params = vllm_prompt_logprobs.request_params(reduction)
            (output,) = [out async for out in self._client.generate(prompt, params, name)]
            return vllm_prompt_logprobs.rows_from_flat(
                output.prompt_logprobs, reduction, ids, positions
            )
        from decant.teacher_dump.engines.vllm import scoring_head

        params = scoring_head.request_params(reduction, ids, positions, number)
        (output,) = [out async for out in self._client.encode(prompt, params, name)]
        return scoring_head.rows_of(output, len(positions))

    @contextlib.asynccontextmanager
    async def _among_others(self) -> AsyncIterator[None]:
        """While this is held nobody is alone."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._is_cleaning)
            self._running += 1
        try:
            yield
        finally:
            async with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """While this is held no sequence runs but ours."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._is_cleaning)
            self._is_cleaning = True
            await self._changed.wait_for(lambda: not self._running)
        try:
            yield
        finally:
            async with self._changed:
                self._is_cleaning = False
                self._changed.notify_all()


class _Sent(Response):
    """An answer of ours, which takes memory until it has been sent."""

    def __init__(self, service: Service, answer: Answer) -> None:
        """Nothing is sent yet."""
        headers = dict(answer.headers)
        super().__init__(answer.body, answer.status, headers, media_type=answer.media_type)
        self._service, self._answer = service, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it in pieces, as fast as the client takes them. Raises Refusal."""
        start = {"type": "http.response.start", "status": self.status_code}
        size = len(self.body)
        try:
            async with asyncio.timeout(self._service.limits.seconds(size)) as scope_of_time:
                with self._service.sending(self._answer, lambda: scope_of_time.reschedule(0)):
                    await send({**start, "headers": self.raw_headers})
                    for place in range(0, max(size, 1), PIECE_BYTES):
                        piece = self.body[place : place + PIECE_BYTES]
                        goes_on = place + PIECE_BYTES < size
                        await send(
                            {"type": "http.response.body", "body": piece, "more_body": goes_on}
                        )
        except TimeoutError as error:
            raise Refusal(408, f"the answer of {size} bytes is not taken in time") from error


class Guard:
    """ASGI middleware before every route of vLLM's server: the API key, and limits of bodies.

    vLLM's own `--api-key` leaves several routes open, its health alone is open here.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand before `app`."""
        given = json.loads(os.environ[SERVICE_VARIABLE])
        self._app = app
        self._key = os.environ[given["key_variable"]] if given["key_variable"] else ""
        self._limits = ServiceLimits(**given["limits"])
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what bears the key and keeps within the limits."""
        if scope["type"] == "lifespan" or scope.get("path") == HEALTH_PATH:
            await self._app(scope, receive, send)
            return
        where, began = (_client(scope), scope.get("method", "?"), scope.get("path", "?")), False

        async def sent(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            self._check(Headers(scope=scope))
            self._num_open += 1
            try:
                await self._app(scope, self._bounded(scope, receive), sent)
            finally:
                self._num_open -= 1
        except ClientDisconnect:
            note(*where, refused(400, "the client has left within its body"))
        except Refusal as refusal:
            answer = refused(refusal.status, str(refusal))
            note(*where, answer)
            if not began:
                headers = {"Connection": "close", "Retry-After": str(RETRY_SECONDS)}
                response = Response(answer.body, answer.status, headers, answer.media_type)
                await response(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        """Raise Refusal for what is seen in the head."""
        if self._key and not is_authorised(headers.get("authorization"), self._key):
            raise Refusal(401, "the API key is missing or wrong")
        if self._num_open >= self._limits.max_connections:
            raise Refusal(429, "too many requests are open")
        length, most = headers.get("content-length", "0"), self._limits.max_body_bytes
        if not (length.isascii() and length.isdecimal()):
            raise Refusal(400, "Content-Length is no number")
        if len(length) > 18 or int(length) > most:
            raise Refusal(413, f"a body of {shown(length)} bytes, at most {most}")

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """The body as it comes, up to the limits of its size and time."""
        most, size, is_over = self._limits.max_body_bytes, 0, False
        ends = asyncio.get_running_loop().time() + self._limits.seconds(
            int(Headers(scope=scope).get("content-length", "0"))
        )

        async def bounded() -> Message:
            nonlocal size, is_over
            if is_over:  # what follows a body is that the client leaves, whenever that is
                return await receive()
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError as error:
                raise Refusal(408, "the body of a request does not come in time") from error
            size += len(message.get("body", b""))
            if size > most:
                raise Refusal(413, f"a body of more than {most} bytes")
            is_over = not message.get("more_body", False)
            return message

        return bounded


def _client(scope: Scope) -> str:
    """The address of a request's client."""
    return (scope.get("client") or ("",))[0]
