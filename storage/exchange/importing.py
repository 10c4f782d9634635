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
from decant.storage.exchange.foreign import ForeignRecord, read_foreign, source_files
from decant.storage.exchange.survey import TAIL_RESOLUTION, ImportConfig, Survey
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
        for done, record in enumerate(_records(config, vocab_size)):
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


def _records(config: ImportConfig, vocab_size: int) -> Iterator[ForeignRecord]:
    return read_foreign(
        config.path, config.file_format, vocab_size, config.logprobs_field, config.shift
    )


def _vocab_size(config: ImportConfig, tokenizer: TokenizerFiles | None) -> int:
    if tokenizer is None:
        return config.vocab_size
    if config.vocab_size and config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"--vocab-size {config.vocab_size} is less than the {tokenizer.vocab_size} ids of the "
            f"tokenizer {config.tokenizer}: they do not belong together"
        )
    return config.vocab_size or tokenizer.vocab_size


def _draft(
    config: ImportConfig, survey: Survey, vocab_size: int, tokenizer: TokenizerInfo
) -> Manifest:
    root = Path(config.path).expanduser()
    files = [
        {
            "name": file.name if file == root else file.relative_to(root).as_posix(),
            "bytes": file.stat().st_size,
            "xxh3_128": Store(file.parent).hash(file.name),
        }
        for file in source_files(config.path)
    ]
    options = {
        "format": config.file_format,
        "logprobs_field": config.logprobs_field,
        "shift": config.shift,
        "normalised_over": "kept ids" if config.renormalised else "vocabulary",
        "unknown_label": config.unknown_label,
    }
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
        truncation=Truncation(method="topk", k=survey.k),
        temperatures=(1.0,),
        precision=config.precision,
        source={
            "path": config.path,
            "files": files,
            **options,
            "unknown_labels": survey.unknown,
            "unresolved_tails": 0 if config.renormalised else survey.unresolved,
            "fingerprint": identity,
        },
        sequences={
            "max_length": survey.longest,
            "counts": {"records": survey.records, "without_target": survey.skipped_records},
        },
    )


def _sequences(
    config: ImportConfig, survey: Survey, vocab_size: int, progress: Callable[[int, int], None]
) -> Iterator[ScoredSequence]:
    for done, record in enumerate(_records(config, vocab_size)):
        progress(done + 1, survey.records)
        sequence = _scored(config, record, survey.k, vocab_size)
        if sequence.num_targets:
            yield sequence


def _scored(config: ImportConfig, record: ForeignRecord, k: int, vocab_size: int) -> ScoredSequence:
    """The k most probable entries of each target, the mass of the rest, the actual token's."""
    is_label = record.token_ids == record.labels[:, None]
    known = is_label.any(axis=1)
    targets = np.flatnonzero(known) if config.unknown_label == "skip" else np.arange(len(known))
    values, known = record.values[targets], known[targets]
    if config.renormalised and len(targets):
        values = values - np.logaddexp.reduce(values[:, :k], axis=1)[:, None]
        log_tail = np.full(len(targets), -np.inf)
    else:
        log_tail = _log_tail(values, k, vocab_size)
    logprobs = values[:, :k].astype(np.float32)
    bound = np.where(np.isfinite(log_tail), np.minimum(logprobs[:, -1], log_tail), logprobs[:, -1])
    own = values[np.arange(len(targets)), is_label[targets].argmax(axis=1)]
    positions = record.positions[targets]
    is_target = np.zeros(len(record.input_ids), bool)
    is_target[positions] = True
    return ScoredSequence(
        sample_id=record.sample_id,
        input_ids=record.input_ids,
        is_target=is_target,
        positions=positions.astype(np.int32),
        token_ids=record.token_ids[targets, :k].astype(np.int32),
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
    tail = np.minimum(np.maximum(1 - p[:, :k].sum(axis=1), rest), (vocab_size - k) * p[:, k - 1])
    with np.errstate(divide="ignore"):
        return np.log(tail)
