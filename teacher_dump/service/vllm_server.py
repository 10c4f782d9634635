"""The teacher service on vLLM's own server: our routes beside vLLM's, on the same engine.

vLLM loads `Endpoint` through its plugin group vllm.endpoint_plugins, in the server's process; the
scoring head reaches the engine's processes as everywhere (`vllm_plugin`). `become_server` starts
it. Imports vLLM; only a serving process loads this file.
"""

import asyncio
import contextlib
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
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.inputs import tokens_input
from vllm.v1.engine.exceptions import EngineDeadError

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.http.messages import TeacherCard
from decant.teacher_dump.engines.packed_rows import Reduction
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
    Refusal,
    Service,
    is_authorised,
    refused,
    tokenizer_files,
)
from decant.teacher_dump.tokenizer import load_tokenizer

log = logging.getLogger("teacher_dump.serve")

SERVICE_VARIABLE = "DECANT_SERVICE"
"""Tells the plugin, as JSON, what `become_server` knows."""
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
    arguments = _arguments(options)
    if key_variable:
        arguments += ["--middleware", f"{Guard.__module__}.{Guard.__name__}"]
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
            length = request.headers.get("content-length")
            answer = await service.answer(request.method, request.url.path, length, request.body)
            return Response(
                answer.body, answer.status, dict(answer.headers), media_type=answer.media_type
            )

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
        state.decant_service = Service(card, tokenizer_files(tokenizer), backend)
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


class Guard:
    """ASGI middleware that asks for the API key on every route of vLLM's server but its health.

    vLLM's own `--api-key` leaves several routes open.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand before `app`."""
        self._app = app
        self._key = os.environ[json.loads(os.environ[SERVICE_VARIABLE])["key_variable"]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what bears the key."""
        is_open = scope["type"] == "lifespan" or scope.get("path") == HEALTH_PATH
        if is_open or is_authorised(Headers(scope=scope).get("authorization"), self._key):
            await self._app(scope, receive, send)
            return
        answer = refused(401, "the API key is missing or wrong")
        response = Response(answer.body, answer.status, media_type=answer.media_type)
        await response(scope, receive, send)
