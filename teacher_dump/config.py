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
SLOWEST_BYTES = 128 << 10
"""Per second, of a request or an answer on its way: slower clients are dropped."""


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


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class ServiceLimits:
    """What one service takes upon itself at a time; what is beyond is refused or put off."""

    max_body_bytes: int = 16 << 20
    """Bytes of one request; four times as many of all requests that are being received."""
    max_tokens: int = 1 << 20
    """Tokens of one request, and of all that are being scored or wait for it."""
    max_answer_bytes: int = 512 << 20
    """Bytes of one answer, and of all that are being made or sent: 524 per target at k=64."""
    max_requests: int = 256
    """Requests that are being scored or wait for it; later ones are told to come again."""
    max_connections: int = 512
    """Open connections; beyond, one that is idle or slow gives way to a new one. vllm: requests
    that are being received or answered."""
    client_seconds: float = 30.0
    """How long a client may take to send a request or to take an answer, and a second more for
    every 128 KiB."""

    def __post_init__(self) -> None:
        for name in (
            "max_body_bytes",
            "max_tokens",
            "max_answer_bytes",
            "max_requests",
            "max_connections",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"limits.{name} is {getattr(self, name)}, must be >= 1")
        if not 0 < self.client_seconds < float("inf"):
            raise ValueError(
                f"limits.client_seconds is {self.client_seconds}, must be positive and finite"
            )

    def seconds(self, size: int) -> float:
        """How long a client may take over so many bytes."""
        return self.client_seconds + size / SLOWEST_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Offer a teacher to dump jobs with `teacher.engine: http`."""

    teacher: TeacherConfig
    """The teacher, and the engine that runs it: transformers or vllm."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all, which needs api_key_env."""
    port: int = 8000
    """Port to listen on."""
    api_key_env: str = ""
    """Environment variable that holds the API key clients must send; "" asks for none."""
    allow_without_key: bool = False
    """Listen beyond this machine without an API key: whoever reaches the port uses the teacher."""
    max_length: int = 0
    """Longest sequence in tokens; 0 = what the model's configuration allows."""
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    """What clients may ask for at a time."""

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
        if self.allow_without_key and self.api_key_env:
            raise ValueError(
                f"allow_without_key has no effect with api_key_env {self.api_key_env}: leave one "
                "out"
            )
