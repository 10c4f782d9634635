"""Offer a teacher to dump jobs on other machines: `decant serve`.

With engine vllm this process becomes vLLM's own server, to which our routes are added
(`vllm_server.py`); with engine transformers it serves by itself. Either way the routes are those of
`routes.py`.
"""

import asyncio
import ipaddress
import logging
import os
import socket
from typing import Any

from decant.schemas import tokenizer_fingerprint
from decant.teacher_dump.config import ServeConfig
from decant.teacher_dump.engines.http.messages import PROTOCOL, TeacherCard
from decant.teacher_dump.engines.remote.keys import key_from
from decant.teacher_dump.engines.vllm.process import require_vllm
from decant.teacher_dump.service.embedded import AT_ONCE, EngineBackend, listen
from decant.teacher_dump.service.routes import (
    Service,
    tokenizer_files,
)
from decant.teacher_dump.teacher import Teacher, describe_teacher, hash_weights

log = logging.getLogger(__name__)


def serve(config: ServeConfig) -> None:
    """Serve until the process is told to end. Raises ValueError if the user must change something.

    With engine vllm this does not return: the process is replaced by vLLM's server.
    """
    if config.teacher.engine == "vllm":
        require_vllm()
    key = key_from(config.api_key_env, "api_key_env")
    addresses = _addresses(config.host, config.port)
    if not key and not all(
        ipaddress.ip_address(a[4][0].split("%")[0]).is_loopback for a in addresses
    ):
        if not config.allow_without_key:
            raise ValueError(
                f"host {config.host!r} is reached from other machines, and no API key is asked "
                "for: name an environment variable with a key in api_key_env, or set "
                "allow_without_key if whoever reaches the port may use the teacher"
            )
        log.warning("no api_key_env: whoever reaches %s:%d can use it", config.host, config.port)
    _probe(addresses[0], config)
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
            max_length=config.max_length,
            limits=config.limits,
        )
    service, backend = make_service(config, teacher)
    try:
        asyncio.run(listen(service, config.host, config.port, key))
    finally:
        backend.close()


def _addresses(host: str, port: int) -> list[Any]:
    """What the host's name stands for, as `socket.getaddrinfo` says it. Raises ValueError."""
    try:
        return socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error


def _probe(address: Any, config: ServeConfig) -> None:
    """Raise ValueError if nothing can listen there, before minutes go into hashing and loading."""
    family, kind, protocol, _, place = address
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise _cannot_listen(config.host, config.port, error) from error


def _cannot_listen(host: str, port: int, error: Exception) -> ValueError:
    why = getattr(error, "strerror", None) or error
    return ValueError(f"cannot listen on {host}:{port}: {why}; set host or port")


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
    files = tokenizer_files(teacher.tokenizer)
    return Service(card, files, backend, config.limits, at_once=AT_ONCE), backend
