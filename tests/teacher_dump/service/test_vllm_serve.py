"""The teacher service on vLLM's own server, against the transformers engine on the same files.

One server for all of this module; it is killed in the end.
"""

import importlib.util
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from decant.schemas import ScoredSequence, Truncation
from decant.teacher_dump.engines import EngineError, TeacherConfig, open_engine
from decant.teacher_dump.engines.http.messages import SCORE_PATH, TEACHER_PATH
from decant.teacher_dump.engines.seam import SequenceError
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.teacher import describe_teacher, hash_weights
from tests.support import models
from tests.support.services import ServedTeacher, http_config, wait_for

if importlib.util.find_spec("vllm") is None:  # to import it would change torch in this process
    pytest.skip("vllm is not installed", allow_module_level=True)

pytestmark = pytest.mark.vllm

KEY = "a-key"
POISON = models.VOCAB_SIZE - 1
"""A token whose embedding is NaN; no sequence holds it unless that is the point."""


@pytest.fixture(scope="module")
def poisoned_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose heads are wide enough for vLLM on a CPU."""
    path = tmp_path_factory.mktemp("teacher")
    model = models.save_teacher(path, hidden_size=64)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.nan
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def served(poisoned_path: Path) -> Iterator[ServedTeacher]:
    """A server of it that wants KEY; every request takes several of vLLM's steps."""
    options = ("--teacher.engine", "vllm", "--teacher.max_batch_tokens", "64")
    options += ("--limits.client_seconds", "3")
    service = ServedTeacher(poisoned_path, *options, key=KEY)
    yield service
    service.kill()


@pytest.fixture
def config(served: ServedTeacher, monkeypatch: pytest.MonkeyPatch) -> TeacherConfig:
    """A client's configuration."""
    monkeypatch.setenv("SERVICE_KEY", KEY)
    return http_config(served.url, api_key_env="SERVICE_KEY")


def sequences_of(lengths: list[int], seed: int = 0) -> list[TokenSequence]:
    """Random tokens, about two thirds of them targets."""
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        is_target = rng.random(length) < 0.67
        is_target[0], is_target[-1] = False, True
        ids = rng.integers(0, POISON, length).astype(np.int32)
        made.append(TokenSequence(f"sample-{number}", ids, is_target))
    return made


def opened(config: TeacherConfig, path: Path, truncation: Truncation) -> Any:
    """An engine at two temperatures."""
    return open_engine(
        config,
        "" if config.engine == "http" else str(path),
        vocab_size=models.VOCAB_SIZE,
        truncation=truncation,
        temperatures=(1.0, 2.0),
        max_length=models.MAX_POSITIONS,
    )


def assert_close(found: ScoredSequence, expected: ScoredSequence) -> float:
    """Scalars agree, and so do log probs of equal ids; returns the share of equal ids."""
    for name in ("log_z", "label_logprob"):
        one, other = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-4, err_msg=name)
    same = found.token_ids == expected.token_ids
    assert found.logprobs is not None and expected.logprobs is not None
    np.testing.assert_allclose(found.logprobs[same], expected.logprobs[same], rtol=0, atol=5e-4)
    if expected.draws is not None:
        same &= found.draws == expected.draws
    return float(same.mean())


def test_it_is_the_same_teacher(config: TeacherConfig, poisoned_path: Path) -> None:
    """Its fingerprints are those of the files; the engine is vLLM."""
    remote = describe_teacher(config)
    local = hash_weights(describe_teacher(TeacherConfig(path=str(poisoned_path))))
    assert remote.info.fingerprint == local.info.fingerprint
    assert remote.info.engine.startswith("vllm ")
    assert remote.shared_vocab_size == local.shared_vocab_size == models.VOCAB_SIZE
    assert remote.tokenizer.get_vocab() == local.tokenizer.get_vocab()


@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(k=8),
        Truncation(method="topp", k=16, p=0.8, min_k=2),
        Truncation(method="sample", draws=12, seed=5),
        Truncation(method="topk+sample", k=4, draws=6, seed=5),
    ],
    ids=lambda truncation: truncation.method,
)
def test_every_truncation(
    config: TeacherConfig, poisoned_path: Path, truncation: Truncation
) -> None:
    """One server gives what each job asks for, with the draws of the sequence's place."""
    remote = opened(config, poisoned_path, truncation)
    local = opened(TeacherConfig(path=str(poisoned_path), device="cpu"), poisoned_path, truncation)
    sequences = sequences_of([5, 60, 128, 2, 33, 90, 17, 64, 7])
    same = [
        assert_close(one, other)
        for one, other in zip(remote.score(sequences, 21), local.score(sequences, 21), strict=True)
    ]
    assert np.mean(same) > 0.99
    remote.close()
    local.close()


def test_a_poisoned_sequence_among_other_jobs(config: TeacherConfig, poisoned_path: Path) -> None:
    """It is named to the job whose it is; sequences of other jobs are scored as ever."""
    truncation = Truncation(k=8)
    local = opened(TeacherConfig(path=str(poisoned_path), device="cpu"), poisoned_path, truncation)
    healthy = sequences_of([40, 90, 33, 128, 64, 100, 17, 25] * 4, seed=2)
    expected = list(local.score(healthy, 0))
    local.close()
    found: list[ScoredSequence] = []

    def other_job() -> None:
        engine = opened(config, poisoned_path, truncation)
        found.extend(engine.score(healthy, 0))
        engine.close()

    thread = threading.Thread(target=other_job)
    thread.start()
    engine = opened(config, poisoned_path, truncation)
    for _ in range(4):
        sequences = sequences_of([40, 30, 50, 60, 20], seed=3)
        sequences[2].input_ids[3] = POISON
        with pytest.raises(SequenceError, match="logits for sample sample-2;") as caught:
            list(engine.score(sequences, 0))
        assert caught.value.index == 2
    engine.close()
    thread.join()
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_a_reduction_that_makes_no_sense(config: TeacherConfig, poisoned_path: Path) -> None:
    """Is refused in one line of the service's; the next job is served."""
    engine = opened(config, poisoned_path, Truncation(k=8))
    engine._reduction = engine._reduction.__class__(
        vocab_size=models.PADDED_VOCAB_SIZE + 1, truncation=Truncation(k=8), temperatures=(1.0,)
    )
    with pytest.raises(EngineError, match="vocabulary of 321 ids, at most 320"):
        list(engine.score(sequences_of([9]), 0))
    engine.close()


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/v1/decant/teacher", "/pooling"])
def test_every_route_wants_the_key(served: ServedTeacher, path: str) -> None:
    """Those that vLLM's own key leaves open too."""
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(served.url + path)


def raw(served: ServedTeacher, data: bytes) -> bytes:
    """The first bytes of the answer to these; none if there is no answer."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(data)
        return client.recv(1 << 16)


def test_hostile_requests(served: ServedTeacher) -> None:
    """Noise, oversized and absurd bodies and slow clients are 4xx and lines; others are served."""
    key = f"Authorization: Bearer {KEY}\r\n"
    start = f"POST {SCORE_PATH} HTTP/1.1\r\nHost: h\r\n{key}"
    deep = b"[" * 60_000
    body = len(deep).to_bytes(8, "little") + deep
    for data, status in (
        (b"\x16\x03\x01 no HTTP\r\n\r\n", b"400"),
        (f"{start}Content-Length: {1 << 40}\r\n\r\n".encode(), b"413"),
        (f"{start}Content-Length: {len(body)}\r\n\r\n".encode() + body, b"400"),
        (f"{start}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(), b"411"),
        (f"{start}Content-Length: 9\r\n\r\nslow".encode(), b"408"),
        (
            f"POST /pooling HTTP/1.1\r\nHost: h\r\n{key}Content-Length: 9\r\n\r\n".encode(),
            b"408 400",
        ),
        (f"GET {TEACHER_PATH} HTTP/1.1\r\nHost: h\r\n\r\n".encode(), b"401"),
    ):
        assert raw(served, data).split(b" ")[1] in status, data[:80]
    with socket.create_connection(("127.0.0.1", served.port)) as client:  # which leaves
        client.sendall(f"{start}Content-Length: 9\r\n\r\nsome".encode())
    assert urllib.request.urlopen(served.url + "/health").read() == b""
    wait_for(lambda: "has left within its body" in served.said())
    assert "413 to 127.0.0.1: POST" in served.said() and "Traceback" not in served.said()
    assert KEY not in served.said()


def test_no_process_outlives_a_killed_server(served: ServedTeacher) -> None:
    """It would keep the memory of the GPU, and the next server could not start."""
    (server,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"--port={served.port}" in (process.info["cmdline"] or [])
    ]
    below = server.children(recursive=True)
    assert len(below) >= 2
    server.kill()
    wait_for(
        lambda: (
            not any(
                process.is_running() and process.status() != psutil.STATUS_ZOMBIE
                for process in below
            )
        )
    )
