"""Stock servers that answer wrongly: found out at connect, or by the sequence, and said in a line.

No number of such an answer reaches a cache. `tests.support.stock_servers` has the servers.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decant.schemas import Truncation
from decant.storage import CacheReader, verify
from decant.teacher_dump import DumpConfig, SourceConfig, dump
from decant.teacher_dump.engines import open_engine
from decant.teacher_dump.engines.openai import answers, fingerprint
from decant.teacher_dump.engines.openai.answers import AnswerError, NotFinite, TokenEntries
from decant.teacher_dump.engines.openai.api import Form
from decant.teacher_dump.engines.openai.engine import describe
from decant.teacher_dump.engines.openai.sglang import SglangApi
from decant.teacher_dump.engines.openai.token_texts import TokenTexts
from decant.teacher_dump.engines.openai.vllm import VllmApi
from decant.teacher_dump.engines.remote import client as remote_client
from decant.teacher_dump.engines.seam import SequenceError, Unavailable
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.teacher import describe_teacher
from tests.support import models
from tests.support.stock_servers import (
    KINDS,
    StockServer,
    V,
    build_tokenizer,
    save_teacher,
    stock_config,
    stock_server,
)

Answer = dict[str, Any]
TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher of which every token has a text of its own."""
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder)
    return folder


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, path: Path) -> Iterator[StockServer]:
    """A server of each kind."""
    with stock_server(request.param, path) as found:
        yield found


@pytest.fixture
def vllm(path: Path) -> Iterator[StockServer]:
    """One of vLLM's kind."""
    with stock_server("vllm", path) as found:
        yield found


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long between two attempts."""
    monkeypatch.setattr(remote_client, "FIRST_PAUSE", 0.001)


def opened(path: Path, server: StockServer) -> Any:
    """An engine for the top 8 of this server's teacher."""
    return open_engine(
        stock_config(path, server),
        "",
        vocab_size=V,
        truncation=Truncation(k=8),
        temperatures=(1.0,),
        max_length=100,
        tokenizer=TOKENIZER,
    )


def sequence_of(text: str = "the quick brown fox jumps over a lazy dog") -> TokenSequence:
    """A text behind a beginning token; the first target is the text's second token."""
    ids = np.array([0, *TOKENIZER(text)["input_ids"]], np.int32)
    return TokenSequence("sample-0", ids, np.arange(len(ids)) > 1)


# At connect.


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"shift": 1}, "its rows are shifted by one"),
        ({"shift": -1}, "its rows are shifted by one"),
        ({"renormalises": True}, r"renormalise"),
        ({"adds_token": True}, r"read \d+ tokens of \d+ sent: the server adds tokens"),
        ({"cuts": True}, r"(read|gives log probs of) \d+ (tokens )?of \d+"),
        ({"context": 10}, "maximum context length is 10"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_server_is_looked_at_before_it_is_believed(
    server: StockServer, path: Path, attributes: dict[str, Any], message: str
) -> None:
    """Whichever kind it is, what is wrong is named with its URL."""
    for name, value in attributes.items():
        setattr(server, name, value)
    with pytest.raises(Unavailable, match=message) as caught:
        describe(stock_config(path, server), TOKENIZER, V)
    assert server.url in str(caught.value)


@pytest.mark.parametrize("has_tokenize", [True, False], ids=["tokenize", "texts"])
@pytest.mark.parametrize("kind", ["vllm", "sglang", "ids"])
def test_another_tokenizer_is_refused(
    kind: str, has_tokenize: bool, path: Path, tmp_path: Path
) -> None:
    """By the server's own, or by the texts of its tokens."""
    other = build_tokenizer()
    data = json.loads(other.backend_tokenizer.to_str())
    vocab = data["model"]["vocab"]
    names = sorted(vocab, key=lambda token: vocab[token])
    data["model"]["vocab"] = {token: 2 + (i + 40) % (V - 2) for i, token in enumerate(names[2:])}
    data["model"]["vocab"] |= {"<s>": 0, "</s>": 1}
    other.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    attributes = {"has_tokenize": has_tokenize, "limit": 5}
    with stock_server(kind, path, **attributes) as server:
        if kind == "ids":  # whose texts are looked at where it does not name ids
            server.spoil = as_texts(server)
        with pytest.raises(Unavailable, match="tokenizer"):
            describe_teacher(stock_config(tmp_path, server))


def as_texts(server: StockServer) -> Callable[[Answer], None]:
    """An answer's ids as a server writes them that does not know how to name ids."""

    def text(name: str) -> str:
        return server.tokenizer.decode([int(name.removeprefix("token_id:"))])

    def spoil(answer: Answer) -> None:
        given = answer["choices"][0]["logprobs"]
        given["tokens"] = [text(t) if t.startswith("token_id:") else t for t in given["tokens"]]
        given["top_logprobs"] = [
            row and {text(t): x for t, x in row.items() if t.startswith("token_id:")}
            for row in given["top_logprobs"]
        ]

    return spoil


def test_texts_of_tokens_are_read_where_a_server_names_no_ids(path: Path) -> None:
    """Each text is the one of one id."""
    with stock_server("ids", path) as server:
        server.spoil = as_texts(server)
        engine = opened(path, server)
        assert len(list(engine.score([sequence_of()], 0))) == 1
        engine.close()


@pytest.mark.parametrize("key", ["logprobs", "prompt_logprobs"])
def test_a_server_without_log_probs_of_prompts(vllm: StockServer, path: Path, key: str) -> None:
    """Each way that was tried is named with what came of it."""

    def spoil(answer: Answer) -> None:
        answer["choices"] = [{"text": "x", key: None}]

    vllm.spoil = spoil
    with pytest.raises(Unavailable, match=r"does not give log probs.*vllm: .*sglang: .*compl"):
        describe(stock_config(path, vllm), TOKENIZER, V)


@pytest.mark.parametrize("text", ["<html>hello</html>", "[]", "{}", "null", '"x"', '{"data": 3}'])
def test_something_else_that_speaks_http(vllm: StockServer, path: Path, text: str) -> None:
    """Whatever JSON it is, or none."""
    value: Any = text if text.startswith("<") else json.loads(text)
    vllm._answer = lambda body: (200, value)  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="does not give log probs of a prompt's tokens"):
        describe(stock_config(path, vllm), TOKENIZER, V)


# By the sequence.


def entry(answer: Answer, token: int) -> dict[str, Any]:
    """What vLLM's kind says of a token."""
    row: dict[str, Any] = answer["choices"][0]["prompt_logprobs"][token]
    return row


def set_first(answer: Answer, value: Any) -> None:
    next(iter(entry(answer, 4).values()))["logprob"] = value


SPOILS: dict[str, tuple[Callable[[Answer], Any], str]] = {
    "NaN": (lambda a: set_first(a, math.nan), "gives NaN or infinite logits for sample sample-0"),
    "null": (lambda a: set_first(a, None), "gives NaN or infinite logits for sample sample-0"),
    "inf": (lambda a: set_first(a, math.inf), "gives NaN or infinite logits for sample sample-0"),
    "text": (lambda a: set_first(a, "-1.0"), "gives '-1.0' as a log prob of token 4"),
    "logits": (lambda a: set_first(a, 3.5), "gives 3.5 for token 4, above 0: logits, not log"),
    "fewer": (
        lambda a: [entry(a, 4).popitem() for _ in range(3)],
        r"gives \d of 8 entries for token 4",
    ),
    "nothing": (
        lambda a: a["choices"][0]["prompt_logprobs"].__setitem__(4, None),
        "gives no log probs for token 4",
    ),
    "other ids": (
        lambda a: a["choices"][0]["prompt_token_ids"].__setitem__(4, 1),
        "read token 4 as id 1, sent was",
    ),
    "fewer tokens": (
        lambda a: a["choices"][0]["prompt_logprobs"].pop(),
        "gives prompt_logprobs of",
    ),
    "beyond": (
        lambda a: entry(a, 4).__setitem__("130", {"logprob": -0.5}),
        "gives id 130 for token 4, teacher.tokenizer has ids below 130",
    ),
    "too much": (
        lambda a: [e.__setitem__("logprob", -0.5) for e in entry(a, 4).values()],
        r"for token 4 sum to \d.\d+: they are renormalised",
    ),
}


@pytest.mark.parametrize("spoiled", SPOILS)
def test_a_sequence_is_refused_by_its_name(vllm: StockServer, path: Path, spoiled: str) -> None:
    """Those before it are given, those behind it can be asked for."""
    engine = opened(path, vllm)
    spoil, message = SPOILS[spoiled]
    good, bad = sequence_of(), sequence_of("away from hunters in deep woods and runs")

    def only_bad(answer: Answer) -> None:
        if answer["choices"][0]["prompt_token_ids"] == bad.input_ids.tolist():
            spoil(answer)

    vllm.spoil = only_bad
    found = []
    with pytest.raises(SequenceError, match=message) as caught:
        for scored in engine.score([good, bad, good], 0):
            found.append(scored)
    assert caught.value.index == len(found) == 1
    assert len(list(engine.score([good], 2))) == 1
    engine.close()


def test_minus_infinity_is_a_log_prob(vllm: StockServer, path: Path) -> None:
    """It is floored, so that what is stored stays finite."""
    engine = opened(path, vllm)

    def spoil(answer: Answer) -> None:
        rows = answer["choices"][0]["prompt_logprobs"]
        last = min(rows[4].values(), key=lambda e: e["logprob"])
        last["logprob"] = -math.inf

    vllm.spoil = spoil
    (scored,) = engine.score([sequence_of()], 0)
    assert np.isfinite(scored.logprobs).all() and np.isfinite(scored.label_logprob).all()
    engine.close()


def test_a_text_that_the_server_cuts_otherwise(path: Path) -> None:
    """A server of texts reads its own tokens, which must be the ones that are scored."""
    with stock_server("text", path) as server:
        engine = opened(path, server)
        ids = np.array([0, *TOKENIZER.convert_tokens_to_ids(["t", "h", "e"])], np.int32)
        sequence = TokenSequence("sample-0", ids, np.arange(4) > 1)
        with pytest.raises(SequenceError, match=r"sample-0, asked of a server: it read \d tokens"):
            list(engine.score([sequence], 0))
        without = sequence_of().input_ids[1:]
        sequence = TokenSequence("sample-0", without, np.arange(len(without)) > 1)
        with pytest.raises(SequenceError, match=r"puts id 0 before every text.*add_bos"):
            list(engine.score([sequence], 0))
        good = sequence_of()
        first = dataclasses.replace(good, is_target=np.arange(len(good.input_ids)) > 0)
        with pytest.raises(SequenceError, match="gives no log probs for token 1"):
            list(engine.score([first], 0))
        engine.close()


def test_a_dump_lists_what_a_server_refuses(vllm: StockServer, path: Path, tmp_path: Path) -> None:
    """A context too short for one sequence, and no other is lost."""
    lines = [{"id": f"t{i}", "text": models.SENTENCE} for i in range(6)]
    lines[3]["text"] = " ".join([models.SENTENCE] * 2)
    records = tmp_path / "texts.jsonl"
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    vllm.context = 64
    config = DumpConfig(
        output=str(tmp_path / "cache"),
        teacher=stock_config(path, vllm),
        source=SourceConfig(path=str(records)),
        truncation=Truncation(k=8),
    )
    with pytest.raises(ValueError, match=r"max_length is 1024, but tiny .r. takes at most 63 pos"):
        dump(config)
    real, vllm._answer = (
        vllm._answer,
        lambda b: (  # type: ignore[method-assign]
            (400, {"error": {"message": "maximum context length"}})
            if len(b["prompt"]) > 60
            else real(b)
        ),
    )
    vllm.context = 4096
    manifest = dump(config)
    assert verify(config.output).problems == ()
    assert [r.sample_id for r in manifest.rejected] == ["t3"]
    assert "maximum context length" in manifest.rejected[0].reason
    assert len(CacheReader(config.output)) == 6


# Parts.


def test_two_probes_of_one_teacher() -> None:
    """Rounding is forgiven, a shift of every number is not, nor another length."""
    values = np.linspace(-12, -1, 40)
    one = fingerprint.fingerprint_of(values.tolist())
    noise = np.random.default_rng(0).normal(0, 0.02, 40)
    assert fingerprint.same_teacher(one, fingerprint.fingerprint_of((values + noise).tolist()))
    assert not fingerprint.same_teacher(one, fingerprint.fingerprint_of((values - 0.1).tolist()))
    assert not fingerprint.same_teacher(one, fingerprint.fingerprint_of(values[1:].tolist()))
    assert not fingerprint.same_teacher(one, "sha256:00")
    assert fingerprint.same_teacher("sha256:00", "sha256:00")


def test_texts_that_are_not_of_one_id() -> None:
    """Half characters have none; of a text of several ids none is taken."""
    tokenizer = models.build_tokenizer()  # with a token for every byte
    texts = TokenTexts(tokenizer, len(tokenizer))
    quick = tokenizer.convert_tokens_to_ids("\u0120qu")
    assert texts.id_of(" qu") == quick and texts.fits("qu", quick)
    assert texts.id_of("") is None and texts.id_of("\ufffd") is None
    assert texts.id_of("token_id:7") == 7
    assert texts.text_of(tokenizer("brown \u00e9")["input_ids"]) == "brown \u00e9"
    assert texts.text_of(tokenizer("\u00e9")["input_ids"][:1]) is None


def test_sglang_answers_of_its_documented_form() -> None:
    """The first token has no log prob and no entries; ids stand second."""
    info = {
        "input_token_logprobs": [[None, 5, None], [-0.5, 7, None], [-2.0, 9, None]],
        "input_top_logprobs": [
            None,
            [[-0.5, 7, None], [-1.5, 3, None]],
            [[-0.1, 4, None], [-3.0, 6, None]],
        ],
    }
    api, ids = SglangApi(), np.array([5, 7, 9], np.int32)
    rows = api.rows(Form(model=""), {"text": "", "meta_info": info}, ids)
    with pytest.raises(AnswerError, match=r"leaves token 2 itself, at -2.0000, out of the most"):
        answers.top_entries(rows, np.array([True, True]), 2, 10)
    top = answers.top_entries(rows, np.array([True, False]), 2, 10)
    assert top.token_ids[0].tolist() == [7, 3]
    np.testing.assert_allclose(top.label_logprob[0], -0.5)
    with pytest.raises(AnswerError, match="read token 1 as id 7, sent was 8"):
        api.rows(Form(model=""), {"meta_info": info}, np.array([5, 8, 9], np.int32))
    with pytest.raises(AnswerError, match="its answer has no meta_info"):
        api.rows(Form(model=""), {"text": ""}, ids)


def test_the_actual_token_is_one_entry_more() -> None:
    """Of vLLM come k + 1 entries where it is not among the top k; k are kept."""
    row = {"9": {"logprob": -4.0}, "1": {"logprob": -0.5}, "2": {"logprob": -1.5}}
    answer = {"choices": [{"prompt_logprobs": [None, row]}]}
    rows = VllmApi().rows(Form(model="m"), answer, np.array([3, 9], np.int32))
    top = answers.top_entries(rows, np.array([True]), 2, 10)
    assert top.token_ids.tolist() == [[1, 2]] and top.label_logprob.tolist() == [-4.0]


@pytest.mark.parametrize(
    ("top", "error", "message"),
    [
        ([(1, -0.5), (1, -0.6)], AnswerError, "gives id 1 twice"),
        ([(1, -0.5), (11, -0.6)], AnswerError, "gives id 11"),
        ([(1, -0.5), ("x", -0.6)], AnswerError, "names 'x'"),
        ([(1, -0.5), (2, True)], AnswerError, "gives True"),
        ([(1, -0.5), (2, math.nan)], NotFinite, "gives nan"),
        ([(1, -3.0), (2, -4.0)], AnswerError, "gives -2.0000 for token 1 itself and -4.0000"),
    ],
)
def test_entries_that_no_distribution_has(top: Any, error: type, message: str) -> None:
    """Each by the token it is about."""
    rows = [TokenEntries(token_id=2, logprob=-2.0, top=top)]
    with pytest.raises(error, match=message):
        answers.top_entries(rows, np.array([True]), 2, 10)
