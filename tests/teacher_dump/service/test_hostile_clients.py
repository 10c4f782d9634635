"""Clients that mean no good, or are unlucky: a line in the log each, and the next one is served.

Bytes go over real sockets to the server that `decant serve` runs; behind it is no teacher.
"""

import contextlib
import dataclasses
import json
import logging
import re
import resource
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from decant.schemas import Truncation, to_json
from decant.teacher_dump.engines.http.messages import (
    SCORE_PATH,
    TEACHER_PATH,
    ScoreRequest,
    frame,
)
from decant.teacher_dump.engines.packed_rows import Reduction
from decant.teacher_dump.inputs.records import TokenSequence
from tests.support.services import Guarded, guarded, wait_for

REDUCTION = Reduction(vocab_size=300, truncation=Truncation(k=4), temperatures=(1.0,))
KEY = "a-key-that-must-not-be-seen"


@pytest.fixture(scope="module")
def server() -> Iterator[Guarded]:
    """A service with small limits and short patience."""
    with guarded(max_body_bytes=1 << 16, max_connections=64, client_seconds=0.5) as running:
        yield running


@pytest.fixture(autouse=True)
def one_line_each(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test here does, nothing in the log has a traceback, a second line or the key."""
    caplog.set_level(logging.INFO)
    yield
    for record in caplog.get_records("call"):
        assert record.exc_info is None, record.getMessage()
        assert record.getMessage().isprintable() and len(record.getMessage()) < 2000
        assert KEY not in record.getMessage()


def request_of(server: Guarded, length: int = 9, reduction: Reduction = REDUCTION) -> ScoreRequest:
    """A good request for one sequence."""
    ids = np.arange(1, length + 1, dtype=np.int32)
    sequence = TokenSequence("a", ids, np.arange(length) > 0)
    return ScoreRequest.of(server.card.digest(), reduction, [sequence], 0)


def head(size: int | str, *lines: str, method: str = "POST", path: str = SCORE_PATH) -> bytes:
    """The head of a request whose body has so many bytes."""
    given = [f"{method} {path} HTTP/1.1", "Host: h", f"Content-Length: {size}", *lines]
    return "\r\n".join([*given, "", ""]).encode("latin-1")


def said(server: Guarded, data: bytes) -> bytes:
    """The answer to these bytes; what there is of one when the server closes or 5 s have passed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        with contextlib.suppress(OSError):  # it may close before it has them all
            client.sendall(data)
        answer = b""
        with contextlib.suppress(OSError):
            while not is_whole(answer) and (part := client.recv(1 << 16)):
                answer += part
        return answer


def is_whole(answer: bytes) -> bool:
    """Whether it has all bytes of its body."""
    fields, end, body = answer.partition(b"\r\n\r\n")
    size = re.search(rb"content-length: (\d+)", fields.lower())
    return bool(end) and len(body) == int(size[1] if size else 0)


def status_of(answer: bytes) -> int:
    """The status of an answer."""
    assert answer.startswith(b"HTTP/1."), answer
    return int(answer.split(b" ", 2)[1])


def is_served(server: Guarded, *lines: str) -> bool:
    """Whether a good request is answered."""
    body = request_of(server).to_bytes()
    return status_of(said(server, head(len(body), *lines) + body)) == 200


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has."""
    return [record.getMessage() for record in caplog.get_records("call")]


MALFORMED = {
    "noise": bytes(range(256)) * 4,
    "nothing of HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "unknown version": b"GET / HTTP/9.9\r\n\r\n",
    "a bad length": head("12abc"),
    "a negative length": head(-5),
    "two lengths": head(5, "Content-Length: 6"),
    "length and chunks": head(5, "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "bad chunks": b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    "a chunk beyond 64 bits": b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"F" * 200
    + b"\r\nx",
    "two codings": head(5).replace(b"Content-Length: 5", b"Transfer-Encoding: chunked, gzip"),
    "two hosts": head(0, "Host: i"),
    "an unknown coding": head(0, "Transfer-Encoding: xchunked"),
    "a space before a colon": head(0, "Transfer-Encoding : chunked"),
    "a length with a sign": head("+5"),
    "a length twice in a line": head("5, 5"),
    "a return in a field": head(0, "X: a\rb"),
    "lines without returns": head(0).replace(b"\r\n", b"\n"),
    "more than it waits to send": head(1 << 40, "Expect: 100-continue"),
    "another version's greeting": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a folded field": head(0, " folded: x"),
    "a bad port": head(0, method="GET", path="http://a:99999999/"),
    "a long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "a long field": head(0, "X: " + "a" * 100_000),
    "many fields": head(0, *(f"X-{i}: 1" for i in range(2000))),
    "a NUL": b"GET /\0 HTTP/1.1\r\nHost: h\r\n\r\n",
    "a space in a name": head(0, "A B: c"),
    "escapes in a path": head(0, method="GET", path="/%1b%5b31m%0aforged"),
    "a bad URL": head(0, method="GET", path="http://[::1"),
    "a huge length": head("9" * 5000),
    "digits of another script": head("٣".encode().decode("latin-1")),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_http(server: Guarded, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    """Is a 4xx to the client and a line in the log."""
    answer = said(server, data)
    assert 400 <= status_of(answer) < 500
    assert str(status_of(answer)) in "".join(line[:3] for line in lines_of(caplog))
    assert is_served(server)


ODD = {
    "an older version": lambda data: data.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "an upgrade": lambda data: data.replace(
        b"Host: h", b"Host: h\r\nConnection: Upgrade\r\nUpgrade: websocket"
    ),
    "a boundary": lambda data: data.replace(
        b"Host: h", b"Host: h\r\nContent-Type: multipart/form-data; boundary=x"
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_not_wanted_and_does_no_harm(server: Guarded, name: str) -> None:
    """Is overlooked: the request is answered, and there is no second answer."""
    body = request_of(server).to_bytes()
    answer = said(server, ODD[name](head(len(body)) + body))
    assert status_of(answer) == 200 and answer.count(b"HTTP/1.") == 1


def header_of(server: Guarded, **changes: Any) -> dict[str, Any]:
    """The header of a good request, with changes."""
    return {
        "digest": server.card.digest(),
        "first_sequence": 0,
        "reduction": to_json(REDUCTION),
        "sequences": 1,
        "tokens": 9,
        **changes,
    }


def truncated(**changes: Any) -> dict[str, Any]:
    """A reduction as JSON whose truncation has changes."""
    values = to_json(REDUCTION)
    return values | {"truncation": values["truncation"] | changes}


HUGE = 10**4200
HEADERS: dict[str, dict[str, Any]] = {
    "sequences infinite": {"sequences": float("inf")},
    "tokens NaN": {"tokens": float("nan")},
    "sequences huge": {"sequences": HUGE},
    "tokens negative": {"tokens": -9},
    "tokens text": {"tokens": "9"},
    "tokens true": {"tokens": True},
    "tokens null": {"tokens": None},
    "tokens a fraction": {"tokens": 9.5},
    "first_sequence huge": {"first_sequence": HUGE},
    "first_sequence beyond 64 bits": {"first_sequence": 2**64},
    "first_sequence negative": {"first_sequence": -(2**63)},
    "k huge": {"reduction": truncated(k=HUGE)},
    "k negative": {"reduction": truncated(k=-1)},
    "p huge": {"reduction": truncated(method="topp", p=HUGE)},
    "p infinite": {"reduction": truncated(method="topp", p=float("inf"))},
    "draws huge": {"reduction": truncated(method="topk+sample", draws=2**40)},
    "seed huge": {"reduction": truncated(method="sample", draws=4, seed=HUGE)},
    "method a surrogate": {"reduction": truncated(method="\ud800\x1b[31m\n")},
    "vocab_size huge": {"reduction": to_json(REDUCTION) | {"vocab_size": HUGE}},
    "vocab_size negative": {"reduction": to_json(REDUCTION) | {"vocab_size": -300}},
    "temperatures huge": {"reduction": to_json(REDUCTION) | {"temperatures": [1.0, HUGE]}},
    "temperatures NaN": {"reduction": to_json(REDUCTION) | {"temperatures": [1.0, float("nan")]}},
    "temperatures many": {
        "reduction": to_json(REDUCTION) | {"temperatures": [1.0 + i for i in range(65)]}
    },
    "digest a list": {"digest": ["x"]},
    "reduction a list": {"reduction": []},
    "another field": {"more": 1},
}


@pytest.mark.parametrize("changes", HEADERS.values(), ids=HEADERS.keys())
def test_absurd_headers(
    server: Guarded, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    """Are status 400 and a short line, never an error of the server's own."""
    good = request_of(server).to_bytes()
    arrays = good[-(4 + 9 * 5) :]
    body = frame(header_of(server, **changes), arrays)
    assert status_of(said(server, head(len(body)) + body)) == 400
    assert sum(line.startswith("400 to 127.0.0.1: POST") for line in lines_of(caplog)) == 1
    assert is_served(server)


DEEP = 30_000
BODIES = {
    "deep lists": b"[" * DEEP,
    "deep lists, closed": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * (DEEP // 3),
    "deep in a field": b'{"reduction":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "too many digits": b'{"tokens": ' + b"9" * 5000 + b"}",
    "no UTF-8": b"\xff\xfe\xfa",
    "no JSON": b"{",
    "a number": b"1e999",
}


@pytest.mark.parametrize("text", BODIES.values(), ids=BODIES.keys())
def test_bodies_that_break_parsers(server: Guarded, text: bytes) -> None:
    """Deep nesting, huge integers and broken texts are status 400."""
    body = len(text).to_bytes(8, "little") + text
    assert status_of(said(server, head(len(body)) + body)) == 400
    assert is_served(server)


@pytest.mark.parametrize("size", [0, 9, 2**16, 2**62, 2**64 - 1])
def test_a_header_that_lies_about_its_size(server: Guarded, size: int) -> None:
    """Is status 400."""
    body = size.to_bytes(8, "little") + b"{}"
    assert status_of(said(server, head(len(body)) + body)) == 400


@pytest.mark.parametrize(
    "index", [-1, -(2**31), 2**31 - 1, 320], ids=["-1", "lowest", "highest", "one too many"]
)
def test_absurd_ids(server: Guarded, index: int) -> None:
    """Are refused by the range they must lie in."""
    request = request_of(server)
    ids = request.input_ids.copy()
    ids[4] = index
    body = dataclasses.replace(request, input_ids=ids).to_bytes()
    answer = said(server, head(len(body)) + body)
    assert status_of(answer) == 400 and b"token ids must lie in [0, 320)" in answer


def test_an_oversized_body(server: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    """Is refused by its length alone; one without a length, or compressed, too."""
    size = (1 << 16) + 1
    assert status_of(said(server, head(size))) == 413
    assert status_of(said(server, head(size) + bytes(size))) == 413
    chunked = b"POST " + SCORE_PATH.encode() + b" HTTP/1.1\r\nHost: h\r\n"
    chunked += b"Transfer-Encoding: chunked\r\n\r\n"
    assert status_of(said(server, chunked + b"1\r\nx\r\n0\r\n\r\n")) == 411
    body = request_of(server).to_bytes()
    assert status_of(said(server, head(len(body), "Content-Encoding: gzip") + body)) == 415
    assert [line[:3] for line in lines_of(caplog)] == ["413", "413", "411", "415"]


def test_an_answer_too_large(caplog: pytest.LogCaptureFixture) -> None:
    """Is refused before it is made, with what to lower; so are too many tokens."""
    with guarded(max_answer_bytes=500, max_tokens=100) as server:
        wide = dataclasses.replace(REDUCTION, truncation=Truncation(k=100))
        for request, hint in (
            (request_of(server, 9, wide), b"lower teacher.max_batch_tokens or truncation.k"),
            (request_of(server, 110), b"at most 500"),
        ):
            body = request.to_bytes()
            answer = said(server, head(len(body)) + body)
            assert status_of(answer) == 413 and hint in answer
        assert server.backend.num_scored == 0
        assert is_served(server)


def test_a_client_that_leaves_in_the_middle(
    server: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    """Of its head, of its body, or with a reset, is a line at most."""
    body = request_of(server).to_bytes()
    whole = head(len(body)) + body
    for cut in (10, len(head(len(body))), len(whole) - 3):
        for resets in (False, True):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(whole[:cut])
                if resets:
                    gone = struct.pack("ii", 1, 0)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, gone)
    wait_for(lambda: sum("has left" in line for line in lines_of(caplog)) == 6)
    assert is_served(server)


def test_slow_clients(server: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    """Who does not finish a head or a body in time is told so and dropped."""
    body = request_of(server).to_bytes()
    assert status_of(said(server, b"POST /v1")) == 408
    slow = head(len(body)) + body[:-1]
    assert status_of(said(server, slow)) == 408
    assert sum(line.startswith("408") for line in lines_of(caplog)) == 2
    assert said(server, b"") == b"", "who says nothing is dropped without a word"
    assert is_served(server)


def test_a_client_that_takes_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Is dropped when its time is over."""
    with guarded(client_seconds=0.3, max_body_bytes=1 << 20) as server:
        sequence = TokenSequence("a", np.ones(128, np.int32), np.arange(128) > 0)
        wide = dataclasses.replace(REDUCTION, truncation=Truncation(k=300))
        request = ScoreRequest.of(server.card.digest(), wide, [sequence] * 20, 0)
        body = request.to_bytes()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(head(len(body)) + body)
            # 6 MB of answer have 0.3 s and 47 s of 128 KiB each; nobody waits for that here.
            wait_for(lambda: server.backend.num_scored == 1)
        wait_for(lambda: any("has left" in line for line in lines_of(caplog)))
        assert is_served(server)


def test_health_says_nothing() -> None:
    """Of the teacher, nor of what the server is made of; everything else wants the key."""
    with guarded(key=KEY) as server:
        answer = said(server, head(0, method="GET", path="/health"))
        fields, _, body = answer.partition(b"\r\n\r\n")
        assert status_of(answer) == 200 and body == b""
        assert b"aiohttp" not in fields and b"Python" not in fields
        for path in (TEACHER_PATH, SCORE_PATH, "/", "/health/", "//health"):
            answer = said(server, head(0, method="GET", path=path))
            assert status_of(answer) == 401
            assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
                "error": "the API key is missing or wrong"
            }
        assert not is_served(server, f"Authorization: Bearer {KEY}x")
        assert is_served(server, f"Authorization: Bearer {KEY}")


FLOODS = {
    "requests without a pause": (b"", b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n" * 2000),
    "bytes behind an upgrade": (
        head(0, "Connection: upgrade", "Upgrade: websocket", method="GET", path="/health"),
        bytes(1 << 16),
    ),
    "bytes behind CONNECT": (b"CONNECT a:1 HTTP/1.1\r\nHost: h\r\n\r\n", bytes(1 << 16)),
    "an extension of a chunk": (
        b"POST /health HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        b"a" * (1 << 16),
    ),
    "small chunks": (
        b"POST /health HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\nx\r\n" * 8000,
    ),
    "trailers": (
        b"POST /health HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"A: b\r\n" * 8000,
    ),
    "empty lines": (b"", b"\r\n" * 30_000),
    "a body that nobody wants": (head(10**11, path="/health"), bytes(1 << 16)),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_takes_no_memory(server: Guarded, name: str) -> None:
    """Of a client that reads nothing: what it may send is thrown away, or it is dropped."""
    begins, goes_on = FLOODS[name]

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before, sent = resident(), 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as client:
        client.sendall(begins)
        with contextlib.suppress(OSError):  # dropped, or not read any more
            while sent < 1 << 27:
                sent += client.send(goes_on)
    assert resident() - before < 1 << 26, (name, sent)
    assert is_served(server)
