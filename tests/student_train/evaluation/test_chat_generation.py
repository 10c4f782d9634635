"""Answers of a student that was trained on conversations: asked in the template of its cache."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from decant.storage import CacheReader
from decant.student_train import EvalConfig, GenerationConfig, train
from decant.student_train.evaluation.answers import Generation
from decant.student_train.evaluation.chat_prompts import ChatPrompts, chat_prompts
from decant.teacher_dump import DumpConfig, dump
from tests.support import models
from tests.support.dumps import change, save_records
from tests.support.trainings import config

ASKED = {"prompt": "the quick brown", "response": "fox jumps over a lazy dog"}
CHAT = [
    {"role": "user", "content": ASKED["prompt"]},
    {"role": "assistant", "content": ASKED["response"]},
]
OTHER = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def chats(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of conversations; never write to it."""
    folder = tmp_path_factory.mktemp("chats")
    records = [{"id": str(i), "messages": CHAT} for i in range(4)]
    source = save_records(folder / "records.jsonl", *records)
    settings = change(dump_config, "source.path", str(source))
    dump(dataclasses.replace(settings, output=str(folder / "cache")))
    return folder / "cache"


def of_tokenizer(tokenizer: Any, **options: Any) -> ChatPrompts:
    settings = {"template": "", "variables": {}, "date": "", "wraps_texts": True}
    return ChatPrompts(tokenizer=tokenizer, **settings | options)


def test_a_student_that_knows_the_conversation_by_heart_says_it(tmp_path: Path) -> None:
    """Asked in the template, from text and from messages; without it, it says something else.

    The answer ends with the token that ends a turn, which is not the tokenizer's end of a text.
    """
    tokenizer, student = models.build_tokenizer(), models.build_model("llama", seed=2)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids = torch.tensor([tokenizer(rendered, add_special_tokens=False).input_ids])
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(60):
        student(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = save_records(tmp_path / "asked.jsonl", ASKED, {"messages": CHAT})
    settings = GenerationConfig(path=str(path), max_new_tokens=30)
    chat = of_tokenizer(tokenizer)
    assert chat.ends() == (tokenizer.convert_tokens_to_ids("<|end|>"),)
    asked = Generation(settings, tokenizer, add_bos=False, seed=0, chat=chat)
    assert asked.metrics(student, Accelerator(cpu=True), tmp_path)["rougeL"] == 1.0
    said = [json.loads(line) for line in (tmp_path / "generations.jsonl").open()]
    assert [line["generated"] for line in said] == [CHAT[1:]] * 2
    assert [line["prompt"] for line in said] == [CHAT[:1]] * 2
    bare = save_records(tmp_path / "bare.jsonl", ASKED)
    settings = dataclasses.replace(settings, path=str(bare))
    without = Generation(settings, tokenizer, add_bos=False, seed=0)
    assert without.metrics(student, Accelerator(cpu=True))["rougeL"] < 1


def test_a_training_asks_as_its_cache_was_dumped(chats: Path, tmp_path: Path) -> None:
    """By itself, where the cache holds conversations; as text, if told to."""
    path = save_records(tmp_path / "asked.jsonl", ASKED)
    for prompts, expected in (("auto", CHAT[:1]), ("text", ASKED["prompt"])):
        generation = GenerationConfig(path=str(path), max_new_tokens=3, prompts=prompts)
        evaluation = EvalConfig(generation=generation)
        train(config(chats, tmp_path / prompts, steps=2, batch_size=2, eval=evaluation))
        (said,) = map(json.loads, (tmp_path / prompts / "generations.jsonl").open())
        assert said["prompt"] == expected


def test_the_template_must_be_that_of_the_cache(chats: Path, cache: Path, tmp_path: Path) -> None:
    """By its hash; a cache of texts asks nothing of it, and has no use for it by itself."""
    manifest, tokenizer = CacheReader(chats).manifest, models.build_tokenizer()
    settings = GenerationConfig(path="x")
    found = chat_prompts(settings, tokenizer, manifest, is_aligned=False)
    assert found is not None and found.wraps_texts
    other = models.build_tokenizer()
    other.chat_template = OTHER
    with pytest.raises(ValueError, match="dumped with another chat template"):
        chat_prompts(settings, other, manifest, is_aligned=False)
    own = chat_prompts(settings, other, manifest, is_aligned=True)  # which it was trained in
    assert own is not None and own.ids(CHAT[:1], {}) == other("[user]the quick brown").input_ids
    (tmp_path / "own.jinja").write_text(models.CHAT_TEMPLATE)
    named = dataclasses.replace(settings, chat_template=str(tmp_path / "own.jinja"))
    given = chat_prompts(named, other, manifest, is_aligned=False)
    assert given is not None and given.ids(CHAT[:1], {}) == found.ids(CHAT[:1], {})
    of_texts = chat_prompts(settings, tokenizer, CacheReader(cache).manifest, is_aligned=False)
    assert of_texts is not None and not of_texts.wraps_texts
    tokenizer.chat_template = None
    assert chat_prompts(settings, tokenizer, manifest, is_aligned=False) is None
    with pytest.raises(ValueError, match="the tokenizer has none: name its file"):
        chat = dataclasses.replace(settings, prompts="chat")
        chat_prompts(chat, tokenizer, manifest, is_aligned=False)


def test_variables_and_the_date_are_those_of_the_dump(tmp_path: Path) -> None:
    """What the template is told of every conversation, and of one."""
    template = (
        "{{ mood }} {{ strftime_now('%d %b') }} {{ tools is none }} {{ messages[0].content }}"
    )
    tokenizer = models.build_tokenizer()
    chat = of_tokenizer(tokenizer, template=template, variables={"mood": "calm"}, date="2026-01-31")
    assert tokenizer.decode(chat.ids(CHAT[:1], {})) == "calm 31 Jan True the quick brown"
    loud = chat.ids(CHAT[:1], {"chat_template_kwargs": {"mood": "loud"}, "tools": [{"a": 1}]})
    assert tokenizer.decode(loud) == "loud 31 Jan False the quick brown"


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    """Messages without a template, or that it refuses; messages that end with an answer."""
    tokenizer = models.build_tokenizer()
    settings = GenerationConfig(path=str(save_records(tmp_path / "a.jsonl", {"messages": CHAT})))
    with pytest.raises(ValueError, match=r"a\.jsonl record 0 \(from 0\) holds messages, for which"):
        Generation(settings, tokenizer, add_bos=False, seed=0)
    refusing = of_tokenizer(tokenizer, template="{{ raise_exception('no users') }}")
    with pytest.raises(ValueError, match=r"record 0 .*cannot render it: no users"):
        Generation(settings, tokenizer, add_bos=False, seed=0, chat=refusing)
    for record, match in (
        ({"messages": CHAT[:1]}, "end without the assistant's"),
        ({"messages": []}, "line 1: expected a JSON object with prompt and response, or messages"),
        ({"prompt": CHAT, "response": "a"}, "of which the last is not the assistant's"),
    ):
        path = save_records(tmp_path / "b.jsonl", record)
        with pytest.raises(ValueError, match=match):
            Generation(
                dataclasses.replace(settings, path=str(path)), tokenizer, add_bos=False, seed=0
            )
    with pytest.raises(ValueError, match="'always' is not auto, chat or text"):
        GenerationConfig(path="x", prompts="always")
    with pytest.raises(ValueError, match="no effect with prompts: text"):
        GenerationConfig(path="x", prompts="text", chat_template="y")
