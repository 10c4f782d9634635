"""The Arrow schema of a shard: one row is one token position.

Everything that a shard's physical form depends on is a `Layout`, derived from the manifest.
"""

import math
from dataclasses import dataclass

import pyarrow as pa

PRECISIONS = {"f32": 4, "f16": 2, "compact": 1}
"""Bytes per kept log prob before compression."""
NO_LOGPROBS = "none"
"""The precision of draws that are stored without log probs."""

ID_FORMS = ("planes", "lo16")
"""planes: a column of K bytes for each byte of an id. lo16: the low two of them interleaved."""
WIDE_VOCAB = 65_536
"""Ids from here on need a third byte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompactCode:
    """The curve of the compact precision: code q in 0..255 stands for the gap e(q) in nats.

    q = round(255 ln(1 + scale min(gap, limit)) / ln(1 + scale limit)).
    """

    scale: float = 1.0
    """Larger: finer near the most probable entry, coarser far from it."""
    limit: float = 24.0
    """Gaps to the most probable entry are clamped here, in nats (e^-24 = 4e-11)."""

    def __post_init__(self) -> None:
        if not (0 < self.scale < math.inf and 0 < self.limit < math.inf):
            raise ValueError(f"compact scale and limit must be positive and finite, found {self}")

    @property
    def step(self) -> float:
        """Width of a code on the scale ln(1 + scale gap)."""
        return math.log1p(self.scale * self.limit) / 255


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What decides the columns of a shard and their widths."""

    slots: int
    """K: entries per target."""
    vocab_size: int
    """Size of the shared vocabulary: ids are below it."""
    precision: str
    """How kept log probs are stored: f32, f16 or compact; none: the draws alone are."""
    temperatures: tuple[float, ...]
    """Stored temperatures, 1 first."""
    has_num_kept: bool
    """Whether the number of kept entries varies per target."""
    has_draws: bool
    """Whether entries carry draw counts."""
    ids: str = "planes"
    """How ids are stored: one of ID_FORMS."""
    code: CompactCode = CompactCode()
    """The curve of `compact`; without effect on the other precisions."""

    @property
    def wide(self) -> bool:
        """Whether ids need three bytes."""
        return self.vocab_size > WIDE_VOCAB

    @property
    def has_logprobs(self) -> bool:
        """Whether kept log probs and tails are stored; if not, the draws and the entropy are."""
        return self.precision != NO_LOGPROBS

    @property
    def id_columns(self) -> tuple[str, ...]:
        """The columns of the kept ids, or of the drawn ones: lowest bits first."""
        if self.ids == "lo16":
            names = ["topk_lo"]
        else:
            prefix = "topk" if self.has_logprobs else "drawn"
            names = [f"{prefix}_lo", f"{prefix}_mid"]
        return (*names, names[0].replace("lo", "hi")) if self.wide else tuple(names)

    @property
    def logprob_bytes(self) -> int:
        """Width of the `topk_logprob` blob of one target."""
        return PRECISIONS[self.precision] * self.slots if self.has_logprobs else 0


def log_z_column(temperature: float) -> str:
    """Name of the log Z column of a temperature."""
    return f"log_z_t{temperature:g}"


def log_tail_column(temperature: float) -> str:
    """Name of the log tail mass column of a temperature."""
    return f"log_tail_t{temperature:g}"


def shard_schema(layout: Layout) -> pa.Schema:
    """The Arrow schema of every shard of a cache with this layout; all columns non-null."""
    columns: list[tuple[str, pa.DataType]] = [
        ("sequence", pa.int64()),
        ("sample_id", pa.dictionary(pa.int32(), pa.string())),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("is_target", pa.bool_()),
    ]
    for name in layout.id_columns:
        two = layout.ids == "lo16" and name == "topk_lo"
        columns.append((name, pa.binary((1 + two) * layout.slots)))
    if layout.has_logprobs:
        columns += _distribution_columns(layout)
    else:
        columns.append(("entropy", pa.float32()))
    columns.append(("label_logprob", pa.float32()))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def _distribution_columns(layout: Layout) -> list[tuple[str, pa.DataType]]:
    columns: list[tuple[str, pa.DataType]] = [("topk_logprob", pa.binary(layout.logprob_bytes))]
    if layout.has_num_kept:
        columns.append(("num_kept", pa.uint16()))
    if layout.has_draws:
        columns.append(("draws", pa.binary(2 * layout.slots)))
    for temperature in layout.temperatures:
        if temperature != 1:
            columns.append((log_z_column(temperature), pa.float32()))
        columns.append((log_tail_column(temperature), pa.float32()))
    return columns
