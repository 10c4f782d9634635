"""What `inspect` says of a cache, as plain data; `docs/format.md` explains every key."""

from dataclasses import dataclass
from typing import Any

from decant.schemas import NO_LOGPROBS, Rejected, TeacherInfo, Truncation
from decant.storage.inspect.examples import Target

RANKS = {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The distribution of one quantity: extremes, quantiles (smallest value at a rank), mean."""

    min: float
    p01: float
    p05: float
    p25: float
    p50: float
    p75: float
    p95: float
    p99: float
    max: float
    mean: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Exact counts of values in [edges[i], edges[i+1]); the last bin holds its upper edge too."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ValueError unless it can be drawn."""
        if min(self.counts, default=0) < 0:
            raise ValueError(f"counts must not be negative, found {min(self.counts)}")
        if self.counts and len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.counts)} counts have {len(self.edges)} edges")


@dataclass(frozen=True, kw_only=True, slots=True)
class AtTemperature:
    """What is kept of the teacher's distributions at one stored temperature."""

    temperature: float
    retained_mass: Spread | None
    """1 - exp(log tail) of each target; None where draws alone are stored."""
    retained_mass_histogram: Histogram
    teacher_entropy: Spread
    """Nats, over the kept entries and the tail as one bucket: a lower bound of the full entropy,
    and a loose one where much lies in the tail. Where draws alone are stored, the full one."""
    teacher_entropy_histogram: Histogram
    teacher_entropy_least: Spread
    """Nats: the full entropy is at least this, as no id of the tail has more than the last kept."""
    teacher_entropy_least_histogram: Histogram
    teacher_entropy_most: Spread
    """Nats: and at most this, with the tail spread evenly over the ids that are not kept."""
    akl_inexact: float | None
    """Share of targets whose kept mass at this temperature is below AKL's mu = 0.5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReliabilityBin:
    """The targets whose top-1 probability lies in one of 15 equal parts (a, b] of [0, 1]."""

    targets: int
    confidence: float | None
    """Mean top-1 probability."""
    accuracy: float | None
    """Share whose first kept entry is the token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AtK:
    """What the cache would hold if it were cut at its first k entries; means over targets."""

    k: int
    retained_mass: float
    retained_mass_error: float | None
    """Its standard error over sequences; None with fewer than two."""
    fkl: float
    """What the forward KL loses against the entries that are stored, nats: see
    `storage.inspect.truncation_cost`."""
    fkl_error: float | None
    """Its standard error over sequences; None with fewer than two."""
    rkl: float
    """A lower bound of KL(what k entries tell || teacher), nats; no cost of the reverse KL, which
    depends on the student's mass outside the k ids."""
    bytes_per_target: float | None
    """Of a cache of k entries, measured on some of the targets; None where it was not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpeed:
    """What one process dumped."""

    worker: str
    shards: int
    targets: int
    seconds: float
    targets_per_second: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpSpeed:
    """How fast the shards were made."""

    shard_rates: tuple[float, ...]
    """Targets per second of the shards in plan order, in at most 60 runs of neighbours."""
    by_worker: tuple[WorkerSpeed, ...]
    """The processes with the most targets, at most 32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Which row groups were looked at, if not all: then every figure of values is an estimate."""

    row_groups: int
    of_row_groups: int
    targets: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `inspect` found; everything but the plan's numbers counts committed shards only."""

    url: str
    complete: bool
    """Whether every planned shard is committed and the cache is sealed."""
    cache_id: str
    format_version: int
    teacher: TeacherInfo
    tokenizer_fingerprint: str
    """Empty when the source was ready ids without a tokenizer."""
    shared_vocab_size: int
    truncation: Truncation
    precision: str
    source: dict[str, Any]
    records: dict[str, int]
    """What became of the source's records: the counts of the manifest; empty if it has none."""
    planned_shards: int
    planned_targets: int
    """Those of rejected sequences too."""
    shards: int
    sequences: int
    tokens: int
    targets: int
    """Those stored."""
    rejected_sequences: int
    """Sequences that the teacher could not score; they are stored without targets."""
    rejected_targets: int
    """Targets lost with them."""
    rejected: tuple[Rejected, ...]
    """The first 20 of them."""
    sample: Sample | None
    """None when all row groups were looked at."""
    sequence_length: Spread | None
    """Tokens per sequence; this and all below is None without targets."""
    sequence_length_histogram: Histogram | None
    duplicate_sequences: int | None
    """Sequences whose tokens are those of another one before; None with a sample."""
    duplicates_exact: bool
    """Whether that is a count, and no estimate as beyond `statistics.HASH_LIMIT` sequences."""
    bytes: int
    """Of the shard files."""
    bytes_per_target: float | None
    column_bytes: dict[str, int]
    """Compressed bytes of each column; what `bytes` has beyond their sum are the footers."""
    dense_fp16_bytes: int
    """2 V bytes per target: what fp16 logits would take."""
    times_smaller: float | None
    """`dense_fp16_bytes / bytes`."""
    num_kept: Spread | None
    """Entries per target."""
    ids_kept: int
    """How many of the V ids are among the kept entries of some target."""
    ids_in_data: int
    """How many of the V ids are some token of the data."""
    temperatures: tuple[AtTemperature, ...]
    """One for each stored temperature, in the manifest's order; empty without entries."""
    worst_targets: tuple[Target, ...]
    """The 20 of the least retained mass at T=1, worst first; of equal contexts the first."""
    teacher_ce: float | None
    """Cross-entropy of the teacher on the data's own next tokens: mean of -label_logprob, nats."""
    teacher_perplexity: float | None
    """exp(teacher_ce)."""
    top1_agreement: float | None
    """Share of targets whose most probable kept entry is the actual token."""
    label_kept: float | None
    """Share of targets whose actual token is among the kept entries."""
    top1_probability: Spread | None
    """Probability of the first kept entry at T=1."""
    calibration_error: float | None
    """Expected calibration error of the top-1 probability over the 15 bins of `reliability`."""
    reliability: tuple[ReliabilityBin, ...]
    truncation_curve: tuple[AtK, ...]
    """For k = 1 to K; empty with draws, whose entries are no top k."""
    recommended_k: int | None
    """The k below K that a budget of bytes or nats asks for; None without a budget or such a k."""
    beyond_k: float | None
    """At most this much more, in nats, would the forward KL gain from keeping all V ids."""
    beyond_k_error: float | None
    """Its standard error over sequences; None with fewer than two."""
    akl_head_size: Spread | None
    """Kept entries in AKL's head at mu = 0.5, T=1, by the authors' rule."""
    akl_inexact: float | None
    """Share of targets whose kept mass is below mu, so that the head reaches beyond the entries."""
    kl_error_mean: float | None
    """KL(scored || decoded) as measured while writing, nats; mean over targets."""
    kl_error_max: float | None
    logprob_error_mean: float | None
    """Mean over targets of the largest error of a kept entry's log prob, nats, as measured while
    writing: what the reverse KL of any student moves by, at most. None in older caches."""
    logprob_error_max: float | None
    dump_seconds: float
    """Wall time summed over shards."""
    targets_per_second: float | None
    """`targets / dump_seconds`: the rate of one worker."""
    workers: int
    """Processes that committed shards."""
    dump_speed: DumpSpeed

    @property
    def has_logprobs(self) -> bool:
        """Whether the cache stores log probs of kept entries."""
        return self.precision != NO_LOGPROBS

    @property
    def has_entries(self) -> bool:
        """Whether the cache keeps entries at all."""
        return self.truncation.rule.has_entries
