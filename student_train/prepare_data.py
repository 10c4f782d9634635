"""Which data a run trains and evaluates on: one cache, a mixture, or a cache still being dumped."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from accelerate import Accelerator

from decant.storage import CacheReader
from decant.student_train.config.loss import LossConfig
from decant.student_train.config.run import TrainConfig
from decant.student_train.config.selection import BY_TEACHER
from decant.student_train.data.follow import FollowStream
from decant.student_train.data.mixture import MixtureStream, check_same_vocabulary
from decant.student_train.data.stream import CacheStream, SequenceStream


def training_stream(
    config: TrainConfig, accelerator: Accelerator, alignment: dict[str, Any]
) -> SequenceStream:
    """This process's share of the training data.

    `alignment` are the fields of `StreamConfig` for a student of another tokenizer.
    """
    share: dict[str, Any] = {
        "batch_size": config.batch_size,
        "temperature": config.losses[0].temperatures,
        "seed": config.seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        **alignment,
    }
    if config.follow:
        return FollowStream(config.cache, **share)
    share["part"] = "train" if config.eval.heldout_fraction else "all"
    share["heldout_fraction"] = config.eval.heldout_fraction
    if config.mixture:
        caches = [entry.cache for entry in config.mixture]
        share["by_cache"] = len({loss for loss in map(str, config.losses)}) > 1
        temperatures = [loss.temperatures for loss in config.losses]
        weights = [entry.weight for entry in config.mixture]
        return MixtureStream(caches, weights, temperatures=temperatures, **share)
    return CacheStream(config.cache, **share)


def refuse_unknown_entropy(config: TrainConfig, readers: Sequence[CacheReader]) -> None:
    """Raise ValueError if targets are to be selected by a teacher's entropy that nothing says."""
    for reader in readers:
        truncation = reader.manifest.truncation
        if config.selection.by == BY_TEACHER and not truncation.rule.has_entries:
            raise ValueError(
                f"selection.by {BY_TEACHER}: {reader.url} has {truncation.text()}, of which no "
                "entropy can be had: select by student_entropy, or dump with topk"
            )


def heldout_streams(
    config: TrainConfig, reader: CacheReader, accelerator: Accelerator, alignment: dict[str, Any]
) -> dict[str, CacheStream]:
    """This process's share of the data to evaluate on, by name; empty if there is none.

    Raises ValueError if a cache of its own has another tokenizer or vocabulary than `reader`, or is
    trained on.
    """
    if config.eval.cache:
        urls = [config.eval.cache]
        heldout = CacheReader(config.eval.cache)
        if not alignment:
            check_same_vocabulary(reader, heldout)
        readers = [CacheReader(share.cache) for share in config.mixture] or [reader]
        if heldout.manifest.cache_id in [trained.manifest.cache_id for trained in readers]:
            raise ValueError(
                f"eval.cache {config.eval.cache} is trained on (cache id "
                f"{heldout.manifest.cache_id}): give another, or hold out a part of it with "
                "eval.heldout_fraction"
            )
        losses: tuple[LossConfig, ...] = (config.loss,)
    elif config.eval.heldout_fraction:
        urls = [share.cache for share in config.mixture] or [config.cache]
        losses = config.losses
    else:
        urls, losses = [], ()
    return {
        name: CacheStream(
            url,
            batch_size=config.eval.batch_size,
            temperature=loss.temperatures,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            part="heldout" if config.eval.heldout_fraction else "all",
            heldout_fraction=config.eval.heldout_fraction,
            **alignment,
        )
        for name, url, loss in zip(names_of(urls), urls, losses, strict=True)
    }


def names_of(urls: Sequence[str]) -> list[str]:
    """Last parts of the paths, numbered where they are not distinct."""
    names = [PurePosixPath(url.rstrip("/")).name for url in urls]
    if len(set(names)) == len(names):
        return names
    return [f"{name}-{i}" for i, name in enumerate(names)]
