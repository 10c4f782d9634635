"""Responses of the teacher, or of another model: sampled once, kept, then scored as any given ids.

A part is one Parquet file of the responses to `part_prompts` consecutive prompts: finished or
absent, and a function of the prompts, the settings and the part's number, so that an interrupted
sampling goes on as if nothing had happened. Nothing is tokenised again: the ids that were sampled
are those that are scored.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from decant.teacher_dump.engines.opening import GENERATING_ENGINES
from decant.teacher_dump.engines.seam import Generator, Prompt
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
    SAMPLER_LOGPROBS,
    conversation_of,
    part_names,
    publish_part,
    row_of,
    rows_of,
)
from decant.teacher_dump.job.sampler import (
    identity_of_sampler,
    of_sampler,
    open_sampler,
    said_of_sampler,
    stop_ids,
)
from decant.teacher_dump.progress import progress
from decant.teacher_dump.teacher import Teacher

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
    by = config.source.generate.by
    if by and config.teacher.is_chat:
        raise EngineError(
            "source.generate.by has no effect with teacher.api chat, which can score its own "
            "answers alone: leave it out, or use a server of the same model that scores prompts"
        )
    if by and config.sequences.targets == "all":
        raise ValueError(
            "sequences.targets: all makes targets of prompts, which source.generate.by did not "
            "sample: leave it at response"
        )
    if not by and config.teacher.engine not in GENERATING_ENGINES:
        raise EngineError(
            f"source.generate cannot sample with teacher.engine {config.teacher.engine}: set one "
            f"of {GENERATING_ENGINES}, or source.generate.by to let another model sample"
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
    if teacher.sampler is None:
        del generate["by"], generate["by_engine"]
    settings = {
        "prompts": source["fingerprint"],
        **identity_of_sampler(config, teacher),
        "stop_ids": list(stop_ids(teacher)),
        "sequences": {
            name: value
            for name, value in dataclasses.asdict(config.sequences).items()
            if name not in NO_PART_OF_PROMPTS
        },
        "chat_template": chat_template_text(config.sequences)
        or getattr(teacher.tokenizer, "chat_template", None),
        **{name: value for name, value in generate.items() if name not in ("by", "by_engine")},
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
    said = said_of_sampler(config, teacher)
    return {**source, "fingerprint": fingerprint, "generate": generate, **said}


def sampled_records(
    config: DumpConfig, teacher: Teacher, store: Store, fingerprint: str
) -> Iterator[Record]:
    """Every response as a record of `input_ids` and `loss_mask`; samples those that are missing.

    `fingerprint` is that of `describe_generation`. Raises GenerationChanged if the output holds
    responses of another one.
    """
    _refuse_others(store, fingerprint, teacher)
    _sample_missing(config, teacher, store, fingerprint)
    everything = config.sequences.targets == "all"
    for where, fields in rows_of(store):
        prompt, response = fields["prompt_ids"], fields["response_ids"]
        sampler = None
        if teacher.sampler is not None:
            given = [0.0] * len(prompt) + fields[SAMPLER_LOGPROBS]
            sampler = np.array(given, np.float32)
        mask = [int(everything)] * len(prompt) + target_mask(fields)
        ready = {
            "input_ids": prompt + response,
            "loss_mask": mask,
            "attention_mask": [1] * len(mask),  # a padding token that was drawn is not padding
        }
        said = conversation_of(fields, where, everything)
        yield Record(fields["id"], ready, where, said, sampler)


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


def _refuse_others(store: Store, fingerprint: str, teacher: Teacher) -> None:
    """Raise unless the responses that are here, if any, are of this fingerprint."""
    if not part_names(store) and not store.names(paths.ANSWERS):
        return
    where = store.path(paths.GENERATED)
    if not store.exists(paths.GENERATION):
        raise FormatError(
            f"{store.path(paths.GENERATION)} is missing, so nothing says what the responses beside "
            "it are of: delete the folder, or choose another output"
        )
    known = read_json(store, paths.GENERATION)
    found, by = known.get("fingerprint"), known.get("sampler")
    ours = teacher.sampler.info if teacher.sampler else None
    if found != fingerprint and by and ours and by != ours.fingerprint:
        raise GenerationChanged(
            f"{where} holds responses of another sampler: source.generate.by {ours.name} has "
            f"fingerprint {ours.fingerprint} now, and they were sampled by one of {by}. It was "
            "trained, or is another one, since: put back the weights that the sampling began with, "
            "delete that folder, or choose another output"
        )
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
        raise SourceError(
            f"{config.source.path} has no prompt that leaves room for a response in "
            f"sequences.max_length={config.sequences.max_length}: all {left_out} are too long, so "
            "there is no sample to score; raise it"
        )
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
            known = {"fingerprint": fingerprint}
            if teacher.sampler is not None:
                known["sampler"] = teacher.sampler.info.fingerprint
            publish_json(store, paths.GENERATION, known)
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
        try:
            responses = sampler.generate([prompt for _, prompt in wanted])
        except EngineError as error:
            if teacher.sampler is None:
                raise
            raise of_sampler(error, config) from error
    n = config.source.generate.n
    return [
        row_of(
            teacher.tokenizer,
            question.record,
            question.token_ids,
            response,
            f"#{index % n + 1}" if n > 1 else "",
        )
        | more
        for index, ((question, _), response, more) in enumerate(
            zip(wanted, responses, beside, strict=True)
        )
    ]


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
