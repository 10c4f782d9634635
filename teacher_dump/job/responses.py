"""Responses of the teacher's own: sampled once, kept in the cache, then scored as any given ids.

A part is one Parquet file of the responses to `part_prompts` consecutive prompts: finished or
absent, and a function of the prompts, the settings and the part's number, so that an interrupted
sampling goes on as if nothing had happened. Nothing is tokenised again: the ids that were sampled
are those that are scored.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from decant.schemas import FormatError, tokenizer_fingerprint
from decant.schemas.strict import canonical
from decant.schemas.tokenizer import OLDER_SCHEME, SCHEME
from decant.storage import Store
from decant.storage.cache import paths
from decant.storage.files.sealed import publish_json, read_json
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import EngineError
from decant.teacher_dump.engines.opening import GENERATING_ENGINES, open_generator
from decant.teacher_dump.engines.seam import Generator, Prompt, Response, Sampling
from decant.teacher_dump.inputs.kinds import as_conversation, as_question
from decant.teacher_dump.inputs.records import Record, SourceError
from decant.teacher_dump.inputs.sequences import chat_template_text, make_encoder
from decant.teacher_dump.inputs.sources import iter_records
from decant.teacher_dump.job.chat_sampler import (
    ChatSampler,
    as_response,
    chat_fields,
    target_mask,
)
from decant.teacher_dump.job.response_files import (
    conversation_of,
    part_names,
    publish_part,
    rows_of,
)
from decant.teacher_dump.progress import progress
from decant.teacher_dump.teacher import Teacher, stable_identity

log = logging.getLogger(__name__)

ENCODED_RECORDS = 256
"""Prompts that are tokenised together."""
NO_PART_OF_PROMPTS = (
    *("window_head", "chat_template", "max_unrenderable", "accept_rendering"),
    *("keep_messages", "target_share"),
)
"""Settings of sequences that change no prompt, or by their content alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A record that is to be answered."""

    record: Record
    number: int
    """Of the prompt in the source, from 0."""
    token_ids: NDArray[np.int32]
    room: int
    """Tokens that the response may have; without any the prompt is left out."""


class GenerationChanged(ValueError):
    """The output holds responses that were sampled from something else."""


def refuse_generation(config: DumpConfig, teacher: Teacher) -> None:
    """Raise ValueError if responses are asked for that cannot be sampled; reads nothing."""
    if not config.source.generate.n:
        return
    if config.teacher.engine not in GENERATING_ENGINES:
        raise EngineError(
            f"source.generate cannot sample with teacher.engine {config.teacher.engine}: set one "
            f"of {GENERATING_ENGINES}"
        )
    if teacher.tokenizer is None:
        raise ValueError("source.generate keeps text, so it needs a tokenizer: teacher.tokenizer")
    if config.sequences.packing != "none":
        raise ValueError("source.generate answers one prompt at a time: set packing to none")
    if Store(config.output).exists(paths.MANIFEST):  # older ones may have been started so
        return
    for option, value, why in (
        ("overlong", "split", "a prompt is answered whole or left out"),
        ("add_eos", False, "a response ends with the end token that was drawn, if any"),
        ("empty", "drop", "an empty prompt is an error"),
    ):
        if getattr(config.sequences, option) == value:
            shown = str(value).lower()
            raise ValueError(
                f"sequences.{option}: {shown} has no effect with source.generate, where {why}: "
                "leave it out"
            )


def describe_generation(
    config: DumpConfig, teacher: Teacher, source: dict[str, Any]
) -> dict[str, Any]:
    """The description of the source, whose fingerprint now also covers what responses depend on.

    Where the output holds responses that are known by the older fingerprint of their tokenizer, it
    is that one.
    """
    generate = dataclasses.asdict(config.source.generate)
    generate |= {name: float(generate[name]) for name in ("temperature", "top_p")}
    settings = {
        "prompts": source["fingerprint"],
        "teacher": stable_identity(teacher),
        "dtype": teacher.info.dtype,
        "engine": config.teacher.engine,
        "stop_ids": list(stop_ids(teacher)),
        "sequences": {
            name: value
            for name, value in dataclasses.asdict(config.sequences).items()
            if name not in NO_PART_OF_PROMPTS
        },
        "chat_template": chat_template_text(config.sequences)
        or getattr(teacher.tokenizer, "chat_template", None),
        **generate,
        **({"api": config.teacher.api} if config.teacher.is_chat else {}),
    }
    store = Store(config.output)
    known = None
    if store.exists(paths.GENERATION):
        known = read_json(store, paths.GENERATION).get("fingerprint")
    fingerprint = ""
    for scheme in (OLDER_SCHEME, SCHEME):
        settings["tokenizer"] = tokenizer_fingerprint(teacher.tokenizer, like=scheme)
        fingerprint = xxhash.xxh3_128(canonical(settings)).hexdigest()
        if fingerprint == known:
            break
    return {**source, "fingerprint": fingerprint, "generate": generate}


def sampled_records(
    config: DumpConfig, teacher: Teacher, store: Store, fingerprint: str
) -> Iterator[Record]:
    """Every response as a record of `input_ids` and `loss_mask`; samples those that are missing.

    `fingerprint` is that of `describe_generation`. Raises GenerationChanged if the output holds
    responses of another one.
    """
    _refuse_others(store, fingerprint)
    _sample_missing(config, teacher, store, fingerprint)
    everything = config.sequences.targets == "all"
    for where, fields in rows_of(store):
        prompt, response = fields["prompt_ids"], fields["response_ids"]
        mask = [int(everything)] * len(prompt) + target_mask(fields)
        ready = {
            "input_ids": prompt + response,
            "loss_mask": mask,
            "attention_mask": [1] * len(mask),  # a padding token that was drawn is not padding
        }
        yield Record(fields["id"], ready, where, conversation_of(fields, where, everything))


def questions(
    config: DumpConfig, teacher: Teacher, records: Iterable[Record] | None = None
) -> Iterator[Question]:
    """The prompts of the source, or of `records`, those without room for a response included.

    Raises SourceError for a bad record, and for one without room if `sequences.overlong` is error.
    """
    settings = dataclasses.replace(config.sequences, targets="all", packing="none", add_eos=False)
    encode = make_encoder(settings, teacher.tokenizer)
    given = map(as_question, iter_records(config.source) if records is None else records)
    if config.teacher.is_chat:
        given = map(as_conversation, given)
    number = 0
    while batch := list(itertools.islice(given, ENCODED_RECORDS)):
        for record, ids in zip(batch, encode.prompts(batch), strict=True):
            _check(record, ids, teacher.shared_vocab_size)
            room = _room(config, len(ids))
            if not room and config.sequences.overlong == "error":
                raise SourceError(
                    f"{record.where}: sample {record.sample_id!r} has a prompt of {len(ids)} "
                    f"tokens, which leaves no room for a response in max_length="
                    f"{config.sequences.max_length}: raise it, or set overlong to truncate to "
                    "leave such prompts out"
                )
            yield Question(record, number, ids.astype(np.int32), room)
            number += 1


def prompts_for(
    config: DumpConfig, number: int, token_ids: NDArray[np.int32], sample_id: str = ""
) -> list[Prompt]:
    """The `n` responses to ask of the prompt of this number, which has room for them."""
    generate = config.source.generate
    return [
        Prompt(
            token_ids=token_ids,
            max_new_tokens=_room(config, len(token_ids)),
            seed=_seed(generate.seed, number, index),
            name=f"sample {sample_id}" if sample_id else f"prompt {number} (from 0) of the source",
        )
        for index in range(generate.n)
    ]


def open_sampler(config: DumpConfig, teacher: Teacher) -> Generator:
    """Load the teacher for sampling; the caller closes it."""
    generate = config.source.generate
    stops = stop_ids(teacher)
    if not stops:
        log.warning("the teacher names no end token: every response takes max_new_tokens")
    sampling = Sampling(
        temperature=generate.temperature,
        top_p=generate.top_p,
        stop_ids=stops,
        vocab_size=teacher.shared_vocab_size,
    )
    return open_generator(
        config.teacher,
        teacher.model_path,
        sampling=sampling,
        max_length=config.sequences.max_length,
        tokenizer=teacher.tokenizer,
    )


def stop_ids(teacher: Teacher) -> tuple[int, ...]:
    """What ends a response: the end tokens of the model's generation config and its tokenizer."""
    found: list[Any] = [getattr(teacher.tokenizer, "eos_token_id", None)]
    for name in ("generation_config.json", "config.json"):
        file = Path(teacher.model_path) / name
        if file.is_file():
            value = json.loads(file.read_text()).get("eos_token_id")
            found += value if isinstance(value, list) else [value]
            if value is not None:
                break
    ids = {int(value) for value in found if value is not None}
    return tuple(sorted(value for value in ids if 0 <= value < teacher.shared_vocab_size))


def _refuse_others(store: Store, fingerprint: str) -> None:
    """Raise unless the responses that are here, if any, are of this fingerprint."""
    if not part_names(store) and not store.names(paths.ANSWERS):
        return
    where = store.path(paths.GENERATED)
    if not store.exists(paths.GENERATION):
        raise FormatError(
            f"{store.path(paths.GENERATION)} is missing, so nothing says what the responses beside "
            "it are of: delete the folder, or choose another output"
        )
    found = read_json(store, paths.GENERATION).get("fingerprint")
    if found != fingerprint:
        raise GenerationChanged(
            f"{where} holds responses of other prompts, settings or another teacher (fingerprint "
            f"{found}, this config gives {fingerprint}): use the config they were sampled with, "
            "delete that folder, or choose another output"
        )


def _sample_missing(config: DumpConfig, teacher: Teacher, store: Store, fingerprint: str) -> None:
    store.remove_temporaries(paths.GENERATED)
    there = set(part_names(store))
    size = config.source.generate.part_prompts
    total = left_out = 0
    for question in questions(config, teacher):  # all of them, before a teacher is loaded
        total += question.room > 0
        left_out += question.room == 0
    if not total:
        raise SourceError(f"{config.source.path} has no prompt that leaves room for a response")
    if left_out:
        log.warning("%d prompts leave no room for a response and are left out", left_out)
    num_parts = -(-total // size)
    missing = [part for part in range(num_parts) if paths.generated(part) not in there]
    if not missing:
        store.remove_folder(paths.ANSWERS)
        return
    log.info("%d prompts, %d of %d parts to sample", total, len(missing), num_parts)

    def begin() -> None:
        if not there:  # a failure before leaves no trace
            publish_json(store, paths.GENERATION, {"fingerprint": fingerprint})
            there.add(paths.GENERATION)

    sampler: ChatSampler | Generator
    if config.teacher.is_chat:
        sampler = ChatSampler(config, teacher, store, begin)
    else:
        sampler = open_sampler(config, teacher)
    try:
        with progress("generate", "prompts", total=total) as bar:
            asked = (q for q in questions(config, teacher) if q.room)
            for part in range(num_parts):
                chunk = list(itertools.islice(asked, size))
                if part in missing:
                    rows = answer(config, teacher, sampler, chunk, part)
                    begin()
                    publish_part(store, part, rows)
                    if isinstance(sampler, ChatSampler):
                        sampler.forget(part)
                bar.add(len(chunk))
    finally:
        sampler.close()
    store.remove_folder(paths.ANSWERS)


def answer(
    config: DumpConfig,
    teacher: Teacher,
    sampler: Generator | ChatSampler,
    asked: Sequence[Question],
    part: int,
) -> list[dict[str, Any]]:
    """The rows of one part."""
    wanted = [
        (q, prompt)
        for q in asked
        for prompt in prompts_for(config, q.number, q.token_ids, q.record.sample_id)
    ]
    beside: list[dict[str, Any]] = [{} for _ in wanted]
    if isinstance(sampler, ChatSampler):
        stops = stop_ids(teacher)
        answers = sampler.answers(part, [(q.record, prompt) for q, prompt in wanted])
        beside = [chat_fields(one) for one in answers]
        responses = [
            as_response(one, teacher, prompt, stops)
            for one, (_, prompt) in zip(answers, wanted, strict=True)
        ]
    else:
        responses = sampler.generate([prompt for _, prompt in wanted])
    n = config.source.generate.n
    return [
        _row(teacher.tokenizer, question, response, f"#{index % n + 1}" if n > 1 else "") | more
        for index, ((question, _), response, more) in enumerate(
            zip(wanted, responses, beside, strict=True)
        )
    ]


def _row(tokenizer: Any, question: Question, response: Response, suffix: str) -> dict[str, Any]:
    fields = question.record.fields
    text = tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)
    prompt, conversation = fields.get("prompt"), None
    beside = {name: fields.get(name) for name in ("tools", "chat_template_kwargs")}
    if prompt is None:
        prompt = tokenizer.decode(question.token_ids.tolist())
        said = [*fields["messages"], {"role": "assistant", "content": text}]
        conversation = json.dumps(said, ensure_ascii=False)
    return {
        "id": question.record.sample_id + suffix,
        "prompt": prompt,
        "response": text,
        "conversation": conversation,
        "prompt_ids": question.token_ids,
        "response_ids": response.token_ids,
        "finish_reason": response.finish_reason,
        **{name: _json(value) for name, value in beside.items()},
    }


def _json(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _check(record: Record, ids: NDArray[np.int64], vocab_size: int) -> None:
    if not len(ids):
        raise SourceError(
            f"{record.where}: sample {record.sample_id!r} has an empty prompt: remove the record, "
            "or set add_bos"
        )
    if ids.max() >= vocab_size:
        raise SourceError(
            f"{record.where}: sample {record.sample_id!r} has token id {ids.max()}: expected ids "
            f"from 0 to {vocab_size - 1}; use the tokenizer that belongs to the teacher"
        )


def _room(config: DumpConfig, prompt_tokens: int) -> int:
    room = max(0, config.sequences.max_length - prompt_tokens)
    return min(room, config.source.generate.max_new_tokens)


def _seed(seed: int, number: int, index: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed} {number} {index}".encode()) >> 1
