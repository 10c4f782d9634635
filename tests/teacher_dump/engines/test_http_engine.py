"""A teacher as a service: the same numbers as here, whatever happens to the services on the way.

Services are real processes or real HTTP servers (`tests.services`), with the transformers engine;
`tests/teacher_dump/service/test_vllm_serve.py` has those with vLLM.

One file, as the tests share services that are started once.
"""

import dataclasses
import http.server
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decant.schemas import ScoredSequence, Truncation
from decant.storage import CacheReader
from decant.teacher_dump import DumpConfig, EngineError, dump
from decant.teacher_dump.engines import TeacherConfig, open_engine
from decant.teacher_dump.engines.http.engine import HttpEngine
from decant.teacher_dump.engines.remote import client as http_client
from decant.teacher_dump.engines.seam import SequenceError, Unavailable
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.teacher import describe_teacher
from tests.support import models
from tests.support.commands import Command, command, setting
from tests.support.services import ServedTeacher, Unreliable, http_config, unreliable, wait_for

KEY = "a-key-that-must-not-be-seen"


@pytest.fixture(scope="module")
def served(teacher_path: Path) -> Iterator[ServedTeacher]:
    """A service of `teacher_path` that wants KEY."""
    service = ServedTeacher(teacher_path, key=KEY)
    yield service
    assert service.stop() == 0, "SIGTERM ends it cleanly"


@pytest.fixture
def flaky(teacher_path: Path) -> Iterator[Unreliable]:
    """A service of `teacher_path` in this process that fails as told."""
    with unreliable(teacher_path) as server:
        yield server


@pytest.fixture(autouse=True)
def with_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is in the environment, and nobody waits long between two attempts."""
    monkeypatch.setenv("SERVICE_KEY", KEY)
    monkeypatch.setattr(http_client, "FIRST_PAUSE", 0.01)


def sequences_of(lengths: list[int]) -> list[TokenSequence]:
    """Random tokens, about two thirds of them targets."""
    rng = np.random.default_rng(3)
    made = []
    for number, length in enumerate(lengths):
        is_target = rng.random(length) < 0.67
        is_target[0], is_target[-1] = False, True
        ids = rng.integers(0, models.VOCAB_SIZE, length).astype(np.int32)
        made.append(TokenSequence(f"sample-{number}", ids, is_target))
    return made


def opened(config: TeacherConfig, model_path: str, **changes: Any) -> Any:
    """An engine for top 8 at two temperatures, or with changes."""
    settings: dict[str, Any] = {
        "vocab_size": models.VOCAB_SIZE,
        "truncation": Truncation(k=8),
        "temperatures": (1.0, 2.0),
        "max_length": models.MAX_POSITIONS,
    }
    return open_engine(config, model_path, **(settings | changes))


def http_engine(*urls: str, **options: Any) -> HttpEngine:
    """An engine of these services."""
    config = http_config(*urls, **options)
    engine = opened(config, "", fingerprint=describe_teacher(config).info.fingerprint)
    assert isinstance(engine, HttpEngine)
    return engine


def assert_close(found: ScoredSequence, expected: ScoredSequence) -> None:
    """The same up to the rounding of differently batched forwards."""
    assert found.sample_id == expected.sample_id
    for name in ("input_ids", "is_target", "positions", "token_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    for name in ("logprobs", "log_z", "log_tail", "label_logprob", "entropy"):
        one, other = getattr(found, name), getattr(expected, name)
        if other is None:
            assert one is None
        else:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4, err_msg=name)
    if expected.draws is not None:
        np.testing.assert_array_equal(found.draws, expected.draws)


def assert_same_caches(found: str | Path, expected: str | Path) -> None:
    """Two dumps agree in everything but when they were made."""
    one, other = CacheReader(found), CacheReader(expected)
    volatile = ("cache_id", "totals", "records", "checksum")
    manifests = [
        {name: value for name, value in reader.manifest.to_json().items() if name not in volatile}
        for reader in (one, other)
    ]
    assert manifests[0] == manifests[1]
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert_close(a, b)


# One service, healthy.


@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(k=8),
        Truncation(method="topp", k=16, p=0.8, min_k=2),
        Truncation(method="sample", draws=12, seed=5),
        Truncation(method="topk+sample", k=4, draws=6, seed=5),
        Truncation(method="label"),
    ],
    ids=lambda truncation: truncation.method,
)
def test_one_service_gives_what_each_job_asks_for(
    served: ServedTeacher, teacher_path: Path, truncation: Truncation
) -> None:
    """Every truncation, as the engine here gives it: draws depend on the place in the plan."""
    config = http_config(served.url, api_key_env="SERVICE_KEY")
    remote = opened(config, "", truncation=truncation)
    local_config = TeacherConfig(path=str(teacher_path), dtype="float32")
    local = opened(local_config, str(teacher_path), truncation=truncation)
    sequences = sequences_of([5, 60, 128, 2, 33, 90, 17, 64, 7])
    found = list(remote.score(sequences, 21))
    for one, other in zip(found, local.score(sequences, 21), strict=True):
        assert_close(one, other)
    remote.close()
    remote.close()
    local.close()


def test_a_dump_without_the_model_equals_one_beside_it(
    served: ServedTeacher, dump_config: DumpConfig, cache: Path, tmp_path: Path
) -> None:
    """Teacher, tokenizer, fingerprints and rows are those of a local dump; the key is nowhere."""
    config = dataclasses.replace(
        dump_config,
        output=str(tmp_path / "remote"),
        teacher=http_config(served.url, api_key_env="SERVICE_KEY"),
    )
    dump(config)
    found, expected = CacheReader(config.output).manifest, CacheReader(cache).manifest
    # The service runs this teacher as float32 too, under the same path.
    assert found.teacher == expected.teacher
    assert_same_caches(config.output, cache)
    dumped = b"".join(p.read_bytes() for p in Path(config.output).rglob("*") if p.is_file())
    assert KEY.encode() not in dumped
    assert found.teacher.fingerprint.encode() in dumped


def test_a_local_dump_goes_on_with_a_service(
    served: ServedTeacher, dump_config: DumpConfig, cache: Path, tmp_path: Path
) -> None:
    """The cache cannot tell where its teacher stood."""
    config = dataclasses.replace(dump_config, output=str(tmp_path / "both"))
    dump(config)
    removed = Path(config.output, "shards/part-000002.json")
    removed.unlink()
    dump(dataclasses.replace(config, teacher=http_config(served.url, api_key_env="SERVICE_KEY")))
    assert removed.exists()
    assert_same_caches(config.output, cache)


def test_audit_by_a_service(served: ServedTeacher, cache: Path) -> None:
    """A live teacher elsewhere can audit a cache."""
    result = command(
        "teacher_dump",
        "audit",
        str(cache),
        *("--engine", "http", "--teacher", served.url, "--api-key-env", "SERVICE_KEY"),
        *("--sample", "4"),
        first=setting({"SERVICE_KEY": KEY}),
    )
    assert result.code == 0, result.stderr


# Keys.


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        (
            KEY + "!",
            {"api_key_env": "SERVICE_KEY"},
            r"does not accept the API key in \$SERVICE_KEY",
        ),
        (KEY, {}, "wants an API key .*set teacher.api_key_env"),
        ("", {"api_key_env": "SERVICE_KEY"}, r"\$SERVICE_KEY is not set or empty"),
        ("a\nb", {"api_key_env": "SERVICE_KEY"}, r"\$SERVICE_KEY must be printable ASCII"),
    ],
    ids=["wrong", "none", "empty", "two lines"],
)
def test_a_wrong_key_is_refused(
    served: ServedTeacher,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    options: dict[str, str],
    message: str,
) -> None:
    """The message names the variable, never the key."""
    monkeypatch.setenv("SERVICE_KEY", key)
    with pytest.raises(EngineError, match=message) as caught:
        describe_teacher(http_config(served.url, **options))
    assert KEY not in str(caught.value)


def test_a_wrong_key_is_one_line(served: ServedTeacher, texts_path: Path, tmp_path: Path) -> None:
    """The command ends with exit code 2 and a single line of error, and leaves nothing."""
    result = command(
        "teacher_dump",
        "run",
        *("--output", str(tmp_path / "cache"), "--source.path", str(texts_path)),
        *("--teacher.engine", "http", "--teacher.endpoints", f"[{served.url}]"),
        *("--teacher.api_key_env", "SERVICE_KEY"),
        first=setting({"SERVICE_KEY": "wrong"}),
    )
    assert result.code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and served.url in lines[0] and "401" in lines[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "cache").exists()


# Services that fail.


class Stopped:
    """A dump through services that stands still behind its first committed shard."""

    def __init__(self, config: DumpConfig, folder: Path, *urls: str) -> None:
        """Run it up to there."""
        self.output = folder / "cache"
        path = folder / "config.json"
        values = {
            "output": str(self.output),
            "teacher": {"engine": "http", "endpoints": list(urls), "max_batch_tokens": 128},
            "source": {"path": config.source.path},
            "sequences": {"max_length": config.sequences.max_length},
            "truncation": {"k": config.truncation.k},
            "temperatures": config.temperatures,
            "precision": config.precision,
            "shard_targets": config.shard_targets,
        }
        path.write_text(json.dumps(values))
        self.command = Command("teacher_dump", "run", "--config", str(path))
        record = self.output / "shards/part-000000.json"
        wait_for(record.exists)
        self.command.send(signal.SIGSTOP)
        assert len(list(self.output.glob("shards/*.json"))) < 6, "there is more to do"

    def go_on(self) -> None:
        """Let it run again."""
        self.command.send(signal.SIGCONT)

    def says(self, text: str) -> bool:
        """Whether its log holds a text."""
        return text in self.command.stderr()


def test_a_dump_outlives_its_service(
    dump_config: DumpConfig, teacher_path: Path, cache: Path, tmp_path: Path
) -> None:
    """Killed in the middle and started again, the service completes the same cache."""
    service = ServedTeacher(teacher_path)
    job = Stopped(dump_config, tmp_path, service.url)
    service.kill()
    job.go_on()
    wait_for(lambda: job.says("does not answer, trying again"))
    service.start(teacher_path)
    result = job.command.result()
    assert result.code == 0, result.stderr
    assert f"{service.url} answers" in result.stderr
    assert_same_caches(job.output, cache)
    service.stop()


def test_one_of_two_services_is_enough(
    dump_config: DumpConfig, teacher_path: Path, cache: Path, tmp_path: Path
) -> None:
    """Of two endpoints one is killed in the middle; the other does the rest."""
    services = [ServedTeacher(teacher_path), ServedTeacher(teacher_path)]
    job = Stopped(dump_config, tmp_path, *(service.url for service in services))
    services[0].kill()
    job.go_on()
    result = job.command.result()
    assert result.code == 0, result.stderr
    assert f"{services[0].url} does not answer" in result.stderr
    assert_same_caches(job.output, cache)
    services[1].stop()


def test_another_teacher_in_its_place_is_refused(
    dump_config: DumpConfig, teacher_path: Path, other_teacher_path: Path, tmp_path: Path
) -> None:
    """A service that comes back with another teacher ends the dump, in one line of both values."""
    service = ServedTeacher(teacher_path)
    job = Stopped(dump_config, tmp_path, service.url)
    service.kill()
    service.start(other_teacher_path)
    job.go_on()
    result = job.command.result()
    assert result.code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].count("sha256:") == 2 and service.url in errors[0]
    service.stop()


def test_endpoints_must_offer_the_same_teacher(
    served: ServedTeacher, teacher_path: Path, other_teacher_path: Path
) -> None:
    """Another teacher, or the same in another dtype, behind the second endpoint is refused."""
    other = ServedTeacher(other_teacher_path, key=KEY)
    config = http_config(served.url, other.url, api_key_env="SERVICE_KEY")
    with pytest.raises(Unavailable, match=r"different teachers: tokenizer 'sha256:\w+' and 'sh"):
        describe_teacher(config)
    with pytest.raises(Unavailable, match=r"dtype float32, teacher\.dtype is bfloat16"):
        describe_teacher(dataclasses.replace(config, dtype="bfloat16"))
    other.kill()
    other.start(teacher_path, "--teacher.dtype", "bfloat16")
    with pytest.raises(Unavailable, match=r"dtype '(float32' and 'bf|bfloat16' and ')"):
        describe_teacher(config)
    other.stop()


def test_nobody_answers() -> None:
    """The job waits as long as it was told and names the endpoint."""
    with pytest.raises(Unavailable, match=r"no teacher service has answered.*127\.0\.0\.1:9: "):
        describe_teacher(http_config("http://127.0.0.1:9", wait_seconds=0.1))


def test_a_server_that_is_no_teacher_service(tmp_path: Path) -> None:
    """Something else that speaks HTTP there is named as such."""
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(Unavailable, match="is not a teacher service"):
            describe_teacher(http_config(url))
        server.shutdown()


def test_failures_are_retried(flaky: Unreliable, teacher_path: Path) -> None:
    """Overload, a proxy's errors, a crash and lost connections cost time and nothing else."""
    engine = http_engine(flaky.url)
    local = opened(TeacherConfig(path=str(teacher_path), dtype="float32"), str(teacher_path))
    sequences = sequences_of([40, 90, 33, 128, 64, 100])
    flaky.failures.extend([503, 500, "drop", 429, 502, "drop", 504])
    for one, other in zip(engine.score(sequences, 0), local.score(sequences, 0), strict=True):
        assert_close(one, other)
    assert not flaky.failures
    engine.close()
    local.close()


def test_a_request_that_always_fails_is_given_up(flaky: Unreliable) -> None:
    """After ATTEMPTS failures the error says the last; the engine can be asked again."""
    engine = http_engine(flaky.url, requests=1)
    (sequence,) = sequences_of([20])
    flaky.failures.extend([500] * http_client.ATTEMPTS)
    with pytest.raises(EngineError, match="a request failed 4 times, last: status 500: made to"):
        list(engine.score([sequence], 0))
    assert len(list(engine.score([sequence], 0))) == 1
    engine.close()


def test_a_damaged_answer_is_an_error(flaky: Unreliable) -> None:
    """Rows that are not as many as asked for never reach a cache."""
    engine = http_engine(flaky.url)
    flaky.failures.append("damage")
    with pytest.raises(EngineError, match=r"answers wrongly: \d+ bytes of rows answered, expected"):
        list(engine.score(sequences_of([20]), 0))
    engine.close()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("nan", "sample-0: label_logprob is nan, which is not finite"),
        ("ids", r"sample-0: token id 2147483647 outside \[0, 300\)"),
    ],
)
def test_absurd_numbers_are_an_error(flaky: Unreliable, failure: str, message: str) -> None:
    """Of a service's answer, with the sample; nothing of it goes on."""
    engine = http_engine(flaky.url)
    flaky.row_words = engine._reduction.row_words
    flaky.failures.append(failure)
    with pytest.raises(EngineError, match=f"answers wrongly for sample {message}"):
        list(engine.score(sequences_of([20]), 0))
    engine.close()


def test_requests_in_flight_are_bounded(flaky: Unreliable) -> None:
    """Never more than teacher.requests at a time, nor more than that ahead of the reader."""
    engine = http_engine(flaky.url, requests=3)
    flaky.delay = 0.02
    scores = engine.score(sequences_of([100] * 40), 0)
    next(scores)
    wait_for(lambda: flaky.num_requests == 3)
    flaky.delay = 0.0
    assert flaky.num_requests == 3, "a reader that stands still holds the requests back"
    assert len(list(scores)) == 39
    assert flaky.most_at_once == 3
    engine.close()


def test_a_run_left_unfinished_does_not_mix_with_the_next(
    flaky: Unreliable, teacher_path: Path
) -> None:
    """Its requests are dropped, and the next run's answers are its own."""
    engine = http_engine(flaky.url)
    local = opened(TeacherConfig(path=str(teacher_path), dtype="float32"), str(teacher_path))
    scores = engine.score(sequences_of([100] * 12), 0)
    next(scores)
    flaky.delay = 0.1
    del scores
    flaky.delay = 0.0
    sequences = sequences_of([40, 90, 33])
    for one, other in zip(engine.score(sequences, 0), local.score(sequences, 0), strict=True):
        assert_close(one, other)
    engine.close()
    local.close()


# Sequences that cannot be scored.


def test_a_poisoned_sequence_is_named_by_its_index(tmp_path: Path) -> None:
    """Those before it are given, those behind it can be asked for."""
    models.save_teacher(tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher/model.safetensors")
    weights["model.embed_tokens.weight"][299] = torch.nan
    save_file(weights, tmp_path / "teacher/model.safetensors", metadata={"format": "pt"})
    sequences = sequences_of([40, 30, 50, 60, 20])
    for sequence in sequences:
        sequence.input_ids[sequence.input_ids == 299] = 7
    sequences[2].input_ids[3] = 299
    with unreliable(tmp_path / "teacher") as server:
        engine = http_engine(server.url)
        scored = []
        with pytest.raises(SequenceError, match="logits for sample sample-2;") as caught:
            for one in engine.score(sequences, 0):
                scored.append(one)
        assert caught.value.index == len(scored) == 2
        assert len(list(engine.score(sequences[3:], 3))) == 2
        engine.close()


def test_an_overlong_sequence_is_refused_here(served: ServedTeacher) -> None:
    """By name, before anything is sent."""
    engine = http_engine(served.url, api_key_env="SERVICE_KEY")
    with pytest.raises(
        EngineError, match="sample-0 has 129 tokens, this teacher reads at most 128"
    ):
        list(engine.score(sequences_of([129]), 0))
    engine.close()


def test_services_that_score_too_little_are_refused_at_once(tmp_path: Path) -> None:
    """A service that takes shorter sequences than there are would reject them one by one."""
    models.save_teacher(tmp_path / "teacher")
    with (
        unreliable(tmp_path / "teacher") as long,
        unreliable(tmp_path / "teacher", max_length=64) as short,
    ):
        config = http_config(long.url, short.url)
        with pytest.raises(Unavailable, match=r"scores at most 64 tokens.*up to 128"):
            opened(config, "")
        opened(config, "", max_length=64).close()
