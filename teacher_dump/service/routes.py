"""A teacher behind HTTP: what it answers, whatever server carries it.

Knows requests and answers, keys and limits; the server and the engine are given. `serve.py` puts
them together, `engines/http/engine.py` is the other side. Whatever a client sends, the log has one
line for what is refused.
"""

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from decant.schemas.truncation import check_temperatures
from decant.storage.files.scratch import scratch_folder
from decant.teacher_dump.config import ServiceLimits
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
from decant.teacher_dump.engines.remote.texts import shown
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.service.room import Full, Place, Room
from decant.teacher_dump.service.turns import PutOff, Turns

log = logging.getLogger(__name__)

HEALTH_PATH = "/health"
PATHS = {TEACHER_PATH: "GET", TOKENIZER_PATH: "GET", SCORE_PATH: "POST"}
MAX_BODY_BYTES = ServiceLimits().max_body_bytes
MAX_PENDING_TOKENS = ServiceLimits().max_tokens
RETRY_SECONDS = 1
BODIES, ANSWERS = 4, 2
"""How many of the largest bodies are received at a time, and of the largest answers held."""
PRESSED_SECONDS, PRESSED_BYTES = 1.0, 1 << 20
"""When memory is short a client has so long, and a second for so many bytes, before others come
first."""


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
    place: Place | None = None
    """What it takes of the memory for answers until it is sent; see `Service.sending`."""


class Service:
    """The routes of a teacher."""

    def __init__(
        self,
        card: TeacherCard,
        tokenizer_files: dict[str, bytes],
        backend: Backend,
        limits: ServiceLimits | None = None,
        *,
        at_once: int = 0,
    ) -> None:
        """Offer the teacher of `card`, which `backend` runs.

        The backend gets `at_once` requests at a time, with 0 as many as there are.
        """
        self._card, self._backend = card, backend
        self._digest = card.digest()
        self._tokenizer = frame_files(tokenizer_files)
        self.limits = limits = limits or ServiceLimits()
        self._most_tokens = max(limits.max_tokens, card.max_length)
        self._turns = Turns(
            at_once or limits.max_requests,
            (limits.max_requests, self._most_tokens, ANSWERS * limits.max_answer_bytes),
        )
        self._bodies = Room(BODIES * limits.max_body_bytes)
        self._answers = Room(ANSWERS * limits.max_answer_bytes)

    async def answer(
        self,
        method: str,
        path: str,
        length: str | None,
        read: Callable[[], Awaitable[bytes]],
        client: str = "",
    ) -> Answer:
        """Answer a request whose body is `length` bytes, as its header says, and can be `read`.

        Clients take turns. `read` may raise Refusal.
        """
        try:
            if method != PATHS.get(path):
                raise Refusal(404 if path not in PATHS else 405, f"{method} {path} is not served")
            if path == TEACHER_PATH:
                return Answer(200, self._card.to_bytes(), "application/json")
            if path == TOKENIZER_PATH:
                return Answer(200, self._tokenizer)
            return await self._score(await self._receive(length, read), client)
        except Refusal as refusal:
            headers = {"Retry-After": str(RETRY_SECONDS)} if refusal.status == 429 else {}
            return refused(refusal.status, str(refusal), headers)
        except Exception as error:
            log.debug("a score request failed", exc_info=True)
            return refused(500, f"{type(error).__name__}: {shown(error)}")

    @contextlib.contextmanager
    def sending(self, answer: Answer, drop: Callable[[], None]) -> Iterator[None]:
        """While an answer is sent; `drop` is called if memory is short and the client slow."""
        place = answer.place
        if place is None:
            yield
            return
        place.leave = drop
        try:
            yield
        finally:
            self._answers.free(place)

    async def _receive(self, length: str | None, read: Callable[[], Awaitable[bytes]]) -> bytes:
        if length is None or not (length.isascii() and length.isdecimal()):
            raise Refusal(411, "a score request must say its length")
        if len(length) > 18 or int(length) > self.limits.max_body_bytes:
            raise Refusal(
                413,
                f"a score request has {shown(length)} bytes, at most {self.limits.max_body_bytes}",
            )
        size, is_pressed = int(length), False

        def give_way() -> None:
            nonlocal is_pressed
            is_pressed = True
            scope.reschedule(0)

        try:
            async with asyncio.timeout(self.limits.seconds(size)) as scope:
                with self._bodies.holding(size, give_way, PRESSED_SECONDS + size / PRESSED_BYTES):
                    return await read()
        except TimeoutError as error:
            if is_pressed:
                raise Refusal(429, "too many requests are received, this one slowly") from error
            raise Refusal(408, f"a score request of {size} bytes does not come in time") from error
        except Full as error:
            raise Refusal(429, "too many requests are being received") from error

    async def _score(self, body: bytes, client: str) -> Answer:
        try:
            request = ScoreRequest.from_bytes(body)
            self._check(request)
        except MessageError as error:
            raise Refusal(400, str(error)) from error
        size = _answer_bytes(request)
        try:
            async with self._turns.turn(client, (1, len(request.input_ids), size)):
                place = self._answers.enter(size, _nothing, float("inf"))
                try:
                    rows = await self._backend.score(
                        request.reduction, request.sequences(), request.first_sequence
                    )
                    whole = [part for part in rows if part is not None]
                    answer = ScoreAnswer(rows=whole, not_finite=len(whole) < len(request.lengths))
                    data = answer.to_bytes()
                except BaseException:
                    self._answers.free(place)
                    raise
        except (PutOff, Full) as error:
            raise Refusal(429, "too many tokens are waiting already") from error
        place.yields_after(PRESSED_SECONDS + size / PRESSED_BYTES)
        return Answer(200, data, place=place)

    def _check(self, request: ScoreRequest) -> None:
        card = self._card
        if request.digest != self._digest:
            raise Refusal(409, f"another teacher is served here: {json.dumps(card.identity())}")
        rows = card.teacher.vocab_size
        if not 1 <= request.reduction.vocab_size <= rows:
            found = shown(request.reduction.vocab_size)
            raise Refusal(400, f"vocabulary of {found} ids, at most {rows}")
        if not 0 <= request.input_ids.min() <= request.input_ids.max() < rows:
            raise Refusal(400, f"token ids must lie in [0, {rows})")
        if request.lengths.max() > card.max_length:
            raise Refusal(
                400, f"a sequence has {request.lengths.max()} tokens, at most {card.max_length}"
            )
        reduction = request.reduction
        if reduction.truncation.slots > reduction.vocab_size:
            slots = shown(reduction.truncation.slots)
            raise Refusal(400, f"{slots} entries per target of {reduction.vocab_size} ids")
        try:
            check_temperatures(reduction.temperatures)
            self._backend.check(reduction)
        except ValueError as error:
            raise Refusal(400, shown(error)) from error
        if len(request.input_ids) > self._most_tokens:
            raise Refusal(
                413,
                f"a score request has {len(request.input_ids)} tokens, at most "
                f"{self._most_tokens}: lower teacher.max_batch_tokens",
            )
        if (size := _answer_bytes(request)) > self.limits.max_answer_bytes:
            raise Refusal(
                413,
                f"the answer to a score request has {size} bytes, at most "
                f"{self.limits.max_answer_bytes}: lower teacher.max_batch_tokens or truncation.k",
            )


def _answer_bytes(request: ScoreRequest) -> int:
    return 4 * request.reduction.row_words * int(np.count_nonzero(request.is_target))


def _nothing() -> None:
    """What has been scored does not give way before it is sent."""


def note(client: str, method: str, path: str, answer: Answer) -> None:
    """A line in the log for what is refused."""
    if answer.status >= 400:
        said = json.loads(answer.body).get("error", "") if answer.body else ""
        log.warning(
            "%d to %s: %s %s: %s",
            *(answer.status, shown(client), shown(method), shown(path), shown(said)),
        )


def tokenizer_files(tokenizer: Any | None) -> dict[str, bytes]:
    """The files that make this tokenizer elsewhere."""
    if tokenizer is None:
        return {}
    with scratch_folder() as folder:
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
