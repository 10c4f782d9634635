"""Make a cache from another tool's dump: look at all of it, refuse or plan, then write.

A dump says less than a cache: the mass of what is not kept follows from log probs over the whole
vocabulary alone, and the log prob of an actual token only from its entry. What cannot be had is
refused, or recorded in the manifest's `source` where the caller allows a substitute.
"""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from decant.schemas import Manifest, ScoredSequence, TeacherInfo, TokenizerInfo, Truncation
from decant.schemas.strict import canonical
from decant.storage.cache.tokenizer_files import TokenizerFiles
from decant.storage.cache.writer import write_cache
from decant.storage.exchange.config import ImportConfig
from decant.storage.exchange.foreign import ForeignRecord
from decant.storage.exchange.formats import (
    found_settings,
    read_foreign,
    source_files,
    stated_nucleus,
    stated_vocab_size,
)
from decant.storage.exchange.survey import TAIL_RESOLUTION, TOLERANCE, Survey
from decant.storage.files.durable import staged_directory
from decant.storage.files.store import Store

log = logging.getLogger(__name__)


def import_cache(
    config: ImportConfig,
    target: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write a final cache of `config.path` into a new local directory; returns its manifest.

    Reads the source twice, one batch of records in memory. `progress` is called with (records
    done, records in all; 0 while they are being counted).

    Raises ForeignError, naming file, row and a way out, for what no cache can truthfully hold;
    FileExistsError if `target` exists. Nothing is left under `target` then.
    """
    progress = progress or (lambda done, total: None)
    source, final = (Path(p).expanduser().absolute() for p in (config.path, target))
    if final.is_relative_to(source):
        raise ValueError(f"{target} lies inside the source {config.path}: choose another place")
    with staged_directory(target) as folder:
        tokenizer = TokenizerFiles.read(config.tokenizer) if config.tokenizer else None
        vocab_size = _vocab_size(config, tokenizer)
        survey = Survey(config, vocab_size)
        for done, record in enumerate(read_foreign(config, vocab_size)):
            survey.add(record)
            progress(done + 1, 0)
        survey.judge()
        store = Store(folder)
        kept = tokenizer.save(store) if tokenizer else TokenizerInfo(fingerprint="", files={})
        draft = _draft(config, survey, vocab_size, kept)
        scored = _sequences(config, survey, vocab_size, progress)
        manifest = write_cache(folder, draft, scored, survey.plan())
    for warning in survey.warnings():
        log.warning("%s", warning)
    return manifest


def _vocab_size(config: ImportConfig, tokenizer: TokenizerFiles | None) -> int:
    stated, given = stated_vocab_size(config), config.vocab_size
    if stated and given and stated != given:
        raise ValueError(f"--vocab-size {given}, but {config.path} is of {stated} ids")
    size = given or stated
    if tokenizer is None:
        return size
    if size and size < tokenizer.vocab_size:
        what = f"--vocab-size {given}" if given else f"{config.path}: a vocabulary of {stated}"
        raise ValueError(
            f"{what} is less than the {tokenizer.vocab_size} ids of the tokenizer "
            f"{config.tokenizer}: they do not belong together"
        )
    return size or tokenizer.vocab_size


def _draft(
    config: ImportConfig, survey: Survey, vocab_size: int, tokenizer: TokenizerInfo
) -> Manifest:
    root = Path(config.path).expanduser()
    files = [
        {
            "name": file.relative_to(root).as_posix() if root in file.parents else file.name,
            "bytes": file.stat().st_size,
            "xxh3_128": Store(file.parent).hash(file.name),
        }
        for file in source_files(config)
    ]
    options = {
        "format": config.file_format,
        "logprobs_field": config.logprobs_field,
        "shift": config.shift,
        "normalised_over": "kept ids" if config.renormalised else "vocabulary",
        "unknown_label": config.unknown_label,
    }
    if config.max_excess:
        options["max_excess"] = config.max_excess
    if config.bos >= 0:
        options["bos"] = config.bos
    options |= found_settings(config)
    identity = xxhash.xxh3_128(canonical({**options, "files": files})).hexdigest()
    return Manifest.draft(
        teacher=TeacherInfo(
            name=config.teacher,
            fingerprint="unknown",
            architecture="unknown",
            engine=f"imported from {config.file_format}",
            dtype="unknown",
            vocab_size=vocab_size,
        ),
        tokenizer=tokenizer,
        shared_vocab_size=vocab_size,
        truncation=_truncation(config, survey),
        temperatures=(1.0,),
        precision=config.precision,
        source={
            "path": config.path,
            "files": files,
            **options,
            "unknown_labels": survey.unknown,
            "floored_labels": survey.floored,
            "unresolved_tails": 0 if config.renormalised else survey.unresolved,
            "scaled_targets": 0 if config.renormalised else survey.scaled,
            "fingerprint": identity,
        },
        sequences={
            "max_length": survey.longest,
            "counts": {"records": survey.records, "without_target": survey.skipped_records},
        },
    )


def _truncation(config: ImportConfig, survey: Survey) -> Truncation:
    if not config.varying:
        return Truncation(method="topk", k=survey.k)
    nucleus = stated_nucleus(config)
    return Truncation.nucleus(k=survey.k, p=nucleus, min_k=survey.fewest_entries)


def _sequences(
    config: ImportConfig, survey: Survey, vocab_size: int, progress: Callable[[int, int], None]
) -> Iterator[ScoredSequence]:
    for done, record in enumerate(read_foreign(config, vocab_size)):
        progress(done + 1, survey.records)
        sequence = _scored(config, record, survey.k, vocab_size)
        if sequence.num_targets:
            yield sequence


def _scored(config: ImportConfig, record: ForeignRecord, k: int, vocab_size: int) -> ScoredSequence:
    """The k most probable entries of each target, the mass of the rest, the actual token's."""
    own = record.label_values
    known = ~np.isnan(own)
    targets = np.flatnonzero(known) if config.unknown_label == "skip" else np.arange(len(known))
    values, own, known = record.values[targets], own[targets], known[targets]
    ids = record.token_ids[targets]
    if (lacking := k - values.shape[1]) > 0:  # lists vary, and these are shorter than others
        values = np.pad(values, ((0, 0), (0, lacking)), constant_values=-np.inf)
        ids = np.pad(ids, ((0, 0), (0, lacking)), constant_values=-1)
    if config.renormalised and len(targets):
        moved = np.logaddexp.reduce(values[:, :k], axis=1)
        log_tail = np.full(len(targets), -np.inf)
    else:
        if record.log_tail is None:
            log_tail = _log_tail(values, k, vocab_size)
        else:
            log_tail = record.log_tail[targets]
        total = np.exp(values[:, :k]).sum(axis=1) + np.exp(log_tail)
        moved = np.where(np.abs(total - 1) > TOLERANCE, np.log(total), 0)
        log_tail = log_tail - moved
    values, own = values - moved[:, None], own - moved
    logprobs = values[:, :k].astype(np.float32)
    last = _last(logprobs)
    bound = np.where(np.isfinite(log_tail), np.minimum(last, log_tail), last)
    positions = record.positions[targets]
    is_target = np.zeros(len(record.input_ids), bool)
    is_target[positions] = True
    return ScoredSequence(
        sample_id=record.sample_id,
        input_ids=record.input_ids,
        is_target=is_target,
        positions=positions.astype(np.int32),
        token_ids=ids[:, :k].astype(np.int32),
        logprobs=logprobs,
        log_z=np.zeros((len(targets), 1), np.float32),
        log_tail=log_tail[:, None].astype(np.float32),
        label_logprob=np.where(known, own, bound).astype(np.float32),
    )


def _log_tail(values: NDArray[np.float64], k: int, vocab_size: int) -> NDArray[np.float64]:
    """[n] log of what the first k entries leave: 1 - sum p, within what is possible.

    At least the entries cut off and what float32 log probs can resolve; at most as if every other
    id were as probable as the last kept one.
    """
    p = np.exp(values)
    rest = np.maximum(p[:, k:].sum(axis=1), TAIL_RESOLUTION)
    others = vocab_size - np.isfinite(values[:, :k]).sum(axis=1)
    most = others * np.exp(_last(values[:, :k]))
    tail = np.minimum(np.maximum(1 - p[:, :k].sum(axis=1), rest), most)
    with np.errstate(divide="ignore"):
        return np.log(tail)


def _last(values: NDArray) -> NDArray:
    """[n] the least of each row's entries; -inf is none."""
    if not values.size:
        return np.zeros(len(values), values.dtype)
    return np.where(np.isfinite(values), values, np.inf).min(axis=1)
