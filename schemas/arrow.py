"""The Arrow schema of a shard: one row is one token position.

Everything that a shard's physical form depends on is a `Layout`, derived from the manifest.
"""

import math
from dataclasses import dataclass

import pyarrow as pa

from decant.schemas.distributions import FIELDS, ONE, TEMPERATURES

PRECISIONS = {"f32": 4, "f16": 2, "compact": 1}
"""Bytes per kept log prob before compression."""
SAMPLER_COLUMN = "sampler_logprob"
"""The column of `ScoredSequence.sampler_logprobs`."""
NO_LOGPROBS = "none"
"""The precision of draws that are stored without log probs."""

ID_FORMS = ("ranked", "planes", "lo16")
"""How kept entries are stored. ranked: ids by their numbers in a numbering of the row group, a
column of K bytes for each byte of a number; differences of log probs in planes. planes: a column
for each byte of an id; log probs in one column. lo16: the low two bytes of ids interleaved."""
WIDE_VOCAB = 65_536
"""Numbers from here on need a third byte."""
ROOM = 8_192
"""Numbers beyond the vocabulary that two bytes must have room for, or three are taken."""


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
    fields: tuple[str, ...]
    """The fields of `Distributions` that are stored."""
    ids: str = "planes"
    """How ids are stored: one of ID_FORMS."""
    has_messages: bool = False
    """Whether conversations are kept."""
    has_sampler: bool = False
    """Whether the sampler's log prob of each target is kept."""
    code: CompactCode = CompactCode()
    """The curve of `compact`; without effect on the other precisions."""
    rounded: bool = False
    """Whether a writer rounds the numbers per target."""

    @property
    def ranked(self) -> bool:
        """Whether ids are stored by their numbers, and log probs by their differences."""
        return self.ids == "ranked"

    @property
    def wide(self) -> bool:
        """Whether ids, or their numbers, need three bytes."""
        return self.vocab_size + (ROOM if self.ranked else 0) > WIDE_VOCAB

    @property
    def has_logprobs(self) -> bool:
        """Whether kept log probs and tails are stored."""
        return "logprobs" in self.fields

    @property
    def has_draws(self) -> bool:
        """Whether entries carry draw counts."""
        return "draws" in self.fields

    @property
    def id_columns(self) -> tuple[str, ...]:
        """The columns of the kept ids, or of the drawn ones: lowest bits first."""
        if not self.slots:
            return ()
        if self.ids == "lo16":
            names = ["topk_lo"]
        else:
            prefix = "topk" if self.has_logprobs else "drawn"
            names = [f"{prefix}_lo", f"{prefix}_mid"]
        return (*names, names[0].replace("lo", "hi")) if self.wide else tuple(names)

    @property
    def logprob_columns(self) -> dict[str, int]:
        """The columns of the kept log probs and their widths: lowest bits first."""
        if not self.has_logprobs:
            return {}
        each = PRECISIONS[self.precision]
        if not self.ranked:
            return {"topk_logprob": each * self.slots}
        if self.precision == "compact":
            return dict.fromkeys(("topk_code_lo", "topk_code_hi"), -(-self.slots // 2))
        return {f"topk_logprob_{i}": self.slots for i in range(each)}


def temperature_column(name: str, temperature: float) -> str:
    """Name of the column of a field that has a number for each temperature."""
    return f"{name}_t{temperature:g}"


def temperature_columns(layout: Layout) -> list[tuple[str, int, str]]:
    """(field, index of the temperature, column) of every number per temperature that is stored.

    By temperature, in the order of the columns. Log Z at T=1 is 0 and has no column.
    """
    names = [name for name in layout.fields if FIELDS[name].axis == TEMPERATURES]
    return [
        (name, i, temperature_column(name, temperature))
        for i, temperature in enumerate(layout.temperatures)
        for name in names
        if not (name == "log_z" and temperature == 1)
    ]


def scalar_columns(layout: Layout) -> list[str]:
    """The fields with one number per target, whose columns bear their names: the label's last."""
    names = [name for name in layout.fields if FIELDS[name].axis == ONE]
    return sorted(names, key=lambda name: name == "label_logprob")


def shard_schema(layout: Layout) -> pa.Schema:
    """The Arrow schema of every shard of a cache with this layout; all columns non-null."""
    columns: list[tuple[str, pa.DataType]] = [
        ("sequence", pa.int64()),
        ("sample_id", pa.dictionary(pa.int32(), pa.string())),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("is_target", pa.bool_()),
    ]
    if layout.has_messages:
        columns.insert(2, ("messages", pa.string()))
    for name in layout.id_columns:
        two = layout.ids == "lo16" and name == "topk_lo"
        columns.append((name, pa.binary((1 + two) * layout.slots)))
    if layout.has_logprobs:
        columns += [(name, pa.binary(width)) for name, width in layout.logprob_columns.items()]
        if layout.has_num_kept:
            columns.append(("num_kept", pa.uint16()))
        if layout.has_draws:
            columns.append(("draws", pa.binary(2 * layout.slots)))
    columns += [(column, pa.float32()) for _, _, column in temperature_columns(layout)]
    columns += [(column, pa.float32()) for column in scalar_columns(layout)]
    if layout.has_sampler:
        columns.append((SAMPLER_COLUMN, pa.float32()))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])
