"""A teacher behind HTTP: what it answers, whatever server carries it.

Knows requests and answers, keys and limits; the server and the engine are given. `serve.py` puts
them together, `engines/http_engine.py` is the other side.
"""

import hmac
import json
import logging
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from decant.schemas.truncation import check_temperatures
from decant.teacher_dump.engines.http.messages import (
    SCORE_PATH,
    TEACHER_PATH,
    TOKENIZER_PATH,
    MessageError,
    ScoreAnswer,
    ScoreRequest,
    TeacherCard,
    frame_files,
)
from decant.teacher_dump.engines.packed_rows import Reduction
from decant.teacher_dump.inputs.records import TokenSequence

log = logging.getLogger(__name__)

HEALTH_PATH = "/health"
PATHS = {TEACHER_PATH: "GET", TOKENIZER_PATH: "GET", SCORE_PATH: "POST"}
MAX_BODY_BYTES = 64 << 20
MAX_PENDING_TOKENS = 1 << 20
"""Tokens that are being scored or wait for it; at k=64 their answers take half a gigabyte."""
RETRY_SECONDS = 1


class Refusal(Exception):
    """A request that is not answered, with an HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        """Say why."""
        super().__init__(message)
        self.status = status


class Backend(Protocol):
    """An engine that scores requests, several at a time."""

    def check(self, reduction: Reduction) -> None:
        """Raise ValueError if this reduction cannot be had."""
        ...

    async def score(
        self, reduction: Reduction, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> list[NDArray[np.int32] | None]:
        """Packed rows of each sequence; None ends the list: its logits are not finite."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back."""

    status: int
    body: bytes
    media_type: str = "application/octet-stream"
    headers: Mapping[str, str] = field(default_factory=dict)


class Service:
    """The routes of a teacher."""

    def __init__(
        self, card: TeacherCard, tokenizer_files: dict[str, bytes], backend: Backend
    ) -> None:
        """Offer the teacher of `card`, which `backend` runs."""
        self._card, self._backend = card, backend
        self._digest = card.digest()
        self._tokenizer = frame_files(tokenizer_files)
        self._pending_tokens = 0

    async def answer(
        self, method: str, path: str, length: str | None, read: Callable[[], Awaitable[bytes]]
    ) -> Answer:
        """Answer a request whose body is `length` bytes, as its header says, and can be `read`."""
        try:
            if method != PATHS.get(path):
                raise Refusal(404 if path not in PATHS else 405, f"{method} {path} is not served")
            if path == TEACHER_PATH:
                return Answer(200, self._card.to_bytes(), "application/json")
            if path == TOKENIZER_PATH:
                return Answer(200, self._tokenizer)
            if length is None or not length.isdecimal():
                raise Refusal(411, "a score request must say its length")
            if int(length) > MAX_BODY_BYTES:
                raise Refusal(413, f"a score request has {length} bytes, at most {MAX_BODY_BYTES}")
            return Answer(200, await self._score(await read()))
        except Refusal as refusal:
            headers = {"Retry-After": str(RETRY_SECONDS)} if refusal.status == 429 else {}
            return refused(refusal.status, str(refusal), headers)
        except Exception as error:
            log.exception("a score request failed")
            return refused(500, f"{type(error).__name__}: {error}")

    async def _score(self, body: bytes) -> bytes:
        try:
            request = ScoreRequest.from_bytes(body)
            self._check(request)
        except MessageError as error:
            raise Refusal(400, str(error)) from error
        num_tokens = len(request.input_ids)
        if self._pending_tokens and self._pending_tokens + num_tokens > MAX_PENDING_TOKENS:
            raise Refusal(429, f"{self._pending_tokens} tokens are waiting already")
        self._pending_tokens += num_tokens
        try:
            rows = await self._backend.score(
                request.reduction, request.sequences(), request.first_sequence
            )
        finally:
            self._pending_tokens -= num_tokens
        whole = [part for part in rows if part is not None]
        answer = ScoreAnswer(rows=whole, not_finite=len(whole) < len(request.lengths))
        return answer.to_bytes()

    def _check(self, request: ScoreRequest) -> None:
        card = self._card
        if request.digest != self._digest:
            raise Refusal(409, f"another teacher is served here: {json.dumps(card.identity())}")
        rows = card.teacher.vocab_size
        if not 1 <= request.reduction.vocab_size <= rows:
            raise Refusal(400, f"vocabulary of {request.reduction.vocab_size} ids, at most {rows}")
        if not 0 <= request.input_ids.min() <= request.input_ids.max() < rows:
            raise Refusal(400, f"token ids must lie in [0, {rows})")
        if request.lengths.max() > card.max_length:
            raise Refusal(
                400, f"a sequence has {request.lengths.max()} tokens, at most {card.max_length}"
            )
        reduction = request.reduction
        if reduction.truncation.slots > reduction.vocab_size:
            slots = reduction.truncation.slots
            raise Refusal(400, f"{slots} entries per target of {reduction.vocab_size} ids")
        try:
            check_temperatures(reduction.temperatures)
            self._backend.check(reduction)
        except ValueError as error:
            raise Refusal(400, str(error)) from error


def tokenizer_files(tokenizer: Any | None) -> dict[str, bytes]:
    """The files that make this tokenizer elsewhere."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def refused(status: int, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    """The answer to a request that is refused."""
    body = json.dumps({"error": message}).encode()
    return Answer(status, body, "application/json", headers or {})


def is_authorised(authorization: str | None, key: str) -> bool:
    """Whether an Authorization header bears the key, told in constant time."""
    given = (authorization or "").encode(errors="surrogateescape")
    return hmac.compare_digest(given, f"Bearer {key}".encode())
