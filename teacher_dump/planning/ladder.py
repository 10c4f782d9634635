"""What each k would keep of a scored sample, lose of it, and take on disk.

Smaller k are cut out of one large one, which is the reference that their loss is measured against.
"""

import dataclasses
import tempfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Manifest, ScoredSequence, TokenizerInfo, Truncation
from decant.storage import CacheReader
from decant.storage.cache.writer import write_cache
from decant.storage.inspect.truncation_cost import LOWEST_TAIL, TruncationSums, truncation_sums
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.teacher import Teacher

SMALLEST_K = 4
REFERENCE_K = 512
"""Entries that the sample is scored with, at least, to cut smaller k from; or the vocabulary."""
BLOCK = 4096
"""Targets whose truncation is reckoned at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """What `truncation: {method: topk, k: k}` would keep, lose and take."""

    k: int
    mass_mean: float
    """Retained mass at T=1."""
    mass_low: float
    """Its 5 % quantile."""
    mass_least: float
    kl: float
    """Nats per target by which k entries are farther from the teacher than the reference's: mean of
    KL(teacher || the k entries, the rest spread evenly); see docs/losses.md."""
    bytes_per_target: float
    bytes: int


def reference_truncation(truncation: Truncation, teacher: Teacher) -> Truncation:
    """The one to score a sample with, so that every k of interest can be cut out of it.

    A teacher that gives few entries sets its size.
    """
    k = min(teacher.shared_vocab_size, max(REFERENCE_K, 2 * truncation.k))
    if teacher.sample_entries:
        k = min(k, max(teacher.sample_entries, truncation.slots))
    return Truncation(k=k)


def cut_ladder(
    config: DumpConfig,
    teacher: Teacher,
    full: list[ScoredSequence],
    weights: list[float],
    num_targets: int,
    shards: int,
) -> tuple[tuple[Rung, ...], float]:
    """What each k keeps, loses and takes; and how far the reference may be from the teacher."""
    slots = full[0].token_ids.shape[1]
    sums, mass = None, []
    for sequence, weight in zip(full, weights, strict=True):
        of_sequence = _sums(sequence, teacher.shared_vocab_size)
        scaled = TruncationSums(
            of_sequence.mass * weight,
            of_sequence.fkl * weight,
            of_sequence.rkl * weight,
            of_sequence.beyond * weight,
        )
        sums = scaled if sums is None else sums + scaled
        mass.append(np.exp(_entries(sequence)[0], dtype=np.float64).cumsum(axis=1))
    assert sums is not None
    total = sum(w * one.num_targets for w, one in zip(weights, full, strict=True))
    of_target = np.concatenate(
        [np.full(one.num_targets, w) for w, one in zip(weights, full, strict=True)]
    )
    mass_NK = np.concatenate(mass)
    ladder = []
    for k in _steps(config.truncation, slots):
        cut = [_cut(sequence, k, tuple(config.temperatures)) for sequence in full]
        changed = dataclasses.replace(config, truncation=Truncation(k=k))
        per_target, overhead = shard_bytes(changed, teacher, cut)
        num_bytes = round(per_target * num_targets + overhead * shards)
        low = np.quantile(mass_NK[:, k - 1], 0.05, method="inverted_cdf", weights=of_target)
        ladder.append(
            Rung(
                k=k,
                mass_mean=float(sums.mass[k - 1] / total),
                mass_low=float(low),
                mass_least=float(mass_NK[:, k - 1].min()),
                kl=float(sums.fkl[k - 1] / total),
                bytes_per_target=num_bytes / num_targets,
                bytes=num_bytes,
            )
        )
    return tuple(ladder), sums.beyond / total


def _steps(truncation: Truncation, slots: int) -> list[int]:
    """Powers of two, the configured k, and the largest."""
    steps = {1 << i for i in range(slots.bit_length()) if SMALLEST_K <= 1 << i <= slots}
    if truncation.rule.has_head:
        steps.add(truncation.k)
    return sorted({*steps, slots})


def _sums(sequence: ScoredSequence, vocab_size: int) -> TruncationSums:
    """The sums of `truncation_cost` over the targets of one sequence."""
    logprobs, log_tail = _entries(sequence)
    sums: TruncationSums | None = None
    for start in range(0, sequence.num_targets, BLOCK):
        block = slice(start, start + BLOCK)
        log_p = np.maximum(logprobs[block].T, LOWEST_TAIL, order="C")
        one = truncation_sums(log_p, np.exp(log_p), log_tail[block, 0], None, vocab_size)
        sums = one if sums is None else sums + one
    assert sums is not None
    return sums


def _cut(sequence: ScoredSequence, k: int, temperatures: tuple[float, ...]) -> ScoredSequence:
    """The sequence as a dump at this k gives it."""
    logprobs, log_tail_K = _entries(sequence)
    log_tail = np.empty_like(log_tail_K)
    for i, temperature in enumerate(temperatures):
        beyond = logprobs[:, k:].astype(np.float64) / temperature - sequence.log_z[:, i, None]
        everything = np.concatenate([beyond, log_tail_K[:, i, None]], axis=1)
        log_tail[:, i] = np.logaddexp.reduce(everything, axis=1)
    return dataclasses.replace(
        sequence,
        token_ids=np.ascontiguousarray(sequence.token_ids[:, :k]),
        logprobs=np.ascontiguousarray(logprobs[:, :k]),
        log_tail=log_tail,
    )


def shard_bytes(
    config: DumpConfig, teacher: Teacher, scored: list[ScoredSequence]
) -> tuple[float, float]:
    """Of the sample as a real shard: bytes of the row groups per target, and the rest."""
    draft = Manifest.draft(
        teacher=teacher.info,
        tokenizer=TokenizerInfo(fingerprint="", files={}),
        shared_vocab_size=teacher.shared_vocab_size,
        truncation=config.truncation,
        temperatures=tuple(config.temperatures),
        precision=config.precision,
        source={},
        sequences=dataclasses.asdict(config.sequences),
        messages=any(sequence.messages is not None for sequence in scored),
        sampler_logprobs=scored[0].sampler_logprobs is not None,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_cache(folder, draft, scored)
        (record,) = CacheReader(folder).index
    data = sum(group.data.length for group in record.row_groups)
    return data / record.targets, float(record.bytes - data)


def _entries(sequence: ScoredSequence) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[n, K] log probs and [n, T] log tails, which all but draws alone have."""
    assert sequence.logprobs is not None and sequence.log_tail is not None
    return sequence.logprobs, sequence.log_tail
