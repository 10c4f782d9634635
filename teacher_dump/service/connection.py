"""A client's connection to a service of ours: how long its requests may take, and who gives way.

aiohttp reads the HTTP; this adds deadlines for heads and for idle clients, a bound on connections,
and one line in the log for what is no HTTP. Knows no routes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from decant.teacher_dump.config import ServiceLimits
from decant.teacher_dump.service.room import Full, Place, Room
from decant.teacher_dump.service.routes import RETRY_SECONDS, Answer, note, refused

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

IDLE_SECONDS = 75.0
"""How long a connection may stay without a request; clients of ours drop theirs after 15 s."""
KEPT_SECONDS, NEW_SECONDS = 20.0, 1.0
"""When connections are short an idle one is kept so long after a request that was answered, and
one that has had none so long in all."""
LINGERING_SECONDS = 2.0
"""How long the rest of a body that is refused is read and thrown away, so that the client gets to
read why."""
MAX_LINE_BYTES, MAX_HEADERS = 8190, 64


class Door(web.Server):
    """Makes the connections of a service."""

    def __init__(self, handler: Handler, limits: ServiceLimits) -> None:
        """Every whole head goes to `handler`, which is cancelled when its client leaves."""
        super().__init__(
            handler,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=LINGERING_SECONDS,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            auto_decompress=False,
        )
        self.limits = limits
        self.room = Room(limits.max_connections)

    def __call__(self) -> web.RequestHandler:
        """One more connection."""
        return Connection(self)


class Connection(web.RequestHandler):
    """One client."""

    def __init__(self, door: Door) -> None:
        """Not connected yet."""
        super().__init__(door, loop=door._loop, **door._kwargs)
        self._door = door
        self._socket: asyncio.Transport | None = None
        self._place: Place | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_answering = self._has_begun = False

    @property
    def client(self) -> str:
        """Its address."""
        name = self.peername
        return str(name[0]) if isinstance(name, tuple) else ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take one of the places for connections, or leave."""
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self._socket = transport
        try:
            self._place = self._door.room.enter(1, self._give_way, NEW_SECONDS)
        except Full:
            self._refuse(429, "too many connections are open")
            return
        self._wait(self._door.limits.client_seconds)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Give the place up."""
        self._stop_waiting()
        if self._has_begun:
            note(self.client, "?", "?", refused(400, "the client has left"))
        if self._place is not None:
            self._door.room.free(self._place)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A head must be whole soon after its first byte."""
        if not self._is_answering and not self._has_begun:
            self._has_begun = True
            self._wait(self._door.limits.client_seconds)
        try:
            super().data_received(data)
        except Exception as error:  # some versions of aiohttp let pass what is no URL or number
            said = (str(error) or type(error).__name__).partition("\n")[0]
            self._refuse(400, f"no request that can be read: {said}")

    def head_came(self) -> None:
        """From here on the time is the handler's."""
        self._is_answering, self._has_begun = True, False
        self._stop_waiting()
        if self._place is not None:
            self._place.yields_at = float("inf")

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Wait for the next request."""
        ended = await super().finish_response(request, resp, start_time)
        self._is_answering = False
        self._wait(IDLE_SECONDS)
        if self._place is not None:
            self._place.yields_after(KEPT_SECONDS if resp.status == 200 else NEW_SECONDS)
        return ended

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """One line for what is no HTTP."""
        self.head_came()
        said = (message or str(exc) or type(exc).__name__).partition("\n")[0].rstrip(": ")
        answer = refused(status, f"no request that can be read: {said}")
        note(
            self.client, *(("?", "?") if status == 400 else (request.method, request.path)), answer
        )
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already")
        response = response_of(answer)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """One line for what happens between requests."""
        error = kw.get("exc_info")
        note(self.client, "?", "?", refused(400, f"{type(error).__name__}: {error}"))

    def drop(self) -> None:
        """End it at once, whatever is still to be sent."""
        if self._socket is not None:
            self._socket.abort()

    def _give_way(self) -> None:
        self._refuse(429, "too many connections are open, and this one is idle or slow")

    def _late(self) -> None:
        if self._has_begun:
            seconds = self._door.limits.client_seconds
            self._refuse(408, f"no whole request within {seconds:g} s")
        else:
            self.drop()

    def _refuse(self, status: int, message: str) -> None:
        """Say why, as far as that can be said at once, and leave."""
        answer = refused(status, message)
        note(self.client, "?", "?", answer)
        if self._socket is not None and not self._socket.is_closing():
            head = (
                f"HTTP/1.1 {status} Refused\r\nContent-Type: {answer.media_type}\r\n"
                f"Retry-After: {RETRY_SECONDS}\r\n"
                f"Content-Length: {len(answer.body)}\r\nConnection: close\r\n\r\n"
            )
            self._socket.write(head.encode() + answer.body)
        self._has_begun = False
        self._wait(NEW_SECONDS)  # for what does not take even this
        self.force_close()

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._timer = self._loop.call_later(seconds, self._late)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def response_of(answer: Answer) -> web.Response:
    """An answer as aiohttp sends it; it does not say what the server is made of."""
    return web.Response(
        status=answer.status,
        body=answer.body,
        content_type=answer.media_type,
        headers={"Server": "decant", **answer.headers},
    )
