"""Which tool's files are read where: the one list of formats that an import knows."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from decant.storage.exchange import (
    axolotl,
    distillkit,
    distillkit_codec,
    llamacpp,
    megatron,
    tinker,
    trl,
    vllm,
)
from decant.storage.exchange.bounds import refusing
from decant.storage.exchange.columns import table_files
from decant.storage.exchange.config import ImportConfig
from decant.storage.exchange.foreign import ForeignRecord

READERS: dict[str, Callable[[ImportConfig, int], Iterator[ForeignRecord]]] = {
    "distillkit": distillkit.read,
    "axolotl": axolotl.read,
    "vllm": vllm.read,
    "trl": trl.read,
    "tinker": tinker.read,
    "megatron": megatron.read,
    "llamacpp": llamacpp.read,
}


def read_foreign(config: ImportConfig, vocab_size: int) -> Iterator[ForeignRecord]:
    """All records of a source in order, few in memory. Raises ForeignError."""
    with refusing(config.path, config.file_format) as seen:
        for record in READERS[config.file_format](config, vocab_size):
            seen[:] = [record.where]
            yield record


def source_files(config: ImportConfig) -> list[Path]:
    """The files that a source consists of. Raises ForeignError if it is none that can be read."""
    if config.file_format == "llamacpp":
        return llamacpp.source_files(config)
    if config.file_format == "megatron":
        return megatron.source_files(config)
    return table_files(config.path)


def stated_vocab_size(config: ImportConfig) -> int:
    """V as the source itself says it; 0 where it does not."""
    return llamacpp.read_header(config).n_vocab if config.file_format == "llamacpp" else 0


def found_settings(config: ImportConfig) -> dict[str, Any]:
    """What an import was told, or found beside the source, that the options do not show."""
    if config.file_format != "distillkit":
        return {}
    codec = distillkit_codec.read_codec(config.codec, config.path)
    return {"codec": json.loads(json.dumps(dataclasses.asdict(codec)))} if codec else {}


def stated_nucleus(config: ImportConfig) -> float:
    """The mass that lists of varying length reach, as the source says it; 1 where it does not."""
    if config.file_format != "megatron":
        return 1.0
    with refusing(config.path, config.file_format):
        return megatron.nucleus(config)
