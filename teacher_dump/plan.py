"""What a dump will cost, before it is paid: score a sample, measure, extrapolate."""

import dataclasses
import tempfile
import time

import numpy as np
from tqdm import tqdm

from schemas import Manifest, ScoredSequence, ShardPlan, TokenizerInfo
from storage import CacheWriter
from teacher_dump.config import DumpConfig
from teacher_dump.engines import open_engine
from teacher_dump.inputs import sharded
from teacher_dump.prepare import refuse_misfits
from teacher_dump.records import SourceError
from teacher_dump.sequences import SequenceCounts, TokenSequence
from teacher_dump.teacher import Teacher, describe_teacher


def plan(config: DumpConfig, sample: int = 64) -> str:
    """A table: sequences, targets, shards, bytes, hours, and retained mass for every smaller k.

    Tokenises the whole source (counts are exact), scores `sample` sequences drawn uniformly and
    extrapolates from those. Writes nothing to `config.output`.
    Raises ValueError as `dump` would for the same config.
    """
    if sample < 1:
        raise ValueError(f"sample must be at least 1, found {sample}")
    teacher = describe_teacher(config.teacher)
    refuse_misfits(config, teacher)
    counts = SequenceCounts()
    drawn, shards = _reservoir(config, teacher, counts, sample)
    if not drawn:
        raise SourceError(
            f"{config.source.path}: {counts.records} records give no sequence with a target"
        )
    engine = open_engine(
        config.teacher,
        teacher.model_path,
        vocab_size=teacher.shared_vocab_size,
        truncation=config.truncation,
        temperatures=tuple(config.temperatures),
        max_length=config.sequences.max_length,
    )
    try:
        list(engine.score(drawn[:1], 0))  # what only happens once is not extrapolated
        start = time.monotonic()
        scored = list(tqdm(engine.score(drawn, 0), desc="score", total=len(drawn), disable=None))
        seconds = time.monotonic() - start
    finally:
        engine.close()
    targets = sum(s.num_targets for s in scored)
    bytes_per_target = _bytes_per_target(config, teacher, scored)
    total_bytes = bytes_per_target * counts.targets
    lines = [
        f"records              {counts.records:,} ({counts.truncated_records:,} truncated, "
        f"{counts.split_records:,} split, {counts.records_without_targets:,} without targets)",
        f"sequences, tokens    {counts.sequences:,}, {counts.tokens:,} "
        f"({counts.dropped_tokens:,} tokens dropped)",
        f"targets, shards      {counts.targets:,}, {shards:,}",
        f"bytes                {total_bytes / 1e6:,.1f} MB, {bytes_per_target:.1f} per target",
        f"time                 {counts.targets / targets * seconds / 3600:.3f} hours at "
        f"{targets / seconds:,.0f} targets/s",
        f"from a sample of     {len(scored)} sequences, {targets:,} targets",
    ]
    if config.truncation.method != "sample":  # which keeps no top entries
        lines += ["", "      k   retained mass: mean      5 %   smallest"]
        for k, mass in retained_mass(scored, config.truncation.k).items():
            low = np.quantile(mass, 0.05)
            lines.append(f"{k:7d}{mass.mean():22.4f} {low:8.4f} {mass.min():10.4f}")
    return "\n".join(lines)


def retained_mass(scored: list[ScoredSequence], largest: int) -> dict[int, np.ndarray]:
    """For k = 1, 2, 4, ... up to `largest`: [n] mass of the k most probable ids at T=1."""
    logprobs = np.concatenate([s.logprobs[:, :largest] for s in scored])
    mass = np.exp(logprobs, dtype=np.float64).cumsum(axis=1)
    ladder = [1 << i for i in range(largest.bit_length()) if 1 << i < largest]
    return {k: mass[:, k - 1] for k in [*ladder, largest]}


def _reservoir(
    config: DumpConfig, teacher: Teacher, counts: SequenceCounts, size: int
) -> tuple[list[TokenSequence], int]:
    """A uniform sample of the source's sequences, the same at every run, and how many shards."""
    generator = np.random.default_rng(0)
    kept: list[tuple[int, TokenSequence]] = []
    index = shards = 0
    with tqdm(desc="tokenise", unit=" sequences", disable=None) as bar:

        def tokenised(counts: SequenceCounts) -> None:
            bar.update(counts.sequences - bar.n)

        for shard in sharded(config, teacher, counts, tokenised):
            shards += 1
            for sequence in shard:
                if len(kept) < size:
                    kept.append((index, sequence))
                elif (slot := int(generator.integers(index + 1))) < size:
                    kept[slot] = (index, sequence)
                index += 1
    return [sequence for _, sequence in sorted(kept, key=lambda entry: entry[0])], shards


def _bytes_per_target(config: DumpConfig, teacher: Teacher, scored: list[ScoredSequence]) -> float:
    """Size of the sample as a real shard."""
    draft = Manifest.draft(
        teacher=teacher.info,
        tokenizer=TokenizerInfo(fingerprint="", files={}),
        shared_vocab_size=teacher.shared_vocab_size,
        truncation=config.truncation,
        temperatures=tuple(config.temperatures),
        precision=config.precision,
        source={},
        sequences=dataclasses.asdict(config.sequences),
    )
    entry = ShardPlan(
        shard=0,
        first_sequence=0,
        num_sequences=len(scored),
        num_tokens=sum(len(s.input_ids) for s in scored),
        num_targets=sum(s.num_targets for s in scored),
        input_xxh3_128="",
    )
    with tempfile.TemporaryDirectory() as folder:
        writer = CacheWriter.create(folder, draft, [entry])
        with writer.shard(0) as shard:
            for sequence in scored:
                shard.write(sequence)
        return shard.bytes_written / entry.num_targets
