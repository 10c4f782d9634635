"""Requests to servers of one teacher: which endpoint, how often, and when to give up.

An endpoint that does not answer is put aside for a while, then tried again; before it gets work it
must show that it still offers the same teacher, which `meet` of a subclass looks at. Knows no
sequences. Everything runs in one asyncio event loop.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.remote.keys import key_from
from decant.teacher_dump.engines.remote.texts import parsed, shown
from decant.teacher_dump.engines.seam import EngineError, Unavailable

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0
"""A request without a byte of answer for so long is lost, and one whose answer takes longer."""
MAX_ANSWER_BYTES = 1 << 20
"""Of an answer, unless whoever asks expects more."""
MAX_ERROR_BYTES = 64 << 10
"""Of what is read of an error's text."""
LONGEST_WAIT = 300.0
"""Seconds that an overloaded endpoint may ask to be left alone."""
ATTEMPTS = 4
"""How often a request that was taken up may fail, on whatever endpoint."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two attempts on an endpoint; doubled each time."""


class Away(Exception):
    """The endpoint takes no requests now; after `pause` seconds, if it said so, it may."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        """Remember the pause."""
        super().__init__(message)
        self.pause = pause


class Lost(Exception):
    """The request was taken up and not answered; the endpoint may still be there for others."""

    def __init__(self, message: str, *, is_there: bool = False) -> None:
        """Remember whether it is."""
        super().__init__(message)
        self.is_there = is_there


@dataclass(slots=True, eq=False)
class Endpoint:
    """One URL of the teacher, and how it has behaved."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    retry_at: float = 0.0
    is_known: bool = False
    """Whether it has shown its teacher since it was last away."""
    met_at: float = 0.0
    """When it last did."""
    error: str = ""


class Client:
    """The servers of one teacher; made and used within a running event loop.

    A subclass says how an endpoint shows its teacher, and what a refusal means.
    """

    meets_again_after = float("inf")
    """Seconds after which an endpoint that answers must show its teacher again."""

    def __init__(
        self, config: TeacherConfig, *, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        """Nothing is asked yet. `kind` is what messages call an endpoint: "teacher service"."""
        self._kind = kind
        self._endpoints = [Endpoint(self.base_url(url)) for url in config.endpoints]
        self._per_endpoint, self._wait_seconds = config.requests, config.wait_seconds
        self._key_variable = config.api_key_env
        self._fatal: EngineError | None = None
        self._freed = asyncio.Condition()
        self._last_answer = time.monotonic()
        headers = {"Accept-Encoding": "identity", **(headers or {})}
        if key := key_from(config.api_key_env, "teacher.api_key_env"):
            headers["Authorization"] = f"Bearer {key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(
                total=None, connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS
            ),
        )

    async def close(self) -> None:
        """Drop all connections."""
        await self._session.close()

    def base_url(self, url: str) -> str:
        """What paths are put behind."""
        return url.rstrip("/")

    async def meet(self, endpoint: Endpoint) -> None:
        """Look at an endpoint's teacher. Raises Unavailable if it is another one."""
        raise NotImplementedError

    def refusal(self, url: str, status: int, text: str) -> EngineError:
        """The error that a status from 300 to 499 stands for, keys and overload apart."""
        raise NotImplementedError

    def overload(self, url: str, text: str) -> None:
        """Raise Unavailable if what an overloaded endpoint says does not pass by waiting."""

    async def greet(self) -> None:
        """Meet every endpoint that answers now. Raises Unavailable."""
        await asyncio.gather(*(self._greet(endpoint) for endpoint in self._endpoints))

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        most: int = MAX_ANSWER_BYTES,
    ) -> bytes:
        """The answer to a request, of at most so many bytes, from whichever endpoint gives one.

        Raises EngineError.
        """
        attempts = 0
        while True:
            async with self._free_endpoint() as endpoint:
                try:
                    known_for = time.monotonic() - endpoint.met_at
                    if not endpoint.is_known or known_for > self.meets_again_after:
                        await self._meet(endpoint)
                    answer = await self.attempt(endpoint, method, path, body, most)
                except Away as away:
                    self._put_aside(endpoint, str(away), away.pause)
                except Lost as lost:
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
                    endpoint.failures, endpoint.error = 0, ""
                    return answer
            await asyncio.sleep(attempts * FIRST_PAUSE)

    async def attempt(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        body: bytes | None = None,
        most: int = MAX_ANSWER_BYTES,
    ) -> bytes:
        """One attempt. Raises Away, Lost, or EngineError for what another attempt cannot mend."""
        try:
            async with self._session.request(
                method, endpoint.url + path, data=body, allow_redirects=False
            ) as response:
                status, headers = response.status, response.headers
                answer = await _received(response, most, endpoint.url)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Away(str(error) or type(error).__name__) from error
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise Lost(str(error) or type(error).__name__) from error
        if status == 200:
            self._last_answer = time.monotonic()
            return answer
        text = _error_text(answer)
        if status == 429:
            self.overload(endpoint.url, text)
            self._last_answer = time.monotonic()
            raise Away(text, _pause(headers.get("Retry-After", "")) or 1.0)
        if status in (502, 503, 504):
            raise Away(f"status {status}: {text}", _pause(headers.get("Retry-After", "")))
        if status == 408 or status >= 500:
            raise Lost(f"status {status}: {text}", is_there=True)
        if status == 409:  # restarted with another teacher since it was met, which it now shows
            await self._meet(endpoint)
            raise Lost(text)
        if status in (401, 403):
            raise Unavailable(self._key_problem(endpoint.url, status))
        raise self.refusal(endpoint.url, status, text)

    async def _greet(self, endpoint: Endpoint) -> None:
        """Meet an endpoint, if it is there."""
        try:
            await self._meet(endpoint)
        except (Away, Lost) as error:
            self._put_aside(endpoint, str(error), 0.0)

    async def _meet(self, endpoint: Endpoint) -> None:
        endpoint.is_known = False
        await self.meet(endpoint)
        if endpoint.error:
            log.info("%s answers", endpoint.url)
        endpoint.is_known, endpoint.met_at, endpoint.error = True, time.monotonic(), ""

    def _key_problem(self, url: str, status: int) -> str:
        if self._key_variable:
            return f"{url} does not accept the API key in ${self._key_variable} (status {status})"
        return (
            f"{url} wants an API key (status {status}): set teacher.api_key_env to the name of an "
            "environment variable that holds it"
        )

    def _put_aside(self, endpoint: Endpoint, error: str, pause: float) -> None:
        if pause:
            endpoint.error = error
            endpoint.retry_at = time.monotonic() + pause * random.uniform(1, 1.5)
            return
        if not endpoint.error:
            log.warning("%s does not answer, trying again: %s", endpoint.url, error)
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**endpoint.failures)
        endpoint.failures = min(endpoint.failures + 1, 30)
        endpoint.is_known, endpoint.error = False, error
        endpoint.retry_at = time.monotonic() + pause * random.uniform(0.5, 1)

    @contextlib.asynccontextmanager
    async def _free_endpoint(self) -> AsyncIterator[Endpoint]:
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
            f"no {self._kind} has answered for {seconds:.0f} s (teacher.wait_seconds: "
            f"{self._wait_seconds:g}): {errors}"
        )


def _pause(retry_after: str) -> float:
    """The seconds that a server asks to wait, not too many; 0 if it says none, or a date."""
    try:
        seconds = float(retry_after)
    except ValueError:
        return 0.0
    return min(seconds, LONGEST_WAIT) if seconds >= 0 else 0.0


async def _received(response: aiohttp.ClientResponse, most: int, url: str) -> bytes:
    """The body of an answer, or the beginning of an error's text.

    Raises Unavailable for an answer of more than `most` bytes, or one that is compressed.
    """
    is_answer = response.status == 200
    if is_answer and response.headers.get("Content-Encoding", "identity") != "identity":
        coding = shown(response.headers["Content-Encoding"])
        raise Unavailable(f"{url} compresses its answer ({coding}), which was not asked for")
    if is_answer and (response.content_length or 0) > most:
        raise Unavailable(f"{url} answers with {response.content_length} bytes, at most {most} fit")
    most = most if is_answer else MAX_ERROR_BYTES
    parts, size = [], 0
    async with asyncio.timeout(ANSWER_SECONDS):
        while part := await response.content.readany():
            parts.append(part)
            size += len(part)
            if size > most and is_answer:
                raise Unavailable(f"{url} answers with more than {most} bytes, which fit")
            if size > most:
                break
    return b"".join(parts)


def _error_text(body: bytes) -> str:
    """What an error's body says, in one line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError):
        said = parsed(body)
        for name in ("error", "detail", "message"):
            if isinstance(said, dict) and said.get(name):
                said = said[name]
                text = said if isinstance(said, str) else shown(said)
    return shown(" ".join(text[:4096].split()))
