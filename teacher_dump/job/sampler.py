"""Who samples the responses: the teacher, or another model of its tokenizer, such as a student.

The sampler is described like a teacher, by the files it has, and known by the hash of its weights.
It is loaded before the teacher is, and gone by then.
"""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from decant.schemas.same_tokenizer import Unlike, compare
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import EngineError, TeacherConfig
from decant.teacher_dump.engines.opening import check_engine, open_generator
from decant.teacher_dump.engines.seam import Generator, Sampling
from decant.teacher_dump.engines.weights import ADAPTER
from decant.teacher_dump.teacher import Teacher, describe_teacher, stable_identity

log = logging.getLogger(__name__)

STUDENT, SUMMARY = "student", "summary.json"
"""What a training calls the folder of its student, and the file beside it with its steps."""
OPTION = "source.generate.by"
IN_OTHER_WORDS = {
    "teacher.path": OPTION,
    "teacher.engine": f"{OPTION}_engine",
    "try teacher.dtype: float32, and ": "",
    "; set teacher.tokenizer to its path, or to none if the source holds input_ids": (
        ": its tokenizer must lie beside its weights"
    ),
    "the teacher": "the sampler",
}
"""What is said of a teacher, said of a sampler."""


def with_sampler(config: DumpConfig, teacher: Teacher) -> Teacher:
    """The teacher with its sampler, where that is another model.

    Raises ValueError, naming `source.generate.by`, if it is not there, is no model, or if its ids
    are not the teacher's.
    """
    if not config.source.generate.by:
        return teacher
    settings = sampler_config(config)
    try:
        sampler = describe_teacher(settings)
    except (ValueError, OSError) as error:
        raise of_sampler(error, config) from error
    _refuse_unlike(config, teacher, sampler)
    name = dataclasses.replace(sampler.info, name=config.source.generate.by)
    return dataclasses.replace(teacher, sampler=dataclasses.replace(sampler, info=name))


def sampler_config(config: DumpConfig) -> TeacherConfig:
    """How the sampler is loaded: as it was saved, where the teacher is or would be.

    A directory with nothing but an adapter is put on the base that the adapter names.
    """
    generate, teacher = config.source.generate, config.teacher
    path = _folder(generate.by)
    engine = generate.by_engine or "transformers"
    more: dict[str, Any] = {}
    if teacher.engine == engine == "transformers":
        more["device"] = teacher.device
    if teacher.engine == engine == "vllm":
        more["tensor_parallel"] = teacher.tensor_parallel
    if teacher.engine != "openai":
        more["max_batch_tokens"] = teacher.max_batch_tokens
    if teacher.trust_remote_code:
        more["trust_remote_code"] = True
    adapter = Path(path, ADAPTER[0])
    try:
        if adapter.exists():
            more |= {"adapter": path, "tokenizer": _tokenizer_of(path)}
            path = str(json.loads(adapter.read_text())["base_model_name_or_path"])
        return TeacherConfig(path=path, engine=engine, **more)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{OPTION} {generate.by}: {error}") from error


def check_sampler(config: DumpConfig, teacher: Teacher) -> list[str]:
    """Warnings of `check_engine` about the sampler. Raises EngineError as that does."""
    if teacher.sampler is None:
        return []
    try:
        return check_engine(sampler_config(config), teacher.sampler.model_path)
    except EngineError as error:
        raise of_sampler(error, config) from error


def said_of_sampler(config: DumpConfig, teacher: Teacher) -> dict[str, Any]:
    """What the manifest says of who sampled, under `source`; nothing where it is the teacher."""
    if teacher.sampler is None:
        return {}
    generate = config.source.generate
    said: dict[str, Any] = {
        "path": generate.by,
        "fingerprint": teacher.sampler.info.fingerprint,
        "temperature": float(generate.temperature),
        "top_p": float(generate.top_p),
    }
    return {"sampler": said | _step_of(_folder(generate.by))}


def identity_of_sampler(config: DumpConfig, teacher: Teacher) -> dict[str, Any]:
    """What a response depends on of the model that samples it."""
    other = teacher.sampler
    if other is None:
        return {
            "teacher": stable_identity(teacher),
            "dtype": teacher.info.dtype,
            "engine": config.teacher.engine,
        }
    return {
        "sampler": other.info.fingerprint,
        "dtype": other.info.dtype,
        "engine": config.source.generate.by_engine or "transformers",
    }


def of_sampler(error: Exception, config: DumpConfig) -> ValueError:
    """What is wrong with a teacher, said of the sampler; an EngineError stays one."""
    text = str(error)
    for said, instead in IN_OTHER_WORDS.items():
        text = text.replace(said, instead)
    by = config.source.generate.by
    if OPTION not in text:
        text = f"{OPTION} {by}: {text}"
    return EngineError(text) if isinstance(error, EngineError) else ValueError(text)


def open_sampler(config: DumpConfig, teacher: Teacher) -> Generator:
    """Load who samples; the caller closes it."""
    generate, other = config.source.generate, teacher.sampler
    stops = stop_ids(teacher)
    if not stops:
        log.warning("the teacher names no end token: every response takes max_new_tokens")
    sampling = Sampling(
        temperature=generate.temperature,
        top_p=generate.top_p,
        stop_ids=stops,
        vocab_size=teacher.shared_vocab_size,
        with_logprobs=other is not None,
    )
    try:
        return open_generator(
            config.teacher if other is None else sampler_config(config),
            (other or teacher).model_path,
            sampling=sampling,
            max_length=config.sequences.max_length,
            tokenizer=teacher.tokenizer,
        )
    except EngineError as error:
        if other is None:
            raise
        raise of_sampler(error, config) from error


def stop_ids(teacher: Teacher) -> tuple[int, ...]:
    """What ends a response: the end tokens of the generation config and tokenizer of a model.

    Of the teacher, and of the sampler if that is another: a student of a base model ends as its
    teacher does, once it has learned to.
    """
    found = [*_end_tokens(teacher), *(_end_tokens(teacher.sampler) if teacher.sampler else [])]
    ids = {int(value) for value in found if value is not None}
    return tuple(sorted(value for value in ids if 0 <= value < teacher.shared_vocab_size))


def _end_tokens(model: Teacher) -> list[Any]:
    found: list[Any] = [getattr(model.tokenizer, "eos_token_id", None)]
    for name in ("generation_config.json", "config.json"):
        file = Path(model.model_path) / name
        if model.model_path and file.is_file():  # a service's files are elsewhere
            value = json.loads(file.read_text()).get("eos_token_id")
            found += value if isinstance(value, list) else [value]
            if value is not None:
                break
    return found


def _refuse_unlike(config: DumpConfig, teacher: Teacher, sampler: Teacher) -> None:
    """Raise ValueError unless the sampler's ids are the teacher's, and it reads as many tokens."""
    by, size = config.source.generate.by, teacher.shared_vocab_size
    assert teacher.tokenizer is not None
    try:
        same = compare(teacher.tokenizer, sampler.tokenizer, vocab_size=size)
    except Unlike as error:
        raise ValueError(
            f"{OPTION} {by} has another tokenizer than the teacher {teacher.info.name}: {error} "
            "(teacher vs sampler). What it samples means something else to the teacher: sample "
            "with a model of the teacher's tokenizer"
        ) from error
    if sampler.info.vocab_size < size:
        raise ValueError(
            f"{OPTION} {by} has {sampler.info.vocab_size} output rows, fewer than the {size} ids "
            f"of the teacher {teacher.info.name}: it cannot sample all of them"
        )
    length, limit = config.sequences.max_length, sampler.max_positions
    if limit and length > limit:
        raise ValueError(
            f"sequences.max_length is {length}, but {OPTION} {by} takes at most {limit} positions: "
            "lower it"
        )
    if text := same.text():
        log.info("the tokenizer of %s means the same by every id; it differs in: %s", by, text)


def _folder(by: str) -> str:
    """The directory of a sampler: of the output folder of a training its student.

    Raises ValueError if it can only be a local path, and nothing is there.
    """
    path = Path(by).expanduser()
    inside = path / STUDENT
    if not (path / "config.json").exists() and inside.is_dir():
        return str(inside)
    is_local = by.startswith((".", "/", "~")) or by.count("/") > 1
    is_local = is_local or ("/" in by and path.parent.is_dir())
    if is_local and not path.exists():
        raise ValueError(f"{OPTION} {by} does not exist (seen from {os.getcwd()})")
    return str(path) if path.exists() else by


def _tokenizer_of(path: str) -> str:
    return path if Path(path, "tokenizer_config.json").exists() else ""


def _step_of(folder: str) -> dict[str, int]:
    """The step after which a student was saved, if the run beside it says so."""
    summary = Path(folder).parent / SUMMARY
    if Path(folder).name != STUDENT or not summary.is_file():
        return {}
    try:
        said = json.loads(summary.read_text())
        step = said.get("best_step", said["steps"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {"step": step} if type(step) is int else {}
