"""Whose request comes next: of those who wait, the client for which least has been done.

However many requests one sends, and however large, the others get as much done. When no more can
wait, the client that takes up most gives way: its newest request is put off. Knows what requests
cost and nothing else of them. Everything runs in one asyncio event loop.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass


class PutOff(Exception):
    """There is too much waiting; come again."""


@dataclass(slots=True, eq=False)
class _Request:
    client: str
    share: tuple[float, ...]
    """Of each limit."""
    turn: asyncio.Future[None]


class Turns:
    """Lets `width` requests in at a time, of clients in turn."""

    def __init__(self, width: int, limits: tuple[int, ...]) -> None:
        """`limits` bounds the sums of the costs of those that are in or wait: number, then work.

        A single request beyond them is let in if it is the only one.
        """
        self._free, self._limits = width, limits
        self._held: set[_Request] = set()
        self._waiting: dict[str, list[_Request]] = {}
        self._done: dict[str, float] = {}
        """Of each client that is here, its shares so far, from where it came in."""
        self._level = 0.0
        """Where a client comes in: as one that has had as much as whoever came last in turn."""

    @contextlib.asynccontextmanager
    async def turn(self, client: str, cost: tuple[int, ...]) -> AsyncIterator[None]:
        """Wait for a turn, and hold it. Raises PutOff."""
        share = tuple(c / limit for c, limit in zip(cost, self._limits, strict=True))
        request = _Request(client, share, asyncio.get_running_loop().create_future())
        self._make_room(request)
        self._held.add(request)
        self._done.setdefault(client, self._level)
        try:
            await self._wait(request)
            try:
                yield
            finally:
                self._pass_on()
        finally:
            self._held.discard(request)
            if all(other.client != client for other in self._held):
                self._done.pop(client, None)

    async def _wait(self, request: _Request) -> None:
        if self._free:
            self._free -= 1
            self._begin(request)
            return
        self._waiting.setdefault(request.client, []).append(request)
        try:
            await request.turn
        except asyncio.CancelledError:
            self._drop(request)
            if not request.turn.cancelled() and request.turn.exception() is None:
                self._pass_on()  # the turn had just come
            raise

    def _make_room(self, request: _Request) -> None:
        """Put others off for it, or raise PutOff."""
        while self._held and any(
            taken > 1 for taken in _sums(one.share for one in (*self._held, request))
        ):
            others = [client for client in self._waiting if client != request.client]
            heaviest = max(others, key=self._weight, default="")
            if not others or self._weight(heaviest) <= self._weight(request.client, request):
                raise PutOff
            newest = self._waiting[heaviest][-1]
            self._drop(newest)
            self._held.discard(newest)
            if not newest.turn.done():
                newest.turn.set_exception(PutOff())

    def _weight(self, client: str, *more: _Request) -> float:
        """What a client takes up, of the limit that it takes up most of."""
        own = [one.share for one in (*self._held, *more) if one.client == client]
        return max(_sums(own), default=0.0)

    def _drop(self, request: _Request) -> None:
        queue = self._waiting.get(request.client, [])
        if request in queue:
            queue.remove(request)
            if not queue:
                del self._waiting[request.client]

    def _pass_on(self) -> None:
        """Give a turn to the client for which least has been done."""
        while self._waiting:
            client = min(self._waiting, key=lambda name: self._done[name])
            request = self._waiting[client][0]
            self._drop(request)
            if not request.turn.done():
                self._begin(request)
                request.turn.set_result(None)
                return
        self._free += 1

    def _begin(self, request: _Request) -> None:
        self._level = max(self._level, self._done[request.client])
        self._done[request.client] += max(request.share[1:])  # many small ones are no more work


def _sums(shares: Iterable[tuple[float, ...]]) -> list[float]:
    return [sum(column) for column in zip(*shares, strict=True)]
