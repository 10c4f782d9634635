"""Requests to teacher services: which endpoint, how often, and when to give up.

An endpoint that does not answer is put aside for a while, then tried again; before it gets work it
must show that it still offers the same teacher. Knows no sequences. Everything runs in one asyncio
event loop.
"""

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.http.messages import (
    TEACHER_PATH,
    MessageError,
    TeacherCard,
    differing,
    key_from,
)
from decant.teacher_dump.engines.seam import EngineError, Unavailable

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0
"""A request without a byte of answer for so long is lost."""
ATTEMPTS = 4
"""How often a request that was taken up may fail, on whatever endpoint."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two attempts on an endpoint; doubled each time."""


class _Away(Exception):
    """The endpoint takes no requests now; after `pause` seconds, if it said so, it may."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class _Lost(Exception):
    """The request was taken up and not answered; the endpoint may still be there for others."""

    def __init__(self, message: str, *, is_there: bool = False) -> None:
        super().__init__(message)
        self.is_there = is_there


@dataclass(slots=True, eq=False)
class _Endpoint:
    url: str
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    retry_at: float = 0.0
    is_known: bool = False
    """Whether it has shown its card since it was last away."""
    error: str = ""


class TeacherClient:
    """The services of one teacher; made and used within a running event loop."""

    def __init__(self, config: TeacherConfig, fingerprint: str = "", max_length: int = 0) -> None:
        """Nothing is asked yet; the teacher must have this fingerprint, if one is given.

        Every service must score sequences of `max_length` tokens.
        """
        self._endpoints = [_Endpoint(url.rstrip("/")) for url in config.endpoints]
        self._per_endpoint, self._wait_seconds = config.requests, config.wait_seconds
        self._dtype, self._fingerprint = config.dtype, fingerprint
        self._max_length = max_length
        self._key_variable = config.api_key_env
        self._card: TeacherCard | None = None
        self._fatal: EngineError | None = None
        self._freed = asyncio.Condition()
        self._last_answer = time.monotonic()
        headers = {}
        if key := _key(config):
            headers["Authorization"] = f"Bearer {key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=None, connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS
            ),
        )

    async def close(self) -> None:
        """Drop all connections."""
        await self._session.close()

    async def connect(self) -> TeacherCard:
        """The card of the teacher, which all services that answer now must share.

        Waits for the first one. Raises EngineError.
        """
        await asyncio.gather(*(self._greet(endpoint) for endpoint in self._endpoints))
        if self._card is None:
            await self.ask("GET", TEACHER_PATH)
        assert self._card is not None
        return self._card

    async def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The answer to a request, from whichever endpoint gives one. Raises EngineError."""
        attempts = 0
        while True:
            async with self._free_endpoint() as endpoint:
                try:
                    if not endpoint.is_known:
                        await self._meet(endpoint)
                    answer = await self._request(endpoint, method, path, body)
                except _Away as away:
                    self._put_aside(endpoint, str(away), away.pause)
                except _Lost as lost:
                    attempts += 1
                    if not lost.is_there:
                        self._put_aside(endpoint, str(lost), 0.0)
                    if attempts == ATTEMPTS:
                        raise EngineError(
                            f"{endpoint.url}: a request failed {ATTEMPTS} times, last: {lost}"
                        ) from lost
                except EngineError as error:
                    self._fatal = error if isinstance(error, Unavailable) else None
                    raise
                else:
                    endpoint.failures = 0
                    return answer
            await asyncio.sleep(attempts * FIRST_PAUSE)

    async def _greet(self, endpoint: _Endpoint) -> None:
        """Meet an endpoint, if it is there."""
        try:
            await self._meet(endpoint)
        except (_Away, _Lost) as error:
            self._put_aside(endpoint, str(error), 0.0)

    async def _meet(self, endpoint: _Endpoint) -> None:
        """Check the endpoint's card. Raises EngineError if it offers another teacher."""
        data = await self._request(endpoint, "GET", TEACHER_PATH, None)
        try:
            card = TeacherCard.from_bytes(data, endpoint.url)
        except MessageError as error:
            raise Unavailable(str(error)) from error
        found, dtype = card.teacher.fingerprint, card.teacher.dtype
        if self._fingerprint and found != self._fingerprint:
            raise Unavailable(
                f"{endpoint.url} offers teacher {card.teacher.name} with fingerprint {found}, "
                f"expected {self._fingerprint}"
            )
        if self._dtype not in ("auto", dtype.partition("+")[0]):
            raise Unavailable(
                f"{endpoint.url} computes with dtype {dtype}, teacher.dtype is {self._dtype}: "
                "leave it at auto, or serve the teacher with it"
            )
        if card.max_length < self._max_length:
            raise Unavailable(
                f"{endpoint.url} scores at most {card.max_length} tokens, sequences have up to "
                f"{self._max_length}: lower sequences.max_length, or serve with a larger max_length"
            )
        if self._card is None:
            self._card = card
            self._first = endpoint.url
        elif unlike := differing(self._card, card):
            raise Unavailable(
                f"{self._first} and {endpoint.url} offer different teachers: {'; '.join(unlike)}"
            )
        if endpoint.error:
            log.info("%s answers", endpoint.url)
        endpoint.is_known, endpoint.error = True, ""

    async def _request(
        self, endpoint: _Endpoint, method: str, path: str, body: bytes | None
    ) -> bytes:
        """One attempt. Raises _Away, _Lost, or EngineError for what another attempt cannot mend."""
        try:
            async with self._session.request(
                method, endpoint.url + path, data=body, allow_redirects=False
            ) as response:
                answer = await response.read()
                status, headers = response.status, response.headers
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _Away(str(error) or type(error).__name__) from error
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise _Lost(str(error) or type(error).__name__) from error
        if status == 200:
            self._last_answer = time.monotonic()
            return answer
        text = _error_text(answer)
        if status == 429:
            self._last_answer = time.monotonic()
            pause = headers.get("Retry-After", "")
            raise _Away(text, float(pause) if pause.isdecimal() else 1.0)
        if status in (502, 503, 504):
            raise _Away(f"status {status}: {text}")
        if status >= 500:
            raise _Lost(f"status {status}: {text}", is_there=True)
        if status == 409:  # restarted with another teacher since it was met: its card says more
            endpoint.is_known = False
            await self._meet(endpoint)
            raise _Lost(text)
        if status in (401, 403):
            raise Unavailable(self._key_problem(endpoint.url, status))
        if status in (404, 405) or 300 <= status < 400:
            raise Unavailable(f"{endpoint.url} is not a teacher service (status {status}: {text})")
        raise EngineError(f"{endpoint.url} refuses a request (status {status}): {text}")

    def _key_problem(self, url: str, status: int) -> str:
        if self._key_variable:
            return f"{url} does not accept the API key in ${self._key_variable} (status {status})"
        return (
            f"{url} wants an API key (status {status}): set teacher.api_key_env to the name of an "
            "environment variable that holds it"
        )

    def _put_aside(self, endpoint: _Endpoint, error: str, pause: float) -> None:
        if pause:
            endpoint.retry_at = time.monotonic() + pause * random.uniform(1, 1.5)
            return
        if not endpoint.error:
            log.warning("%s does not answer, trying again: %s", endpoint.url, error)
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**endpoint.failures)
        endpoint.failures = min(endpoint.failures + 1, 30)
        endpoint.is_known, endpoint.error = False, error
        endpoint.retry_at = time.monotonic() + pause * random.uniform(0.5, 1)

    @contextlib.asynccontextmanager
    async def _free_endpoint(self) -> AsyncIterator[_Endpoint]:
        """The least busy endpoint that is not put aside; waits for one. Raises Unavailable."""
        async with self._freed:
            while True:
                if self._fatal is not None:
                    raise self._fatal
                now = time.monotonic()
                ready = [e for e in self._endpoints if e.retry_at <= now]
                free = [e for e in ready if e.in_flight < self._per_endpoint]
                if free:
                    break
                if not ready and now - self._last_answer > self._wait_seconds:
                    self._give_up()
                soonest = min(e.retry_at for e in self._endpoints) - now
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        self._freed.wait(), None if ready else max(0.01, soonest)
                    )
            endpoint = min(free, key=lambda e: e.in_flight)
            endpoint.in_flight += 1
        try:
            yield endpoint
        finally:
            endpoint.in_flight -= 1
            async with self._freed:
                self._freed.notify_all()

    def _give_up(self) -> None:
        """Raise Unavailable: nobody has answered for too long."""
        seconds = time.monotonic() - self._last_answer
        errors = "; ".join(f"{e.url}: {e.error}" for e in self._endpoints if e.error)
        raise Unavailable(
            f"no teacher service has answered for {seconds:.0f} s (teacher.wait_seconds: "
            f"{self._wait_seconds:g}): {errors}"
        )


def _key(config: TeacherConfig) -> str:
    try:
        return key_from(config.api_key_env, "teacher.api_key_env")
    except MessageError as error:
        raise EngineError(str(error)) from error


def _error_text(body: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:500]
