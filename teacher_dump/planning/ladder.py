"""What each k would keep of a scored sample, lose of it, and take on disk.

Smaller k are cut out of one large one, which is the reference that their loss is measured against.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Manifest, ScoredSequence, TokenizerInfo, Truncation
from decant.storage import CacheReader
from decant.storage.cache.writer import write_cache
from decant.storage.files.scratch import scratch_folder
from decant.storage.inspect.curve import finite, shown_ks
from decant.storage.inspect.cuts import cut
from decant.storage.inspect.truncation_cost import LOWEST_TAIL, TruncationSums, target_costs
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
    mass_error: float | None
    """Its standard error over sequences; None with fewer than two."""
    mass_low: float
    """Its 5 % quantile."""
    mass_least: float
    kl: float
    """Nats per target by which k entries are farther from the teacher than the reference's: mean of
    KL(teacher || the k entries, the rest spread evenly); see docs/losses.md."""
    kl_error: float | None
    """Its standard error over sequences; None with fewer than two."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """What each k keeps, loses and takes."""

    rungs: tuple[Rung, ...]
    beyond: float
    """Nats per target that the largest of them may be away from the teacher, at most: the mean."""
    beyond_error: float | None
    """Its standard error over sequences; None with fewer than two."""


def cut_ladder(
    config: DumpConfig,
    teacher: Teacher,
    full: list[ScoredSequence],
    weights: list[float],
    num_targets: int,
    shards: int,
) -> Ladder:
    """The ladder of the sample `full`, whose sequences stand for so many each (`weights`)."""
    slots = full[0].token_ids.shape[1]
    sums, mass = TruncationSums(slots), []
    for sequence, weight in zip(full, weights, strict=True):
        costs = _costs(sequence, teacher.shared_vocab_size)
        sums.add(costs[:, None], np.array([sequence.num_targets]), weight)
        mass.append(np.exp(_entries(sequence)[0], dtype=np.float64).cumsum(axis=1))
    means = sums.means()
    of_target = np.concatenate(
        [np.full(one.num_targets, w) for w, one in zip(weights, full, strict=True)]
    )
    mass_NK = np.concatenate(mass)
    ladder = []
    for k in _steps(config.truncation, slots):
        shorter = [cut(sequence, k, tuple(config.temperatures)) for sequence in full]
        changed = dataclasses.replace(config, truncation=Truncation(k=k))
        num_bytes = round(shard_bytes(changed, teacher, shorter).of(num_targets, shards))
        low = np.quantile(mass_NK[:, k - 1], 0.05, method="inverted_cdf", weights=of_target)
        ladder.append(
            Rung(
                k=k,
                mass_mean=float(means.mass[k - 1]),
                mass_error=finite(float(means.mass_error[k - 1])),
                mass_low=float(low),
                mass_least=float(mass_NK[:, k - 1].min()),
                kl=float(means.fkl[k - 1]),
                kl_error=finite(float(means.fkl_error[k - 1])),
                bytes_per_target=num_bytes / num_targets,
                bytes=num_bytes,
            )
        )
    beyond_error = finite(means.beyond_error)
    return Ladder(rungs=tuple(ladder), beyond=means.beyond, beyond_error=beyond_error)


def _steps(truncation: Truncation, slots: int) -> list[int]:
    """Powers of two and halves between them, the configured k, and the largest."""
    steps = {k for k in shown_ks(slots) if k >= SMALLEST_K}
    if truncation.rule.has_head:
        steps.add(truncation.k)
    return sorted({*steps, slots})


def _costs(sequence: ScoredSequence, vocab_size: int) -> NDArray[np.float64]:
    """[3K+1] `target_costs` summed over the targets of one sequence."""
    logprobs, log_tail = _entries(sequence)
    total = np.zeros(3 * logprobs.shape[1] + 1)
    for start in range(0, sequence.num_targets, BLOCK):
        block = slice(start, start + BLOCK)
        log_p = np.maximum(logprobs[block].T, LOWEST_TAIL, order="C")
        costs = target_costs(log_p, np.exp(log_p), log_tail[block, 0], None, vocab_size)
        total += costs.sum(axis=1, dtype=np.float64)
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardBytes:
    """What a sample says of shards of its like."""

    per_target: float
    """Of the row groups."""
    per_shard: float
    """Of all else."""
    logprob_error: tuple[float | None, float | None]
    """Mean and largest, over targets, of the worst log prob's error, nats; None without one."""

    def of(self, targets: int, shards: int) -> float:
        """Of so many targets in so many shards."""
        return self.per_target * targets + self.per_shard * shards


def shard_bytes(config: DumpConfig, teacher: Teacher, scored: list[ScoredSequence]) -> ShardBytes:
    """The sample as a real shard."""
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
    with scratch_folder() as folder:
        write_cache(folder, draft, scored)
        (record,) = CacheReader(folder).index
    data = sum(group.data.length for group in record.row_groups)
    return ShardBytes(
        per_target=data / record.targets,
        per_shard=float(record.bytes - data),
        logprob_error=(record.logprob_error_mean, record.logprob_error_max),
    )


def _entries(sequence: ScoredSequence) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[n, K] log probs and [n, T] log tails, which all but draws alone have."""
    assert sequence.logprobs is not None and sequence.log_tail is not None
    return sequence.logprobs, sequence.log_tail
