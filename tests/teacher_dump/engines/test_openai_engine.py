"""Stock servers as teachers: the same numbers as a plain forward, whatever happens on the way.

Servers are real HTTP servers in this process (`tests.support.stock_servers`), of four kinds;
`test_openai_refusals.py` has those that answer wrongly, `test_openai_real.py` real ones.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from decant.schemas import Layout, ScoredSequence, Truncation
from decant.storage import CacheReader, verify
from decant.storage.cache.checks import check_sequence
from decant.teacher_dump import DumpConfig, SequenceConfig, SourceConfig, dump
from decant.teacher_dump.audit.command import AuditArguments
from decant.teacher_dump.audit.run import audit
from decant.teacher_dump.engines import EngineError, open_engine
from decant.teacher_dump.engines.openai.client import ServerClient
from decant.teacher_dump.engines.opening import open_generator
from decant.teacher_dump.engines.remote import client as remote_client
from decant.teacher_dump.engines.seam import Prompt, Sampling, Unavailable
from decant.teacher_dump.inputs.config import GenerateConfig
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.job.start import ConfigChanged
from decant.teacher_dump.planning.predict import predict
from decant.teacher_dump.teacher import describe_teacher
from tests.support import models
from tests.support.dumps import save_records
from tests.support.stock_servers import (
    KINDS,
    StockServer,
    V,
    build_tokenizer,
    log_probs,
    save_teacher,
    stock_config,
    stock_server,
)

K = 8
TOKENIZER = build_tokenizer()
KEY = "a-key-that-must-not-be-seen"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher of which every token has a text of its own."""
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    """The same, here."""
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, path: Path) -> Iterator[StockServer]:
    """One server of each kind, healthy."""
    with stock_server(request.param, path) as found:
        yield found


@pytest.fixture
def vllm(path: Path) -> Iterator[StockServer]:
    """A server of vLLM's kind that a test may spoil."""
    with stock_server("vllm", path) as found:
        yield found


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long between two attempts."""
    monkeypatch.setattr(remote_client, "FIRST_PAUSE", 0.01)


def sequences_of(count: int, seed: int = 0) -> list[TokenSequence]:
    """Texts behind a beginning token; the targets begin with the second token of the text."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        text = " ".join(rng.choice(models.WORDS, int(rng.integers(2, 12))))
        ids = np.array([0, *TOKENIZER(text)["input_ids"]], np.int32)
        is_target = rng.random(len(ids)) < 0.67
        is_target[:2], is_target[-1] = False, True
        made.append(TokenSequence(f"sample-{number}", ids, is_target))
    return made


def opened(path: Path, *servers: StockServer, k: int = K, **options: Any) -> Any:
    """An engine for the top k of these servers' teacher."""
    truncation = options.pop("truncation", Truncation(k=k))
    return open_engine(
        stock_config(path, *servers, **options),
        "",
        vocab_size=V,
        truncation=truncation,
        temperatures=(1.0,),
        max_length=100,
        tokenizer=TOKENIZER,
    )


def disagreement(scored: ScoredSequence, model: Any) -> float:
    """The largest difference from a plain forward, in nats; ids must be the most probable ones."""
    logp = log_probs(model, scored.input_ids)[scored.positions - 1]
    ids = scored.token_ids.astype(np.int64)
    assert scored.logprobs is not None and scored.log_tail is not None
    rest = logp.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    pairs = [
        (scored.logprobs, np.take_along_axis(logp, ids, axis=1)),
        (scored.logprobs, -np.sort(-logp, axis=1)[:, : ids.shape[1]]),
        (scored.log_tail[:, 0], np.logaddexp.reduce(rest, axis=1)),
        (scored.label_logprob, logp[np.arange(len(logp)), scored.labels]),
    ]
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


# Healthy.


def test_every_kind_of_server_gives_a_plain_forward(
    server: StockServer, path: Path, model: Any
) -> None:
    """Ids, log probs, tail and labels, in the order asked; a cache takes them."""
    engine = opened(path, server)
    expected = {"ids": "completions", "text": "completions"}.get(server.kind, server.kind)
    assert engine.card.api == expected
    assert engine.card.form.sends_text == (server.kind == "text") == (not engine.card.has_ids)
    sequences = sequences_of(20)
    layout = Layout(
        slots=K,
        vocab_size=V,
        precision="f32",
        temperatures=(1.0,),
        has_num_kept=False,
        fields=Truncation(k=K).stored(with_logprobs=True),
    )
    for scored, sequence in zip(engine.score(sequences, 0), sequences, strict=True):
        assert scored.sample_id == sequence.sample_id
        assert disagreement(scored, model) < 1e-5
        check_sequence(scored, layout)
    engine.close()
    engine.close()


def test_labels_alone(vllm: StockServer, path: Path, model: Any) -> None:
    """`truncation.method: label` keeps no entry, and needs none."""
    engine = opened(path, vllm, truncation=Truncation(method="label"))
    for scored in engine.score(sequences_of(3), 0):
        logp = log_probs(model, scored.input_ids)[scored.positions - 1]
        expected = logp[np.arange(len(logp)), scored.labels]
        np.testing.assert_allclose(scored.label_logprob, expected, atol=1e-5)
        assert scored.logprobs is None
    engine.close()


def test_the_api_can_be_said(vllm: StockServer, path: Path) -> None:
    """Then no other is tried, and a server without it is refused."""
    with pytest.raises(Unavailable, match=r"teacher.api: sglang.*status 404"):
        describe_teacher(stock_config(path, vllm, api="sglang"))
    assert not vllm.bodies


def test_a_url_may_end_with_v1(vllm: StockServer, path: Path) -> None:
    """As those of clients of such servers do."""
    teacher = describe_teacher(stock_config(path, f"{vllm.url}/v1/"))
    assert teacher.info.engine.startswith("openai vllm")


def test_of_several_models_one_is_named(vllm: StockServer, path: Path) -> None:
    """By teacher.model, which must be one that is served."""
    vllm.names = ["tiny", "other"]
    with pytest.raises(Unavailable, match=r"serves tiny, other: set teacher.model"):
        describe_teacher(stock_config(path, vllm))
    with pytest.raises(Unavailable, match=r"teacher.model is third: name one of them"):
        describe_teacher(stock_config(path, vllm, model="third"))
    assert describe_teacher(stock_config(path, vllm, model="other")).info.name == "other (r)"


# What a server gives at most.


@pytest.mark.parametrize("limit", [1, 5, 20])
def test_the_limit_of_entries_is_found(vllm: StockServer, path: Path, limit: int) -> None:
    """At connect, and the error names the server's flag for it."""
    vllm.limit = limit
    teacher = describe_teacher(stock_config(path, vllm))
    assert teacher.max_entries == limit
    with pytest.raises(Unavailable, match=rf"at most {limit} entries.*--max-logprobs 64"):
        opened(path, vllm, k=64)


def test_a_server_that_cuts_without_a_word_has_a_limit_too(vllm: StockServer, path: Path) -> None:
    """It answers 200 with fewer entries than were asked for."""

    def cut(answer: dict[str, Any]) -> None:
        rows = answer["choices"][0]["prompt_logprobs"]
        rows[1:] = [dict(list(row.items())[:6]) for row in rows[1:]]

    vllm.limit, vllm.spoil = 1000, cut
    assert describe_teacher(stock_config(path, vllm)).max_entries in (5, 6)


# Whole jobs.


@pytest.fixture
def job(path: Path, texts_path: Path, tmp_path: Path) -> DumpConfig:
    """A dump of some texts; its teacher is to be replaced."""
    return DumpConfig(
        output=str(tmp_path / "cache"),
        teacher=stock_config(path, "http://unset"),
        source=SourceConfig(path=str(texts_path)),
        sequences=SequenceConfig(max_length=64),
        truncation=Truncation(k=K),
        precision="f32",
        shard_targets=300,
    )


def with_teacher(job: DumpConfig, teacher: Any, **changes: Any) -> DumpConfig:
    """The job with another teacher."""
    return dataclasses.replace(job, teacher=teacher, **changes)


def test_a_dump_is_resumed_by_the_same_teacher_alone(
    vllm: StockServer, path: Path, job: DumpConfig, model: Any, caplog: Any
) -> None:
    """Its probe may differ by rounding; another model behind the same name is refused."""
    config = with_teacher(job, stock_config(path, vllm))
    manifest = dump(config)
    assert verify(config.output).problems == ()
    assert manifest.teacher.engine.endswith("top k at T=1, tail 1 - sum p")
    assert manifest.teacher.name == "tiny (r)"
    assert max(disagreement(s, model) for s in CacheReader(config.output)) < 1e-5
    record = Path(config.output, "shards/part-000001.json")
    record.unlink()

    def rounded(answer: dict[str, Any]) -> None:
        for row in answer["choices"][0]["prompt_logprobs"][1:]:
            for entry in row.values():
                entry["logprob"] -= 0.01

    vllm.spoil = rounded
    dump(config)
    assert record.exists()
    record.unlink()
    vllm.spoil, vllm.model = None, models.build_model(vocab_size=V, hidden_size=64, seed=5)
    with pytest.raises(ConfigChanged, match=r"teacher.fingerprint: the cache has 'probe:"):
        dump(config)


def test_a_plan_is_cut_from_what_the_server_gives(
    vllm: StockServer, path: Path, job: DumpConfig
) -> None:
    """Its reference is the server's limit; what cannot be had is refused before that."""
    vllm.limit = 20
    config = with_teacher(job, stock_config(path, vllm))
    assert predict(config, 6).reference_k == 20
    for changes, message in (
        ({"truncation": Truncation(k=64)}, r"gives at most 20 entries.*--max-logprobs 64"),
        ({"temperatures": [1.0, 2.0]}, r"temperatures \[1.0, 2.0\] cannot be had"),
        ({"truncation": Truncation(method="topp", p=0.9)}, "method topp cannot be had"),
        ({"sequences": SequenceConfig(max_length=500)}, "takes at most 127 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(with_teacher(config, config.teacher, **changes), 6)


def test_audit_by_a_stock_server(vllm: StockServer, path: Path, job: DumpConfig) -> None:
    """A cache of its own agrees with it."""
    config = with_teacher(job, stock_config(path, vllm))
    dump(config)
    given = AuditArguments(
        url=config.output, teacher=vllm.url, engine="openai", tokenizer=str(path)
    )
    report = audit(config.output, given.config(), sample=4)
    assert report.ok and report.teacher == "tiny (r)"
    vllm.model = models.build_model(vocab_size=V, hidden_size=64, seed=5)
    report = audit(config.output, given.config(), sample=4)
    assert [finding.kind for finding in report.findings] == ["teacher"]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_responses_are_sampled_there(
    kind: str, path: Path, model: Any, job: DumpConfig, tmp_path: Path
) -> None:
    """By ids, up to the first stop id; completions APIs give none and are refused."""
    sampling = Sampling(temperature=0.0, top_p=1.0, stop_ids=(1,), vocab_size=V)
    prompts = [
        Prompt(token_ids=s.input_ids, max_new_tokens=5, seed=9) for s in sequences_of(4, seed=2)
    ]
    with stock_server(kind, path) as server:
        config = stock_config(path, server)
        generator = open_generator(
            config, "", sampling=sampling, max_length=100, tokenizer=TOKENIZER
        )
        for prompt, response in zip(prompts, generator.generate(prompts), strict=True):
            ids = [*prompt.token_ids.tolist()]
            for index in response.token_ids.tolist():
                assert index == log_probs(model, ids)[-1].argmax()
                ids.append(index)
        generator.close()
        records = [{"id": str(i), "prompt": "the lazy dog"} for i in range(3)]
        source = SourceConfig(
            path=str(save_records(tmp_path / "prompts.jsonl", *records)),
            generate=GenerateConfig(n=2, max_new_tokens=4),
        )
        dump(with_teacher(job, config, source=source))
        assert len(CacheReader(job.output)) == 6
    with stock_server("ids", path) as server, pytest.raises(EngineError, match="not ids"):
        open_generator(
            stock_config(path, server), "", sampling=sampling, max_length=9, tokenizer=TOKENIZER
        )


# Endpoints that fail.


def test_failures_are_retried(vllm: StockServer, path: Path, model: Any) -> None:
    """Overload, a proxy's errors, a crash and answers cut in the middle cost time alone."""
    engine = opened(path, vllm)
    vllm.failures.extend([503, 500, "drop", 429, 502, "drop", 504])
    scored = list(engine.score(sequences_of(8), 0))
    assert len(scored) == 8 and not vllm.failures
    assert max(disagreement(one, model) for one in scored) < 1e-5
    engine.close()


def test_the_work_is_spread_over_servers_of_one_teacher(path: Path, model: Any) -> None:
    """Of one kind or of another name; a server of another teacher is refused at once."""
    with stock_server("vllm", path) as one, stock_server("vllm", path) as other:
        engine = opened(path, one, other, requests=2)
        before = len(one.bodies), len(other.bodies)
        scored = list(engine.score(sequences_of(16), 0))
        assert max(disagreement(found, model) for found in scored) < 1e-5
        assert len(one.bodies) > before[0] and len(other.bodies) > before[1]
        engine.close()
        other.model = models.build_model(vocab_size=V, hidden_size=64, seed=5)
        with pytest.raises(Unavailable, match=r"offer different teachers: its log probs of \d+"):
            opened(path, one, other)


def test_another_model_behind_the_same_name_ends_the_job(
    vllm: StockServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it comes back after a failure, and when it is looked at again from time to time."""
    engine = opened(path, vllm)
    assert len(list(engine.score(sequences_of(2), 0))) == 2
    monkeypatch.setattr(ServerClient, "meets_again_after", 0.0)
    vllm.model = models.build_model(vocab_size=V, hidden_size=64, seed=5)
    with pytest.raises(Unavailable, match="offer different teachers: its log probs of"):
        list(engine.score(sequences_of(2), 0))
    engine.close()


def test_keys(vllm: StockServer, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong or missing one ends the job in a line that does not hold it."""
    vllm.key = KEY
    monkeypatch.setenv("SERVER_KEY", KEY)
    config = stock_config(path, vllm, api_key_env="SERVER_KEY")
    assert describe_teacher(config).info.name == "tiny (r)"
    with pytest.raises(Unavailable, match=r"wants an API key .*set teacher.api_key_env"):
        describe_teacher(stock_config(path, vllm))
    monkeypatch.setenv("SERVER_KEY", KEY + "!")
    with pytest.raises(Unavailable, match=r"does not accept the API key in \$SERVER_KEY") as caught:
        describe_teacher(config)
    assert KEY not in str(caught.value)


def test_a_used_up_quota_is_not_waited_for(vllm: StockServer, path: Path) -> None:
    """Hosted APIs say so with the status of an overload."""
    vllm.failures.append(429)
    vllm.reason = "insufficient_quota: You exceeded your current quota"
    with pytest.raises(Unavailable, match="exceeded your current quota"):
        describe_teacher(stock_config(path, vllm))


def test_nobody_there(path: Path) -> None:
    """The job waits as long as it was told and names the endpoint."""
    config = stock_config(path, "http://127.0.0.1:9", wait_seconds=0.1)
    with pytest.raises(Unavailable, match=r"no server has answered.*127\.0\.0\.1:9: "):
        describe_teacher(config)
