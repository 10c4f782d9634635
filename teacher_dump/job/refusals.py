"""What is refused before a byte is written."""

import os
import re
from pathlib import Path, PurePath

from decant.schemas import check_same_tokenizer
from decant.schemas.tokenizer import has_fingerprint
from decant.storage import Store
from decant.storage.cache import paths
from decant.storage.cache.tokenizer_files import TokenizerFiles
from decant.storage.files.durable import TEMPORARY_SUFFIX
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines.openai.chat_answers import MOST_ENTRIES
from decant.teacher_dump.engines.opening import ANSWERS_ALONE
from decant.teacher_dump.engines.top_entries import refuse_request
from decant.teacher_dump.inputs.cached import is_cache, open_cache
from decant.teacher_dump.inputs.sources import source_files
from decant.teacher_dump.job.responses import (
    refuse_generation,
)
from decant.teacher_dump.teacher import Teacher

STARTED = (paths.TOKENIZER, paths.PLAN, paths.INPUTS)
"""Folders that an interrupted start may leave; anything else is somebody's data."""


PART = re.compile(r"part-\d{6}\.parquet")


def refuse_misfits(config: DumpConfig, teacher: Teacher) -> None:
    """Raise ValueError for what this teacher cannot give, and for an output among the inputs.

    Looks at names and sizes only, so that it can come before anything that takes time.
    """
    slots, vocab_size = config.truncation.slots, teacher.shared_vocab_size
    if slots > vocab_size:
        raise ValueError(
            f"truncation keeps {slots} entries per target, but {teacher.info.name} has only "
            f"{vocab_size} ids: lower truncation.k (or draws)"
        )
    refuse_server_limits(config, teacher)
    refuse_generation(config, teacher)
    store = Store(config.output)
    # A cache that was begun in an older version may keep log probs all the same.
    without = not config.truncation.rule.has_logprobs and not store.exists(paths.MANIFEST)
    if without and config.precision != DumpConfig.__dataclass_fields__["precision"].default:
        raise ValueError(
            f"precision: {config.precision} has no effect with truncation.method "
            f"{config.truncation.method}, which stores no log probs of kept entries: leave it out"
        )
    if without:
        config.truncation.check_without_logprobs(config.temperatures)
    if is_cache(config.source):
        _refuse_other_tokenizer(config, teacher)
    length, limit = config.sequences.max_length, teacher.max_positions
    if limit and length > limit:
        raise ValueError(
            f"sequences.max_length is {length}, but {teacher.info.name} takes at most {limit} "
            "positions: lower it"
        )
    if not store.is_local:
        store.exists(paths.MANIFEST)  # raises OSError if the store cannot be asked
        return
    output = Path(store.path(""))
    if os.path.lexists(output) and not output.is_dir():
        raise ValueError(f"output {output} is not a directory: choose another")
    output = output.resolve()
    source = Path(os.path.expanduser(config.source.path)).resolve()
    reads_all = source.is_dir() or "**" in source.parts
    folder = Path(*source.parts[: source.parts.index("**")]) if "**" in source.parts else source
    if reads_all and output.is_relative_to(folder):
        raise ValueError(
            f"output {output} lies inside the source {config.source.path}, which would read the "
            "cache as records: choose an output elsewhere"
        )
    for file in source_files(config.source):
        if file.resolve().is_relative_to(output):
            raise ValueError(
                f"the source file {file} lies inside the output {output}: choose an output of its "
                "own"
            )


def refuse_before_asking(config: DumpConfig) -> None:
    """Raise ValueError for what no chat API gives, before one is asked, which costs money."""
    if not config.teacher.is_chat:
        return
    if not config.source.generate.n:
        raise ValueError(
            f"{ANSWERS_ALONE}: set source.generate.n to score its own answers, or use a server of "
            "the same model that scores prompts (teacher.api: auto)"
        )
    if config.sequences.targets == "all":
        raise ValueError(
            f"sequences.targets: all makes targets of prompts: {ANSWERS_ALONE}; leave it at "
            "response"
        )
    refuse_request(config.truncation, tuple(config.temperatures))
    if config.truncation.slots > MOST_ENTRIES:
        raise ValueError(
            f"truncation.k is {config.truncation.slots}, but chat APIs give at most {MOST_ENTRIES} "
            "entries per token (top_logprobs): lower it"
        )


def _refuse_other_tokenizer(config: DumpConfig, teacher: Teacher) -> None:
    """Raise ValueError if the ids of the cache that is the source are not the teacher's."""
    reader = open_cache(config.source)
    stored, size = reader.manifest.tokenizer.fingerprint, reader.manifest.shared_vocab_size
    if not stored or teacher.tokenizer is None or has_fingerprint(teacher.tokenizer, stored):
        return
    try:
        kept = TokenizerFiles.of_cache(reader)
        check_same_tokenizer(kept, teacher.tokenizer, reader.url, vocab_size=size)
    except ValueError as error:
        raise ValueError(
            f"the ids of {config.source.path} are of another tokenizer than that of "
            f"{teacher.info.name}: {error}"
        ) from error


def refuse_server_limits(config: DumpConfig, teacher: Teacher) -> None:
    """Raise ValueError for what a stock server does not give."""
    if config.teacher.engine != "openai":
        return
    refuse_request(config.truncation, tuple(config.temperatures))
    slots, most = config.truncation.slots, teacher.max_entries
    if slots > most and teacher.entries_limit:
        raise ValueError(
            f"truncation.k is {slots}, but the server of {teacher.info.name} gives at most {most} "
            f"entries per token: lower it, or {teacher.entries_limit.format(k=slots)}"
        )


def refuse_foreign(config: DumpConfig) -> None:
    """Raise FileExistsError if the output holds what is neither a cache nor a started one."""
    store = Store(config.output)
    if store.exists(paths.MANIFEST):
        return
    foreign = _foreign(store, sampling=config.source.generate.n > 0)
    if foreign:
        raise FileExistsError(
            f"{store.url} is not empty and holds no cache ({', '.join(foreign[:5])}); "
            "choose another output"
        )


def _foreign(store: Store, sampling: bool) -> list[str]:
    """What lies in the output that no start of a dump can have left there."""
    top = [name for name in store.names("") if not _is_temporary(name, paths.MANIFEST)]
    if sampling and _is_of_a_sampling(store):
        top = [name for name in top if name != paths.GENERATED]
    if not store.names(paths.SHARDS):  # made to be locked
        top = [name for name in top if name != paths.SHARDS]
    foreign = [name for name in top if name not in STARTED]
    for folder, pattern in (
        (paths.INPUTS, PART),
        (paths.PLAN, re.compile(re.escape(PurePath(paths.segment(paths.PLAN)).name))),
    ):
        foreign += [
            f"{folder}/{name}"
            for name in store.names(folder)
            if not (pattern.fullmatch(name) or _is_temporary(name))
        ]
    if top and paths.INPUTS not in top:  # a start begins with it, and ends by removing it last
        foreign += top
    return sorted(set(foreign))


def _is_of_a_sampling(store: Store) -> bool:
    """Whether the folder of generated text says what it is of, or a kill came before it did."""
    if store.exists(paths.GENERATION):
        return True
    return all(_is_temporary(name) for name in store.names(paths.GENERATED))


def _is_temporary(name: str, of: str = "") -> bool:
    return name.startswith(f".{of}") and name.endswith(TEMPORARY_SUFFIX)
