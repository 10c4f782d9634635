"""Claims about chat APIs as teachers: the entries that come with an answer are what is stored.

The API is a real HTTP server in this process (`tests.support.chat_servers`); what it says is
compared with a plain forward. `test_chat_refusals.py` has answers that are of no use.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from decant.schemas import Truncation
from decant.storage import CacheReader, verify
from decant.teacher_dump import DumpConfig, SequenceConfig, SourceConfig, dump
from decant.teacher_dump.engines.remote import client as remote_client
from decant.teacher_dump.engines.seam import EngineError, Unavailable
from decant.teacher_dump.inputs.config import GenerateConfig
from decant.teacher_dump.job.responses import GenerationChanged
from decant.teacher_dump.planning.chat import predict_chat
from decant.teacher_dump.planning.command import PlanArguments, run_plan
from tests.support.chat_servers import (
    ChatServer,
    build_chat_tokenizer,
    chat_config,
    chat_server,
    save_chat_teacher,
)
from tests.support.dumps import change, rows, save_records
from tests.support.stock_servers import log_probs

K = 8
NATS = 5e-5
"""How far a stored tail of float32 log probs may lie from a plain forward."""
PROBES = 6
"""Requests before the first answer: three each to say who the teacher is, and to sample."""
TOKENIZER = build_chat_tokenizer()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher whose every id has bytes of its own."""
    folder = tmp_path_factory.mktemp("teacher")
    save_chat_teacher(folder)
    return folder


@pytest.fixture
def server(path: Path) -> Iterator[ChatServer]:
    """A chat API that a test may spoil."""
    with chat_server(path) as found:
        yield found


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long between two attempts."""
    monkeypatch.setattr(remote_client, "FIRST_PAUSE", 0.01)


@pytest.fixture
def job(server: ChatServer, path: Path, tmp_path: Path) -> DumpConfig:
    """Answers to three conversations and a text, two of each, in two parts."""
    records: list[dict[str, Any]] = [
        {"id": f"c{i}", "messages": [{"role": "user", "content": f"the dog {i}", "weight": 0}]}
        for i in range(3)
    ]
    source = save_records(tmp_path / "prompts.jsonl", *records, {"id": "t", "prompt": "a fox"})
    return DumpConfig(
        output=str(tmp_path / "cache"),
        teacher=chat_config(path, server),
        source=SourceConfig(
            path=str(source), generate=GenerateConfig(n=2, max_new_tokens=10, part_prompts=3)
        ),
        sequences=SequenceConfig(max_length=64),
        truncation=Truncation(k=K),
        precision="f32",
        shard_targets=20,
    )


def disagreement(cache: str, model: Any) -> float:
    """The largest difference of any stored number from a plain forward, in nats."""
    worst = 0.0
    for scored in CacheReader(cache):
        logp = log_probs(model, scored.input_ids)[scored.positions - 1]
        ids = scored.token_ids.astype(np.int64)
        rest = logp.copy()
        np.put_along_axis(rest, ids, -np.inf, axis=1)
        assert scored.logprobs is not None and scored.log_tail is not None
        pairs = [
            (scored.logprobs, np.take_along_axis(logp, ids, axis=1)),
            (scored.log_tail[:, 0], np.logaddexp.reduce(rest, axis=1)),
            (scored.label_logprob, logp[np.arange(len(logp)), scored.labels]),
        ]
        worst = max(worst, *(float(np.abs(a - b).max()) for a, b in pairs))
    return worst


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"names_ids": True, "lists_end": True},
        {"lists_end": True, "length": 20},
        {"takes_anything": True},
        {"limit_name": "max_completion_tokens"},
    ],
    ids=["bytes", "ids", "end", "loose", "other limit"],
)
def test_what_is_stored_is_the_teacher_s(
    server: ChatServer, job: DumpConfig, attributes: dict[str, Any]
) -> None:
    """Ids, log probs, tail and labels of every generated token are those of a plain forward."""
    for name, value in attributes.items():
        setattr(server, name, value)
    manifest = dump(job)
    assert verify(job.output).problems == ()
    assert disagreement(job.output, server.model) < NATS
    found = {scored.sample_id: scored for scored in CacheReader(job.output)}
    assert set(found) == {f"{name}#{n}" for name in ("c0", "c1", "c2", "t") for n in (1, 2)}
    length = min(server.length + server.lists_end, 10)
    for scored in found.values():
        logp = log_probs(server.model, scored.input_ids)[scored.positions - 1]
        np.testing.assert_allclose(scored.logprobs, -np.sort(-logp, axis=1)[:, :K], atol=NATS)
        assert scored.num_targets == length and scored.positions[-1] == len(scored.input_ids) - 1
        asked = TOKENIZER.apply_chat_template(
            list(scored.conversation.messages[:-1]), add_generation_prompt=True, return_dict=False
        )
        assert scored.input_ids[:-length].tolist() == asked
    assert found["t#1"].conversation.messages[0] == {"role": "user", "content": "a fox"}
    assert manifest.teacher.name == "tiny (tiny-2026-01-31)"
    assert "openai chat, system_fingerprint fp_1" in manifest.teacher.engine
    assert manifest.source["system_fingerprints"] == ["fp_1"]
    assert not list(Path(job.output, "generated").glob("_answers"))
    assert len(server.paid) == 8 and len({body["seed"] for body in server.paid}) == 8
    assert "weight" not in server.paid[0]["messages"][0]
    before = len(server.paid)
    dump(job)
    assert len(server.paid) == before


def test_nothing_answered_is_asked_again(server: ChatServer, job: DumpConfig) -> None:
    """A job that breaks in the middle of a part goes on with what is missing alone."""
    config = change(job, "teacher.requests", 1)
    server.failures.extend([None] * (PROBES + 3) + [404])
    server.reason = "made to fail"
    with pytest.raises(Unavailable, match="made to fail"):
        dump(config)
    kept = list(Path(job.output, "generated", "_answers").rglob("*.json"))
    assert len(kept) == 3 and not list(Path(job.output, "generated").glob("*.parquet"))
    assert predict_chat(config).answered == 3
    asked = len(server.paid) - 1
    with pytest.raises(GenerationChanged):
        dump(change(config, "source.generate.seed", 7))
    assert len(server.paid) - 1 == asked == 3
    dump(config)
    seeds = [body["seed"] for body in server.paid]
    assert len(seeds) == 9 and len(set(seeds)) == 8  # the one that failed is asked again
    assert disagreement(job.output, server.model) < NATS
    other = dataclasses.replace(config, output=job.output + "-again")
    dump(other)
    assert rows(job.output) == rows(other.output)


def test_an_answer_may_be_long(server: ChatServer, job: DumpConfig) -> None:
    """A few hundred tokens with twenty entries each make more than a megabyte."""
    server.spoil = lambda answer: answer.update(padding="x" * (2 << 20))
    dump(job)
    assert disagreement(job.output, server.model) < NATS


def test_failures_are_retried(server: ChatServer, job: DumpConfig) -> None:
    """Overload, a proxy's errors and answers cut in the middle cost time alone."""
    server.failures.extend([503, *[None] * PROBES, 503, 500, "drop", 429, 502])
    dump(job)
    assert not server.failures and disagreement(job.output, server.model) < NATS


def test_the_pause_that_is_asked_for_is_kept(server: ChatServer, job: DumpConfig) -> None:
    """`Retry-After` of an overload, in parts of a second too."""
    server.failures.extend([None] * PROBES + [503])
    server.retry_after = "0.6"
    times: list[float] = []
    server.spoil = lambda _: times.append(time.monotonic())
    dump(change(job, "teacher.requests", 1))
    assert len(server.paid) == 9 and max(np.diff(times)) >= 0.6


def test_a_used_up_quota_ends_the_job(server: ChatServer, job: DumpConfig) -> None:
    """What was answered until then is kept."""
    server.failures.extend([None] * (PROBES + 2) + [429])
    server.reason = "insufficient_quota: You exceeded your current quota"
    with pytest.raises(Unavailable, match="exceeded your current quota"):
        dump(change(job, "teacher.requests", 1))
    assert len(list(Path(job.output, "generated", "_answers").rglob("*.json"))) == 2


def test_a_plan_asks_nothing(
    server: ChatServer, job: DumpConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says how many requests and tokens a dump will pay for."""
    counted = predict_chat(job)
    for as_json, said in (
        (False, f"requests             {counted.requests},"),
        (True, f'"answer_tokens": {counted.answer_tokens}'),
    ):
        assert run_plan(job, PlanArguments(json=as_json)) == 0
        assert said in capsys.readouterr().out
    assert not server.bodies
    dump(job)
    assert counted.requests == len(server.paid) == 8 and counted.prompts == 4
    generated = pq.read_table(Path(job.output, "generated"))
    assert counted.prompt_tokens == sum(map(len, generated.column("prompt_ids").to_pylist()))
    assert counted.answer_tokens == 8 * 10


def test_tokens_whose_log_prob_is_not_told_are_no_targets(
    server: ChatServer, job: DumpConfig
) -> None:
    """-9999 stands for an improbable token: it is read, and nothing is learned from it."""
    server.hides = 3
    dump(job)
    generated = pq.read_table(Path(job.output, "generated")).to_pylist()
    hidden = sum(value < -9000 for row in generated for value in row["logprobs"])
    tokens = sum(len(row["response_ids"]) for row in generated)
    assert 0 < hidden < tokens
    assert CacheReader(job.output).manifest.num_targets == tokens - hidden
    assert disagreement(job.output, server.model) < NATS


def test_entries_without_an_id_are_tail(server: ChatServer, job: DumpConfig) -> None:
    """An entry of each token has the bytes of none: it is counted, and all others are exact."""

    def rename(answer: dict[str, Any]) -> None:
        for entry in answer["choices"][0]["logprobs"]["content"]:
            if len(top := entry["top_logprobs"]) < 3:
                return
            other = top[1] if top[2]["token"] == entry["token"] else top[2]
            other["bytes"] = [0xE2, 0x82]

    server.spoil = rename
    dump(job)
    assert disagreement(job.output, server.model) < NATS
    generated = pq.read_table(Path(job.output, "generated")).to_pylist()
    assert all(row["num_unnamed"] == len(row["response_ids"]) for row in generated)


def test_other_settings_use_the_answers_again(server: ChatServer, job: DumpConfig) -> None:
    """A cache with a smaller k is made from a copy of `generated`; nothing is asked."""
    dump(job)
    before = len(server.paid)
    other = dataclasses.replace(job, output=job.output + "-k4", truncation=Truncation(k=4))
    Path(other.output).mkdir()
    Path(job.output, "generated").rename(Path(other.output, "generated"))
    dump(other)
    assert len(server.paid) == before
    assert disagreement(other.output, server.model) < NATS


@pytest.mark.parametrize("setting", ["temperature", "top_p"])
def test_log_probs_of_what_is_sampled_are_refused(
    server: ChatServer, job: DumpConfig, setting: str
) -> None:
    """Those of the model are taken, however its answers are sampled."""
    job = change(job, f"source.generate.{setting}", 0.6)
    server.is_scaled = True
    with pytest.raises(Unavailable, match="log probs of what it samples, not of the model"):
        dump(job)
    assert not server.paid
    server.is_scaled = False
    dump(job)
    assert disagreement(job.output, server.model) < NATS


def test_a_server_of_another_model_ends_the_job(server: ChatServer, job: DumpConfig) -> None:
    """Every answer names its model: another one behind the same name is another teacher."""

    def other(answer: dict[str, Any]) -> None:
        if len(server.paid) > 2:
            answer["model"] = "tiny-2026-02-28"

    server.spoil = other
    with pytest.raises(Unavailable, match="answers as tiny-2026-02-28 now"):
        dump(job)


def test_two_endpoints_must_be_of_one_teacher(path: Path, job: DumpConfig) -> None:
    """By the model that each names."""
    with chat_server(path) as one, chat_server(path, answers_as="tiny-2") as two:
        with pytest.raises(EngineError, match="offer different teachers"):
            dump(dataclasses.replace(job, teacher=chat_config(path, one, two)))
        two.answers_as = one.answers_as
        dump(dataclasses.replace(job, teacher=chat_config(path, one, two, requests=1)))
        assert len(one.paid) + len(two.paid) == 8 and one.paid and two.paid


def test_generated_reads_as_records(server: ChatServer, job: DumpConfig) -> None:
    """The text is what the API wrote."""
    dump(job)
    for row in pq.read_table(Path(job.output, "generated")).to_pylist():
        assert json.loads(row["conversation"])[-1]["content"] == row["response"]
        assert row["response"] == TOKENIZER.decode(row["response_ids"])
        assert row["problem"] is None and row["finish_reason"] == "stop"
