"""Claims about chat APIs that cannot be teachers, and about answers that are of no use."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from decant.schemas import Truncation
from decant.storage import CacheReader, verify
from decant.teacher_dump import DumpConfig, SequenceConfig, SourceConfig, dump
from decant.teacher_dump.audit.run import audit
from decant.teacher_dump.engines import EngineError, open_engine
from decant.teacher_dump.engines.openai.token_ids import TokenIds
from decant.teacher_dump.engines.remote import client as remote_client
from decant.teacher_dump.engines.seam import Unavailable
from decant.teacher_dump.inputs.config import GenerateConfig
from decant.teacher_dump.job.isolate import TooManyRejected
from decant.teacher_dump.teacher import describe_teacher
from tests.support.chat_servers import (
    ChatServer,
    build_chat_tokenizer,
    chat_config,
    chat_server,
    save_chat_teacher,
)
from tests.support.dumps import change, save_records
from tests.support.stock_servers import V

Spoil = Callable[[dict[str, Any]], None]


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
    """One answer to each of six prompts."""
    source = save_records(
        tmp_path / "prompts.jsonl", *({"id": f"p{i}", "prompt": f"dog {i}"} for i in range(6))
    )
    return DumpConfig(
        output=str(tmp_path / "cache"),
        teacher=chat_config(path, server),
        source=SourceConfig(path=str(source), generate=GenerateConfig(n=1, max_new_tokens=5)),
        sequences=SequenceConfig(max_length=64),
        truncation=Truncation(k=8),
        precision="f32",
    )


def is_paid(server: ChatServer) -> bool:
    """Whether what is answered now is no probe."""
    return server.bodies[-1] in server.paid


def of_choice(**changes: Any) -> Spoil:
    """Change fields of the answer's choice."""
    return lambda answer: answer["choices"][0].update(changes)


def of_message(**changes: Any) -> Spoil:
    """Change fields of the answer's message."""
    return lambda answer: answer["choices"][0]["message"].update(changes)


def of_tokens(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change every generated token's entry."""

    def spoil(answer: dict[str, Any]) -> None:
        for entry in answer["choices"][0]["logprobs"]["content"]:
            change(entry)

    return spoil


def of_usage(**changes: Any) -> Spoil:
    """Change what is counted."""
    return lambda answer: answer["usage"].update(changes)


def of_every_entry(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change the entries of the most probable tokens, and the generated ones."""

    def spoil(entry: dict[str, Any]) -> None:
        for one in (entry, *entry["top_logprobs"]):
            change(one)

    return of_tokens(spoil)


def renormalised(entry: dict[str, Any]) -> None:
    """Nearly all mass on the entries that are given."""
    for rank, one in enumerate(entry["top_logprobs"]):
        one["logprob"] = 0.0 if rank == 0 else -99.0
    entry["logprob"] = 0.0


USELESS: dict[str, tuple[Spoil, str]] = {
    "filtered": (of_choice(finish_reason="content_filter"), "ended by content_filter"),
    "refusal": (of_message(content=None, refusal="I can't."), "it refuses to answer: \"I can't"),
    "tool": (
        of_choice(finish_reason="tool_calls", message={"content": None, "tool_calls": [{"id": 1}]}),
        "a call of a tool",
    ),
    "empty": (of_message(content=""), "it answers nothing"),
    "no log probs": (of_choice(logprobs=None), r"gives no log probs of its answer"),
    "empty log probs": (of_choice(logprobs={"content": []}), r"gives no log probs of its answer"),
    "no bytes": (of_every_entry(lambda e: e.pop("bytes")), r"gives no bytes of token 0"),
    "no top": (of_tokens(lambda e: e.update(top_logprobs=[])), "no top_logprobs for token 0"),
    "null": (of_tokens(lambda e: e.update(logprob=None)), "None as the log prob of token 0"),
    "null entry": (of_every_entry(lambda e: e.update(logprob=None)), "None as the log prob"),
    "unknown token": (
        of_tokens(lambda e: e.update(token="\ufffd", bytes=list("\ufffd".encode()))),
        "which is no id of teacher.tokenizer, or several",
    ),
    "other text": (of_message(content="something else"), "its message is 'something else'"),
    "hidden": (
        of_usage(completion_tokens=300, completion_tokens_details={"reasoning_tokens": 290}),
        "generated 300 tokens and gives log probs of 5: the others, hidden reasoning",
    ),
}


@pytest.mark.parametrize("name", USELESS)
def test_an_api_of_useless_answers_is_refused_at_connect(
    server: ChatServer, path: Path, name: str
) -> None:
    """By one clear error, before a prompt is paid."""
    server.length = 5  # of the probe too
    server.spoil, message = USELESS[name]
    with pytest.raises(Unavailable, match=message) as caught:
        describe_teacher(chat_config(path, server))
    assert server.url in str(caught.value) and "\n" not in str(caught.value)
    assert not server.paid


@pytest.mark.parametrize("name", USELESS)
def test_a_useless_answer_is_rejected_by_name(
    server: ChatServer, job: DumpConfig, name: str
) -> None:
    """The others are scored; nobody asks for it again."""
    spoil, message = USELESS[name]

    def third(answer: dict[str, Any]) -> None:
        if len(server.paid) == 3 and is_paid(server):
            spoil(answer)

    server.spoil = third
    config = change(job, "teacher.requests", 1)
    manifest = dump(config)
    assert verify(config.output).problems == ()
    (rejected,) = manifest.rejected
    assert rejected.sample_id == "p2"
    assert sum(scored.num_targets > 0 for scored in CacheReader(config.output)) == 5
    rows = {r["id"]: r for r in pq.read_table(Path(config.output, "generated")).to_pylist()}
    assert rows["p2"]["problem"] in rejected.reason and re.search(message, rejected.reason)
    assert len(server.paid) == 6


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"spoil": of_tokens(renormalised)}, "renormalises"),
        ({"names": ["other"]}, r"no chat completions of tiny.*does not exist"),
        ({"limit_name": "most"}, "refuses a chat completion with log probs.*Unrecognized"),
        ({"limit": 0}, "refuses a chat completion with log probs.*at most 0"),
        ({"spoil": lambda a: a.pop("choices")}, r"no choices\[0\].message"),
        (
            {"spoil": of_tokens(lambda e: [o.update(bytes=[0xFF]) for o in e["top_logprobs"][1:]])},
            "has another tokenizer than teacher.tokenizer",
        ),
    ],
)
def test_an_api_that_cannot_be_a_teacher_is_refused(
    server: ChatServer, path: Path, attributes: dict[str, Any], message: str
) -> None:
    """At connect, naming the URL and what is wrong."""
    for name, value in attributes.items():
        setattr(server, name, value)
    with pytest.raises(Unavailable, match=message):
        describe_teacher(chat_config(path, server))


@pytest.mark.parametrize("limit", [1, 5, 19])
def test_the_limit_of_entries_is_found(server: ChatServer, job: DumpConfig, limit: int) -> None:
    """As many as the API gives are asked for, and a k beyond is refused."""
    server.limit = limit
    assert describe_teacher(job.teacher).max_entries == limit
    with pytest.raises(ValueError, match=f"gives at most {limit} entries per token: lower it"):
        dump(change(job, "truncation", Truncation(k=20)))
    assert not server.paid


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source.generate": GenerateConfig()}, "of what it generates alone.*source.generate.n"),
        ({"sequences.targets": "all"}, "makes targets of prompts"),
        ({"truncation": Truncation(k=21)}, "chat APIs give at most 20"),
        ({"temperatures": [1.0, 2.0]}, r"temperatures \[1.0, 2.0\] cannot be had"),
        ({"truncation": Truncation(method="topp", p=0.9)}, "method topp cannot be had"),
    ],
)
def test_what_no_chat_api_gives_is_refused_before_it_is_asked(
    server: ChatServer, job: DumpConfig, changes: dict[str, Any], message: str
) -> None:
    """Not a request is paid for it."""
    for name, value in changes.items():
        job = change(job, name, value)
    with pytest.raises(ValueError, match=message):
        dump(job)
    assert not server.bodies


def test_given_sequences_cannot_be_scored(server: ChatServer, job: DumpConfig) -> None:
    """Nor audited: the error says why."""
    dump(job)
    before = len(server.bodies)
    with pytest.raises(EngineError, match="can score nothing that is given"):
        audit(job.output, job.teacher, sample=2)
    assert len(server.bodies) == before
    with pytest.raises(EngineError, match="can score nothing that is given"):
        open_engine(
            job.teacher,
            "",
            vocab_size=V,
            truncation=Truncation(k=4),
            temperatures=(1.0,),
            max_length=9,
            tokenizer=build_chat_tokenizer(),
        )


def test_a_model_must_be_named(path: Path) -> None:
    """Hosted APIs list hundreds."""
    with pytest.raises(ValueError, match=r"api chat needs teacher.model"):
        chat_config(path, "http://unset", model="")


def test_useless_answers_stop_before_more_is_paid(server: ChatServer, job: DumpConfig) -> None:
    """Beyond max_rejected; what was answered is kept, and is enough with a larger one."""

    def filtered(answer: dict[str, Any]) -> None:
        if is_paid(server):
            of_choice(finish_reason="content_filter")(answer)

    server.spoil = filtered
    config = change(job, "teacher.requests", 1)
    with pytest.raises(TooManyRejected, match=r"4 of 4 answers .*max_rejected: 0.01 allows 3 of 6"):
        dump(config)
    assert len(server.paid) == 4
    with pytest.raises(TooManyRejected, match="4 of 4 answers"):
        dump(config)
    assert len(server.paid) == 4
    server.spoil = None
    manifest = dump(dataclasses.replace(config, max_rejected=0.7))
    assert len(server.paid) == 6 and manifest.totals.rejected == 4


def test_a_prompt_that_the_api_refuses_is_rejected(server: ChatServer, job: DumpConfig) -> None:
    """Too long for it, or against its rules: the others are answered."""
    server.failures.extend([None] * 8 + [400])
    server.reason = "Your prompt was flagged"
    manifest = dump(change(job, "teacher.requests", 1))
    (rejected,) = manifest.rejected
    assert "status 400" in rejected.reason and "was flagged" in rejected.reason


def test_too_few_entries_with_an_id(server: ChatServer, job: DumpConfig) -> None:
    """A k near the API's limit has no entries to spare: the record is rejected, and told why."""

    def second(answer: dict[str, Any]) -> None:
        if len(server.paid) == 2 and is_paid(server):
            entry = answer["choices"][0]["logprobs"]["content"][0]
            next(o for o in entry["top_logprobs"] if o["token"] != entry["token"])["bytes"] = [0xFF]

    server.spoil = second
    manifest = dump(change(change(job, "truncation", Truncation(k=20)), "teacher.requests", 1))
    (rejected,) = manifest.rejected
    assert "19 of 20 entries" in rejected.reason and "lower truncation.k" in rejected.reason


def build_pieces(**options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of pieces: single bytes for what is no token, a sign for the space."""
    vocab = {"<s>": 0, "<0x41>": 1, "<0xE9>": 2, "A": 3, "\u2581the": 4, "the": 5, "\u00e9": 6}
    vocab |= {"\u2581a": 7, " a": 8}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab, [], byte_fallback=True, unk_token="<s>"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if options.get("strips"):
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_bytes_to_ids_of_pieces() -> None:
    """A byte token stands for its byte only where no other has it; spaces tell pieces apart."""
    ids = TokenIds(build_pieces(), 9)
    assert ids.keeps_spaces
    expected = {b"A": 3, b"\xe9": 2, b" the": 4, b"the": 5, "\u00e9".encode(): 6, b"<s>": 0}
    assert {data: ids.id_of(data) for data in expected} == expected
    assert ids.id_of(b"B") is None and ids.id_of("\ufffd".encode()) is None
    assert not TokenIds(build_pieces(strips=True), 9).keeps_spaces


def test_bytes_of_two_ids_are_of_none() -> None:
    """They cannot be told apart."""
    ids = TokenIds(build_pieces(), 9)
    assert ids.id_of(b" a") is None and ids.text_of([7]) == ids.text_of([8]) == " a"
