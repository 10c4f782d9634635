"""The parts of a cache: the shard plan, and what is committed of it."""

from dataclasses import dataclass
from typing import Any

from decant.schemas.strict import check_counts, check_hash, from_json, to_json, with_later

REASON_LENGTH = 200
"""Characters of a reason for which a sequence was rejected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One sealed file of zstd-compressed JSON lines that belongs to the manifest."""

    name: str
    """Path relative to the cache."""
    entries: int
    """Lines."""
    bytes: int
    """Size on disk."""
    xxh3_128: str
    """Hash of the whole file."""

    def __post_init__(self) -> None:
        check_counts(self, "entries", "bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """Which sequences belong to one shard; a line of the plan segment."""

    shard: int
    first_sequence: int
    num_sequences: int
    num_tokens: int
    num_targets: int
    input_xxh3_128: str
    """Hash of the tokens to score: pins the input of this shard."""

    def __post_init__(self) -> None:
        check_counts(self, "shard", "first_sequence", "num_sequences", "num_tokens", "num_targets")
        if self.num_targets > self.num_tokens:
            raise ValueError(f"num_targets {self.num_targets} of num_tokens {self.num_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteRange:
    """A run of bytes of a shard and its hash."""

    offset: int
    length: int
    xxh3_128: str

    def __post_init__(self) -> None:
        check_counts(self, "offset", "length")
        check_hash("xxh3_128", self.xxh3_128)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """One row group: whole sequences, consecutive."""

    rows: int
    sequences: int
    targets: int
    data: ByteRange
    """All column chunks of the row group."""

    def __post_init__(self) -> None:
        check_counts(self, "rows", "sequences", "targets")
        if self.targets > self.rows or not 1 <= self.sequences <= self.rows:
            raise ValueError(
                f"sequences {self.sequences} and targets {self.targets} of {self.rows} rows"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A sequence that the teacher could not score: its rows are stored without targets."""

    sequence: int
    """Index in the shard plan."""
    sample_id: str
    targets: int
    """Targets lost."""
    reason: str
    """One line of at most REASON_LENGTH characters."""

    def __post_init__(self) -> None:
        if self.sequence < 0 or self.targets < 0:
            raise ValueError(f"a rejected sequence needs an index and a count >= 0, found {self}")
        if len(self.reason) > REASON_LENGTH or len(self.reason.splitlines()) > 1:
            raise ValueError(
                f"a reason is one line of at most {REASON_LENGTH} characters, found {self.reason!r}"
            )


OPTIONAL = ("logprob_error_mean", "logprob_error_max")
"""Fields of a commit record that are there from version 4 on where they are known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitRecord:
    """Says that a shard is complete; written after it."""

    shard: int
    cache_id: str
    first_sequence: int
    num_sequences: int
    rows: int
    targets: int
    """Those stored: the planned ones without those of rejected sequences."""
    rejected: tuple[Rejected, ...]
    """In plan order."""
    bytes: int
    xxh3_128: str
    """Hash of the whole shard file."""
    row_groups: tuple[RowGroup, ...]
    footer: ByteRange
    """Everything after the last row group."""
    kl_error_mean: float
    """Measured decoding error: mean over targets of KL(scored || decoded), nats."""
    kl_error_max: float
    logprob_error_mean: float | None
    """Measured too: mean over targets of the largest error of a kept entry's log prob, nats, log
    probs below -87 counting as that. None where it was not measured, and in older caches."""
    logprob_error_max: float | None
    """The largest of all."""
    seconds: float
    """Wall time from the first sequence to the commit."""
    worker: str
    """host:pid."""

    def __post_init__(self) -> None:
        check_counts(self, "shard", "first_sequence", "num_sequences", "rows", "targets", "bytes")
        check_hash("xxh3_128", self.xxh3_128)
        for name, of_group in (("rows", "rows"), ("num_sequences", "sequences"), ("targets",) * 2):
            found = sum(getattr(group, of_group) for group in self.row_groups)
            if found != getattr(self, name):
                raise ValueError(f"{name} {getattr(self, name)}, but row_groups sum to {found}")
        at = 0
        for i, group in enumerate(self.row_groups):
            if group.data.offset < at:
                raise ValueError(f"row_groups[{i}].data begins at {group.data.offset}, before {at}")
            at = group.data.offset + group.data.length
        end = self.footer.offset + self.footer.length
        if self.footer.offset < at or end != self.bytes:
            raise ValueError(
                f"footer must go from at least {at} to bytes {self.bytes}, found "
                f"{self.footer.offset} to {end}"
            )

    def to_json(self, version: int) -> dict[str, Any]:
        """The fields as this format version writes them."""
        fields = to_json(self)
        if version < 3:
            assert not self.rejected
            del fields["rejected"]
        for name in OPTIONAL:
            if fields[name] is None:
                del fields[name]
        return fields

    @staticmethod
    def parse(data: Any, where: str, version: int) -> "CommitRecord":
        """Strict load of what this format version wrote."""
        fields = with_later(data, {"rejected": []}, version, 3, where)
        if version < 4:
            fields = with_later(fields, dict.fromkeys(OPTIONAL), version, 4, where)
        elif isinstance(fields, dict):
            fields = {**dict.fromkeys(OPTIONAL), **fields}
        return from_json(CommitRecord, fields, where)


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over all shards, once the cache is final."""

    shards: int
    sequences: int
    tokens: int
    targets: int
    """Those stored, without those of rejected sequences."""
    rejected: int
    """Sequences without targets because the teacher could not score them."""
    bytes: int
    seconds: float

    def __post_init__(self) -> None:
        check_counts(self, "shards", "sequences", "tokens", "targets", "rejected", "bytes")
