"""The answers of a chat API: asked for once, kept as they come, and read again to be scored.

Every answer is paid. Until its part is published it lies in a file of its own, so that an
interruption loses what was in flight alone, and nothing that was answered is asked again.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from decant.schemas.strict import from_json
from decant.storage import Store
from decant.storage.cache import paths
from decant.storage.files.sealed import publish_json, read_json
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines.openai.chat_answers import UNKNOWN, Answer, Asked
from decant.teacher_dump.engines.openai.chat_client import ChatTeacher
from decant.teacher_dump.engines.openai.chat_engine import ChatEngine
from decant.teacher_dump.engines.seam import Prompt, Response
from decant.teacher_dump.inputs.messages import TARGET_FIELDS
from decant.teacher_dump.inputs.records import Record, TokenSequence
from decant.teacher_dump.job.isolate import TooManyRejected, allowed_rejections
from decant.teacher_dump.job.response_files import part_names, read_part
from decant.teacher_dump.teacher import Teacher

log = logging.getLogger(__name__)

HELD_PARTS = 2
"""Of answers that are scored, in memory."""
KWARGS = "chat_template_kwargs"
ENTRIES = ("logprobs", "top_ids", "top_logprobs", "unnamed_mass", "num_unnamed")


class ChatSampler:
    """A chat API that answers, and what it has answered."""

    def __init__(
        self, config: DumpConfig, teacher: Teacher, store: Store, begin: Callable[[], None]
    ) -> None:
        """Connect. `begin` is called before the first answer is kept. Raises EngineError."""
        generate = config.source.generate
        self._config, self._teacher, self._store, self._begin = config, teacher, store, begin
        kwargs = config.sequences.chat_template_kwargs
        self._chat = ChatTeacher(
            config.teacher,
            teacher.tokenizer,
            teacher.shared_vocab_size,
            body={"chat_template_kwargs": kwargs} if kwargs else {},
            temperature=generate.temperature,
            top_p=generate.top_p,
        )

    def answers(self, part: int, wanted: Sequence[tuple[Record, Prompt]]) -> list[Answer]:
        """One answer to each prompt of a part; those that are kept are not asked for again.

        Raises TooManyRejected where more than max_rejected of them are of no use.
        """
        folder = f"{paths.ANSWERS}/part-{part:06d}"
        self._store.remove_temporaries(folder)
        kept = set(self._store.names(folder))
        names = [f"{index:06d}.json" for index in range(len(wanted))]
        found: dict[int, Answer] = {
            index: from_json(Answer, read_json(self._store, f"{folder}/{name}"), name)
            for index, name in enumerate(names)
            if name in kept
        }
        if found:
            log.info("part %d: %d of %d answers are there", part + 1, len(found), len(wanted))
        self._refuse_problems(found, wanted)
        missing = [index for index in range(len(wanted)) if index not in found]
        asked = [self._asked(*wanted[index]) for index in missing]
        for place, answer in self._chat.answers(asked):
            index = missing[place]
            self._begin()
            publish_json(self._store, f"{folder}/{names[index]}", dataclasses.asdict(answer))
            found[index] = answer
            if answer.problem:
                log.warning("%s is of no use: %s", wanted[index][1].name, answer.problem)
                self._refuse_problems(found, wanted)
        answers = [found[index] for index in range(len(wanted))]
        self._tell(answers, wanted)
        return answers

    def forget(self, part: int) -> None:
        """Remove the answers of a part that is published."""
        self._store.remove_folder(f"{paths.ANSWERS}/part-{part:06d}")

    def close(self) -> None:
        """Drop all connections."""
        self._chat.close()

    def _asked(self, record: Record, prompt: Prompt) -> Asked:
        generate = self._config.source.generate
        fields = {name: _parsed(record.fields.get(name)) for name in ("tools", KWARGS)}
        fields[KWARGS] = {
            **self._config.sequences.chat_template_kwargs,
            **(fields[KWARGS] or {}),
        }
        said = [_said(message) for message in record.fields["messages"]]
        return Asked(
            body={"messages": said} | {name: value for name, value in fields.items() if value},
            max_new_tokens=prompt.max_new_tokens,
            seed=prompt.seed,
            temperature=generate.temperature,
            top_p=generate.top_p,
        )

    def _refuse_problems(
        self, found: dict[int, Answer], wanted: Sequence[tuple[Record, Prompt]]
    ) -> None:
        """Raise TooManyRejected before more is paid for answers that are of no use."""
        bad = [index for index, answer in found.items() if answer.problem]
        allowed = allowed_rejections(len(wanted), self._config.max_rejected)
        if len(bad) > allowed:
            raise TooManyRejected(
                f"{len(bad)} of {len(found)} answers of the chat API are of no use, max_rejected: "
                f"{self._config.max_rejected} allows {allowed} of {len(wanted)}; the last of them, "
                f"{wanted[bad[-1]][1].name}: {found[bad[-1]].problem}. What was answered is kept: "
                "raise max_rejected to go on, or delete "
                f"{self._store.path(paths.GENERATED)} to ask anew"
            )

    def _tell(self, answers: list[Answer], wanted: Sequence[tuple[Record, Prompt]]) -> None:
        """Log what is not wrong, but unlike what is expected."""
        good = [index for index, answer in enumerate(answers) if not answer.problem]
        other = [
            index
            for index in good
            if answers[index].read_tokens not in (0, len(wanted[index][1].token_ids))
        ]
        if other:
            at = other[0]
            log.warning(
                "of %d prompts, %d were read as another number of tokens than the chat template of "
                "teacher.tokenizer gives (%s: %d there, %d here): the API's template is another "
                "one, or adds a system prompt or a date",
                *(len(good), len(other), wanted[at][1].name),
                *(answers[at].read_tokens, len(wanted[at][1].token_ids)),
            )
        tokenizer = self._teacher.tokenizer
        uneven = sum(not _is_own(tokenizer, answers[index]) for index in good)
        if 2 * uneven > len(good):
            log.warning(
                "%d of %d answers are cut into other tokens than teacher.tokenizer cuts their text "
                "into, expected of few: is it the teacher's?",
                *(uneven, len(good)),
            )
        entries = sum(len(top) for index in good for top in answers[index].top_ids)
        unnamed = sum(answers[index].num_unnamed for index in good)
        if unnamed:
            log.info(
                "%d of %d entries have no one id in teacher.tokenizer and count as tail",
                *(unnamed, entries + unnamed),
            )


def as_response(
    answer: Answer, teacher: Teacher, prompt: Prompt, stop: tuple[int, ...]
) -> Response:
    """The answer by its ids; by those of its text where it has a problem and will be rejected."""
    ids: Sequence[int] = answer.token_ids
    if answer.problem:
        assert teacher.tokenizer is not None
        ids = teacher.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        ids = (list(ids) or list(stop[:1]) or [0])[: prompt.max_new_tokens]
    return Response(token_ids=np.array(ids, np.int32), finish_reason=answer.finish_reason)


def chat_fields(answer: Answer) -> dict[str, Any]:
    """What the row of an answer has beside those of other responses."""
    return {
        "problem": answer.problem or None,
        "model": answer.model,
        "system_fingerprint": answer.system_fingerprint or None,
        **{name: getattr(answer, name) for name in ENTRIES},
    }


def target_mask(row: dict[str, Any]) -> list[int]:
    """1 for each response token whose log prob is known: an API may not tell improbable ones."""
    if row.get("problem") is not None or row.get("logprobs") is None:
        return [1] * len(row["response_ids"])
    return [int(value > UNKNOWN) for value in row["logprobs"]]


def open_kept_answers(config: DumpConfig, teacher: Teacher) -> ChatEngine:
    """The engine that scores the answers in the output by what is kept of them."""
    return ChatEngine(
        KeptAnswers(Store(config.output)),
        vocab_size=teacher.shared_vocab_size,
        truncation=config.truncation,
        temperatures=tuple(config.temperatures),
    )


class KeptAnswers:
    """The answers in the parts of a cache, by sample."""

    def __init__(self, store: Store) -> None:
        """Read the names of the samples. Raises FormatError if a part is damaged."""
        self._store = store
        self._at: dict[str, list[tuple[str, int]]] = {}
        for name in part_names(store):
            for row, sample_id in enumerate(read_part(store, name).column("id").to_pylist()):
                self._at.setdefault(sample_id, []).append((name, row))
        self._part = functools.lru_cache(HELD_PARTS)(functools.partial(read_part, store))

    def __call__(self, sequence: TokenSequence) -> Answer | None:
        """What is kept of the answer that a sequence is; None if it is none of them."""
        rows = [
            self._part(name).slice(row, 1).to_pylist()[0]
            for name, row in self._at.get(sequence.sample_id, [])
        ]
        ids = sequence.input_ids.tolist()
        same = [row for row in rows if row["prompt_ids"] + row["response_ids"] == ids]
        for row in same or rows:
            problem = row["problem"] or ""
            entries = {name: row[name] for name in ENTRIES}
            return Answer(
                text=row["response"],
                finish_reason=row["finish_reason"],
                model=row["model"],
                problem=problem,
                token_ids=() if problem else tuple(row["response_ids"]),
                **entries,
            )
        return None


def _said(message: dict[str, Any]) -> dict[str, Any]:
    """A message as APIs take it: without marks of targets, arguments of tools as JSON."""
    kept = {name: value for name, value in message.items() if name not in TARGET_FIELDS}
    calls = _parsed(kept.get("tool_calls"))
    if not isinstance(calls, list):
        return kept
    said = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and not isinstance(function.get("arguments"), str):
            arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": arguments}}
        said.append(call)
    return {**kept, "tool_calls": said}


def _parsed(value: Any) -> Any:
    """What a field holds, also where it is written as JSON."""
    return json.loads(value) if isinstance(value, str) and value else value


def _is_own(tokenizer: Any, answer: Answer) -> bool:
    """Whether the ids are those that the tokenizer makes of their text, its end token aside."""
    special = set(tokenizer.all_special_ids)
    ids = [index for index in answer.token_ids if index not in special]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return bool(tokenizer(text, add_special_tokens=False)["input_ids"] == ids)
