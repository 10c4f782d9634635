"""What a teacher service refuses, and the bodies that cross the network.

Requests are made by hand, as no client of ours would; the service is a real one over HTTP.
"""

import asyncio
import dataclasses
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decant.schemas import TeacherInfo, Truncation
from decant.teacher_dump.config import ServeConfig
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.http.messages import (
    PROTOCOL,
    SCORE_PATH,
    TEACHER_PATH,
    TOKENIZER_PATH,
    MessageError,
    ScoreAnswer,
    ScoreRequest,
    TeacherCard,
    frame,
    frame_files,
    unframe,
    unframe_files,
)
from decant.teacher_dump.engines.packed_rows import Reduction
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.service.routes import (
    MAX_BODY_BYTES,
    MAX_PENDING_TOKENS,
    Answer,
    Service,
    is_authorised,
)
from tests.support import models
from tests.support.commands import command
from tests.support.services import Unreliable, unreliable

REDUCTION = Reduction(
    vocab_size=models.VOCAB_SIZE, truncation=Truncation(k=4), temperatures=(1.0, 2.0)
)


@pytest.fixture(scope="module")
def server(teacher_path: Path) -> Iterator[Unreliable]:
    """A service of `teacher_path`; nothing is made to fail here."""
    with unreliable(teacher_path) as running:
        yield running


@pytest.fixture(scope="module")
def card(server: Unreliable) -> TeacherCard:
    """What it says of its teacher."""
    return TeacherCard.from_bytes(post(server.url + TEACHER_PATH, None)[1], "there")


def post(url: str, body: bytes | None) -> tuple[int, bytes]:
    """Status and body of the answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body)) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def request_of(card: TeacherCard, length: int = 9, **changes: Any) -> ScoreRequest:
    """A good request for one sequence, or with changes."""
    ids = np.arange(1, length + 1, dtype=np.int32) % models.VOCAB_SIZE
    sequence = TokenSequence("a", ids, np.arange(length) > 0)
    request = ScoreRequest.of(card.digest(), REDUCTION, [sequence], 0)
    return dataclasses.replace(request, **changes)


def test_a_good_request_is_answered(server: Unreliable, card: TeacherCard) -> None:
    """With one row of W words per target."""
    status, body = post(server.url + SCORE_PATH, request_of(card).to_bytes())
    assert status == 200
    (rows,) = ScoreAnswer.from_bytes(body, [8], REDUCTION).rows
    assert rows.shape == (8, REDUCTION.row_words) == (8, 2 * 4 + 2 * 2 + 1)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"digest": "0" * 32}, 409, "another teacher is served here"),
        ({"input_ids": np.full(9, models.PADDED_VOCAB_SIZE, np.int32)}, 400, r"lie in \[0, 320\)"),
        ({"input_ids": np.full(9, -1, np.int32)}, 400, r"lie in \[0, 320\)"),
        ({"is_target": np.zeros(9, np.bool_)}, 400, "a sequence has no target"),
        ({"is_target": np.ones(9, np.bool_)}, 400, "first token of a sequence cannot be a target"),
        ({"lengths": np.array([8], np.int32)}, 400, "do not add up"),
        ({"lengths": np.array([-1, 10], np.int32)}, 400, "do not add up"),
        ({"first_sequence": -1}, 400, "score request of 1 sequences"),
        (
            {"reduction": dataclasses.replace(REDUCTION, vocab_size=321)},
            400,
            "vocabulary of 321 ids, at most 320",
        ),
        (
            {"reduction": dataclasses.replace(REDUCTION, truncation=Truncation(k=301))},
            400,
            "301 entries per target of 300 ids",
        ),
        (
            {"reduction": dataclasses.replace(REDUCTION, temperatures=(2.0,))},
            400,
            "temperatures must start with 1",
        ),
    ],
)
def test_a_bad_request_is_refused(
    server: Unreliable, card: TeacherCard, changes: dict[str, Any], status: int, message: str
) -> None:
    """Ids that would end a GPU's kernel above all; the service is there for the next request."""
    found, body = post(server.url + SCORE_PATH, request_of(card, **changes).to_bytes())
    assert found == status
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(json.loads(body)["error"])
    assert post(server.url + SCORE_PATH, request_of(card).to_bytes())[0] == 200


def test_sequences_beyond_the_model_are_refused(server: Unreliable, card: TeacherCard) -> None:
    """Both lengths are named."""
    status, body = post(server.url + SCORE_PATH, request_of(card, length=129).to_bytes())
    assert status == 400 and b"129 tokens, at most 128" in body


@pytest.mark.parametrize("body", [b"", b"x", bytes(8), frame({"a": 1}), frame({}, b"abc")])
def test_rubbish_is_refused(server: Unreliable, body: bytes) -> None:
    """With status 400."""
    assert post(server.url + SCORE_PATH, body)[0] == 400


def test_routes_and_methods(server: Unreliable) -> None:
    """Others than those served are 404 and 405."""
    assert post(server.url + "/v1/other", None)[0] == 404
    assert post(server.url + SCORE_PATH, None)[0] == 405
    assert post(server.url + TEACHER_PATH, b"x")[0] == 405


def test_the_tokenizer_is_served(server: Unreliable, teacher_path: Path) -> None:
    """As the files that make it."""
    files = unframe_files(post(server.url + TOKENIZER_PATH, None)[1])
    assert json.loads(files["tokenizer.json"]) == json.loads(
        (teacher_path / "tokenizer.json").read_bytes()
    )


class Waiting:
    """A backend that answers when told."""

    def __init__(self) -> None:
        """Nothing is told."""
        self.told = asyncio.Event()

    def check(self, reduction: Reduction) -> None:
        """Everything can be had."""

    async def score(
        self, reduction: Reduction, sequences: list[TokenSequence], first_sequence: int
    ) -> list[Any]:
        """Zeros."""
        await self.told.wait()
        return [
            np.zeros((int(s.is_target.sum()), reduction.row_words), np.int32) for s in sequences
        ]


def test_too_much_work_at_once_is_put_off() -> None:
    """Beyond MAX_PENDING_TOKENS the answer is 429 and when to come again; then there is room."""
    length = MAX_PENDING_TOKENS // 2 + 1
    info = TeacherInfo(
        name="t", fingerprint="f", architecture="a", engine="e 1", dtype="d", vocab_size=320
    )
    card = TeacherCard(
        protocol=PROTOCOL,
        teacher=info,
        route="",
        tokenizer_fingerprint="",
        max_positions=0,
        max_length=length,
    )
    small = dataclasses.replace(REDUCTION, truncation=Truncation(k=1), temperatures=(1.0,))
    body = request_of(card, length, reduction=small).to_bytes()

    async def ask(service: Service) -> Answer:
        async def read() -> bytes:
            return body

        return await service.answer("POST", SCORE_PATH, str(len(body)), read)

    async def play() -> tuple[Answer, Answer, Answer]:
        backend = Waiting()
        service = Service(card, {}, backend)
        first = asyncio.create_task(ask(service))
        await asyncio.sleep(0)
        second = await ask(service)
        backend.told.set()
        return await first, second, await ask(service)

    first, second, third = asyncio.run(play())
    assert (first.status, second.status, third.status) == (200, 429, 200)
    assert int(second.headers["Retry-After"]) >= 1


def test_a_body_too_large_is_not_read(card: TeacherCard) -> None:
    """The length of its header is enough; without one it is refused as well."""

    async def never() -> bytes:
        raise AssertionError("the body was read")

    service = Service(card, {}, Waiting())
    for length, status in ((str(MAX_BODY_BYTES + 1), 413), (None, 411), ("-1", 411)):
        answer = asyncio.run(service.answer("POST", SCORE_PATH, length, never))
        assert answer.status == status


# Bodies.


@st.composite
def requests(draw: st.DrawFn) -> ScoreRequest:
    """Any request that makes sense."""
    lengths = draw(st.lists(st.integers(2, 9), min_size=1, max_size=5))
    sequences = []
    for length in lengths:
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length))
        targets = draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))
        mask = np.array([False, *targets])
        mask[-1] = True
        sequences.append(TokenSequence("", np.array(ids, np.int32), mask))
    return ScoreRequest.of("d" * 32, REDUCTION, sequences, draw(st.integers(0, 2**40)))


@given(requests())
def test_requests_survive_the_way(request: ScoreRequest) -> None:
    """Every field is what it was."""
    found = ScoreRequest.from_bytes(request.to_bytes())
    for field in dataclasses.fields(ScoreRequest):
        one, other = getattr(found, field.name), getattr(request, field.name)
        np.testing.assert_array_equal(one, other, field.name)


@given(requests(), st.data())
def test_a_request_cut_short_is_an_error(request: ScoreRequest, data: st.DataObject) -> None:
    """Wherever it is cut."""
    body = request.to_bytes()
    size = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(MessageError):
        ScoreRequest.from_bytes(body[:size])


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 5), st.integers(0, 2**31)
)
def test_answers_survive_the_way(num_targets: list[int], kept: int, seed: int) -> None:
    """Also one that ends at a sequence which cannot be scored; one cut short is an error."""
    rng = np.random.default_rng(seed)
    rows = [
        rng.integers(-(2**31), 2**31, (n, REDUCTION.row_words)).astype(np.int32)
        for n in num_targets[:kept]
    ]
    answer = ScoreAnswer(rows=rows, not_finite=len(rows) < len(num_targets))
    body = answer.to_bytes()
    found = ScoreAnswer.from_bytes(body, num_targets, REDUCTION)
    assert found.not_finite == answer.not_finite and len(found.rows) == len(rows)
    for one, other in zip(found.rows, rows, strict=True):
        np.testing.assert_array_equal(one, other)
    if rows:
        with pytest.raises(MessageError):
            ScoreAnswer.from_bytes(body[:-1], num_targets, REDUCTION)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", "..", "."])
def test_a_file_outside_its_folder_is_refused(name: str) -> None:
    """A service cannot write where it likes."""
    with pytest.raises(MessageError, match="not a plain file name"):
        unframe_files(frame_files({name: b"x"}))


def test_another_protocol_is_named(card: TeacherCard) -> None:
    """Both versions are in the message."""
    data = json.dumps(json.loads(card.to_bytes()) | {"protocol": 99}).encode()
    with pytest.raises(MessageError, match=f"protocol 99 of the teacher service, .* {PROTOCOL}:"):
        TeacherCard.from_bytes(data, "http://h")
    for other in (b"<html>", b"[]", b'{"protocol": 1}'):
        with pytest.raises(MessageError, match="http://h"):
            TeacherCard.from_bytes(other, "http://h")


def test_frames_keep_their_parts() -> None:
    """Header and bytes."""
    header, body = unframe(frame({"a": [1]}, b"bc", b"d"))
    assert header == {"a": [1]} and bytes(body) == b"bcd"


def test_keys() -> None:
    """Only the whole key after Bearer."""
    assert is_authorised("Bearer k", "k")
    for given_key in (None, "", "k", "Bearer ", "Bearer kk", "bearer k", "Basic k", "Bearer \xe9"):
        assert not is_authorised(given_key, "k")


# The command.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_length", "129"], "max_length is 129, the teacher takes at most 128"),
        (["--api_key_env", "NOT_SET"], "$NOT_SET is not set or empty"),
        (["--port", "70000"], "port is 70000"),
        (["--teacher.engine", "vllm"], "teacher.engine vllm is not installed here"),
        (["--host", "0.0.0.0"], "is reached from other machines, and no API key is asked for"),
        (["--host", "::"], "is reached from other machines, and no API key is asked for"),
        (["--host", ""], "is reached from other machines, and no API key is asked for"),
        (["--limits.max_body_bytes", "0"], "limits.max_body_bytes is 0, must be >= 1"),
        (["--limits.client_seconds", ".inf"], "must be positive and finite"),
        (
            ["--allow_without_key", "true", "--api_key_env", "NOT_SET"],
            "allow_without_key has no effect with api_key_env",
        ),
    ],
)
def test_a_service_that_cannot_be_started(
    teacher_path: Path, options: list[str], message: str
) -> None:
    """One line, exit code 2."""
    result = command("teacher_dump", "serve", "--teacher.path", str(teacher_path), *options)
    assert result.code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_port_in_use(teacher_path: Path, server: Unreliable) -> None:
    """One line, exit code 2."""
    port = server.url.rpartition(":")[2]
    result = command("teacher_dump", "serve", "--teacher.path", str(teacher_path), "--port", port)
    assert result.code == 2 and f"cannot listen on 127.0.0.1:{port}: " in result.stderr
    assert "address already in use" in result.stderr.lower()
    assert "Traceback" not in result.stderr


def test_a_service_cannot_use_a_service() -> None:
    """That would be a proxy."""
    with pytest.raises(ValueError, match=r"cannot have teacher\.engine http"):
        ServeConfig(teacher=TeacherConfig(engine="http", endpoints=("http://h",)))
