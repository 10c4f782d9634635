"""The configuration of a dump: one frozen tree, the important fields first."""

from dataclasses import dataclass, field

from schemas import PRECISIONS, Truncation
from schemas.manifest import check_temperatures
from teacher_dump.engines import TeacherConfig
from teacher_dump.sequences import SequenceConfig
from teacher_dump.sources import SourceConfig

LOWEST_TEMPERATURE = 0.01
"""Float32 log probs divided by less keep too few digits for the masses to sum to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpConfig:
    """Score a source with a teacher into a cache."""

    output: str
    """Directory or fsspec URL of the cache; a rerun with the same config resumes."""
    teacher: TeacherConfig
    """Who scores."""
    source: SourceConfig
    """What is scored."""
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    """How records become token sequences."""
    truncation: Truncation = field(default_factory=Truncation)
    """Which entries of each distribution are kept."""
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Temperatures at which training will be possible; 1 is always stored and comes first."""
    precision: str = "compact"
    """How kept log probs are stored: compact (1 byte, KL error about 5e-5 nats) | f16 | f32."""
    shard_targets: int = 2_000_000
    """Targets per shard, at least: about 256 MiB at k=64. A crash loses at most one shard."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty; it must name a directory or URL")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {tuple(PRECISIONS)}")
        if self.shard_targets < 1:
            raise ValueError(f"shard_targets is {self.shard_targets}, must be at least 1")
        check_temperatures(tuple(self.temperatures))
        if min(self.temperatures) < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperatures must be at least {LOWEST_TEMPERATURE}, found {self.temperatures}"
            )
