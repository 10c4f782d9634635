"""The configurations of a dump and of a service: frozen trees, the important fields first."""

from dataclasses import dataclass, field

from decant.schemas import PRECISIONS, Truncation
from decant.schemas.truncation import check_temperatures
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.config import REMOTE
from decant.teacher_dump.inputs.config import SequenceConfig, SourceConfig

LOWEST_TEMPERATURE = 0.01
"""Float32 log probs divided by less keep too few digits for the masses to sum to 1."""
HIGHEST_TEMPERATURE = 1e4
"""Every distribution is uniform long before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpConfig:
    """Score a source with a teacher into a cache."""

    output: str
    """Directory or fsspec URL of the cache; a rerun with the same config resumes."""
    teacher: TeacherConfig
    """The teacher, and the engine that runs it."""
    source: SourceConfig
    """The records to score, and where they are."""
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    """How records become token sequences."""
    truncation: Truncation = field(default_factory=Truncation)
    """Which entries of each distribution are kept, all others being one sum."""
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Temperatures at which training will be possible; 1 is always stored and comes first."""
    precision: str = "compact"
    """How kept log probs are stored: compact (1 byte, KL error about 5e-5 nats) | f16 | f32."""
    shard_targets: int = 2_000_000
    """Targets per shard, at least: about 256 MiB at k=64. A crash loses at most one shard."""
    max_rejected: float = 0.01
    """Share of a shard's sequences that may be left out, and listed, because the teacher cannot
    score them (3 always may); 0: the first one stops the dump."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty; it must name a directory or URL")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {tuple(PRECISIONS)}")
        if self.shard_targets < 1:
            raise ValueError(f"shard_targets is {self.shard_targets}, must be at least 1")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"max_rejected is {self.max_rejected}, must lie in [0, 1]")
        if self.sequences.target_share < 1 and not self.truncation.rule.has_entries:
            raise ValueError(
                f"sequences.target_share keeps targets by the entropy of their entries, of which "
                f"truncation.method {self.truncation.method} has none: use topk, or leave it out"
            )
        check_temperatures(tuple(self.temperatures))
        low, high = LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE
        if not all(low <= temperature <= high for temperature in self.temperatures):
            raise ValueError(
                f"temperatures must lie in [{low:g}, {high:g}], found {self.temperatures}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Offer a teacher to dump jobs with `teacher.engine: http`."""

    teacher: TeacherConfig
    """The teacher, and the engine that runs it: transformers or vllm."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """Port to listen on."""
    api_key_env: str = ""
    """Environment variable that holds the API key clients must send; "" asks for none."""
    max_length: int = 0
    """Longest sequence in tokens; 0 = what the model's configuration allows."""

    def __post_init__(self) -> None:
        if self.teacher.engine in REMOTE:
            raise ValueError(
                f"a service cannot have teacher.engine {self.teacher.engine}: use vllm or "
                "transformers"
            )
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}, must lie in [0, 65536)")
        if self.max_length < 0:
            raise ValueError(f"max_length is {self.max_length}, must be >= 0")
