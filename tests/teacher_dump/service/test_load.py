"""Many clients at once, one of them hostile: the others are served, in turn, in bounded memory.

Clients are ours (`HttpEngine`'s client) and raw sockets; the server is the one `decant serve` runs.
"""

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from decant.schemas import Truncation
from decant.teacher_dump.config import ServiceLimits
from decant.teacher_dump.engines.http.client import TeacherClient
from decant.teacher_dump.engines.http.messages import SCORE_PATH, ScoreAnswer, ScoreRequest
from decant.teacher_dump.engines.packed_rows import Reduction
from decant.teacher_dump.engines.seam import EngineError
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.service.room import Full, Room
from decant.teacher_dump.service.turns import PutOff, Turns
from tests.support.services import Guarded, guarded, http_config

REDUCTION = Reduction(vocab_size=300, truncation=Truncation(k=64), temperatures=(1.0,))
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a second address of this machine")
REQUESTS = 3
"""Of each honest client."""
LIMITS = {"max_connections": 160, "max_requests": 64, "max_body_bytes": 1 << 20}


def body_of(server: Guarded, sequences: int) -> tuple[bytes, list[int]]:
    """A request of so many sequences of 128 tokens, and their targets."""
    sequence = TokenSequence("a", np.ones(128, np.int32), np.arange(128) > 0)
    request = ScoreRequest.of(server.card.digest(), REDUCTION, [sequence] * sequences, 0)
    return request.to_bytes(), [127] * sequences


async def honest(server: Guarded) -> float:
    """A job of a few requests; how long the slowest of them took."""
    client = TeacherClient(http_config(server.url, requests=1))
    body, num_targets = body_of(server, 8)
    slowest = 0.0
    try:
        for _ in range(REQUESTS):
            began = time.monotonic()
            answer = await client.ask("POST", SCORE_PATH, body, most=1 << 24)
            slowest = max(slowest, time.monotonic() - began)
            assert len(ScoreAnswer.from_bytes(answer, num_targets, REDUCTION).rows) == 8
    finally:
        await client.close()
    return slowest


async def hostile(server: Guarded, address: str) -> None:
    """Whatever hurts, from one address, until cancelled."""
    body, _ = body_of(server, 1000)
    loop = asyncio.get_running_loop()
    head = f"POST {SCORE_PATH} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    said = [
        head + body,  # much work, whose answer it does not take
        head + body[:1000],  # a body that does not come
        head[:40],  # a head that does not come
        b"\0" * 1000,
        head + b"\xff" * len(body),
        head.replace(b"Content-Length: ", b"Content-Length: 9"),
    ]
    with contextlib.ExitStack() as stack:
        count = 0
        while True:
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.bind((address, 0))
            with contextlib.suppress(OSError):
                await loop.sock_connect(client, ("127.0.0.1", server.port))
                client.send(said[count % len(said)])
            count += 1
            if count % 300 == 0:
                stack.close()
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    ("num_clients", "address"),
    [
        (20, "127.0.0.1"),
        pytest.param(100, "127.0.0.1", marks=pytest.mark.slow),
        pytest.param(100, "127.0.0.2", marks=[pytest.mark.slow, ON_LINUX]),
    ],
)
def test_nobody_starves(num_clients: int, address: str) -> None:
    """Every request of every client is answered while another attacks, also from their address."""

    async def play(server: Guarded) -> list[float]:
        attack = asyncio.create_task(hostile(server, address))
        await asyncio.sleep(0.3)
        try:
            async with asyncio.timeout(300):
                return await asyncio.gather(*(honest(server) for _ in range(num_clients)))
        finally:
            attack.cancel()
            await asyncio.wait({attack})

    with guarded(delay=0.002, **LIMITS) as server:
        before = psutil.Process().memory_info().rss
        slowest = asyncio.run(play(server))
        grown = psutil.Process().memory_info().rss - before
    assert len(slowest) == num_clients
    # Bodies in receipt, answers held, heads and clients' own copies: less than the limits allow.
    assert grown < 4 * LIMITS["max_body_bytes"] + 2 * ServiceLimits().max_answer_bytes


# Who gives way.


@pytest.fixture
def turns() -> Iterator[Turns]:
    """One at a time, four in all, of ten tokens together."""
    yield Turns(1, (4, 10))


def test_clients_take_turns(turns: Turns) -> None:
    """One that has sent three requests waits after the first for one that comes later."""
    order: list[str] = []

    async def one(client: str) -> None:
        async with turns.turn(client, (1, 1)):
            order.append(client)
            await asyncio.sleep(0.001)

    async def play() -> None:
        tasks = []
        for client in ("a", "a", "a", "b"):
            tasks.append(asyncio.create_task(one(client)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    asyncio.run(play())
    assert order in (["a", "a", "b", "a"], ["a", "b", "a", "a"])


def test_who_takes_most_is_put_off(turns: Turns) -> None:
    """Its newest request gives way to another client's; its own next one is refused."""

    async def hold(client: str, tokens: int, until: asyncio.Event) -> str:
        async with turns.turn(client, (1, tokens)):
            await until.wait()
            return client

    async def play() -> list[str | BaseException]:
        until = asyncio.Event()
        tasks = []
        for client, tokens in (("a", 3), ("a", 3), ("a", 4), ("a", 1), ("b", 2)):
            tasks.append(asyncio.create_task(hold(client, tokens, until)))
            await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        until.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(play())
    assert found[0] == "a" and found[4] == "b"
    assert isinstance(found[1], asyncio.CancelledError)
    assert isinstance(found[2], PutOff) and isinstance(found[3], PutOff)


def test_a_room_holds_what_fits() -> None:
    """Beyond, the oldest that may gives way; what is larger than the room has it alone."""
    gone: list[str] = []
    room = Room(10)
    old = room.enter(6, lambda: gone.append("old"), 0)
    room.enter(4, lambda: gone.append("kept"), 60)
    place = room.enter(5, lambda: gone.append("new"), 60)
    assert gone == ["old"]
    room.free(old)
    with pytest.raises(Full):
        room.enter(2, lambda: None, 0)
    room.free(place)
    room.free(place)
    room.enter(6, lambda: None, 0)
    with pytest.raises(Full):
        room.enter(11, lambda: None, 0)
    Room(10).enter(11, lambda: None, 0)


# The other side: servers that mean no good.


class Answers:
    """A server that answers every request with the same bytes, again and again if told."""

    def __init__(self, data: bytes, repeated: bytes = b"") -> None:
        """Answer `data`, then `repeated` as long as the client takes it."""
        self._data, self._repeated = data, repeated
        self.sent = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self._data)
            await writer.drain()
            while self._repeated:
                writer.write(self._repeated)
                self.sent += len(self._repeated)
                await writer.drain()
        writer.close()


def ok(body: bytes, *lines: str) -> bytes:
    """An answer of status 200."""
    fields = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join([*fields, "", ""]).encode() + body


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("data", "repeated", "message"),
    [
        (ok(DEEP), b"", "nested too deeply"),
        (ok(b'{"protocol": 1' + b"0" * 5000 + b"}"), b"", "does not answer like a teacher service"),
        (ok(b'{"protocol": NaN}'), b"", "NaN is no number of JSON"),
        (ok(b'{"protocol": "\\u001b[31m\\n"}'), b"", r"protocol \\x1b\[31m\\n of the teacher"),
        (ok(b"x", "Content-Encoding: gzip"), b"", r"compresses its answer \(gzip\)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9000000000000\r\n\r\n", b"", "at most 1048576 fit"),
        (b"HTTP/1.1 200 OK\r\n\r\n", bytes(1 << 16), "more than 1048576 bytes"),
        (
            b"HTTP/1.1 404 No\r\nContent-Length: 100000\r\n\r\n" + DEEP,
            b"",
            r"not a teacher service \(status 404: \[\[\[",
        ),
        (b"HTTP/1.1 404 No\r\n\r\n", b"\x1b[2J" * 999, r"status 404: \\x1b\[2J"),
    ],
    ids=[
        "deep",
        "digits",
        "NaN",
        "escapes",
        "gzip",
        "a huge length",
        "endless",
        "a deep error",
        "an endless error",
    ],
)
def test_a_hostile_server_is_refused(data: bytes, repeated: bytes, message: str) -> None:
    """In one line, after no more bytes than an answer may have."""

    async def play() -> int:
        answers = Answers(data, repeated)
        server = await asyncio.start_server(answers, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = TeacherClient(http_config(f"http://127.0.0.1:{port}"))
        try:
            with pytest.raises(EngineError, match=message) as caught:
                await client.connect()
            assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
        finally:
            await client.close()
            server.close()
        return answers.sent

    assert asyncio.run(play()) < 16 << 20
