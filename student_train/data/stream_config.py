"""What a stream of batches is asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from decant.storage import CacheReader, StoredRows
from decant.student_train.alignment.aligner import AlignedRows

ToEvents = Callable[[StoredRows], AlignedRows]
"""Makes of a row group the student's tokens and the events of their chunks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """What the streams of one cache, of several, and of a growing one are asked for."""

    batch_size: int
    """Sequences per batch and rank."""
    temperature: float | Sequence[float] = 1.0
    """Batches carry the targets at this temperature, or at each of several; all must be stored."""
    seed: int = 0
    """Of the order."""
    rank: int = 0
    """Whose share of the batches this is."""
    world_size: int = 1
    """How many ranks share them."""
    part: str = "all"
    """all, train or heldout: with `heldout_fraction`, a cache is split by sequence, the same way
    whatever the seed."""
    heldout_fraction: float = 0.0
    """Share of the sequences in the part heldout."""
    by_cache: bool = False
    """Of a mixture: whether the sequences of a batch stand together by cache, for losses that
    differ from one to the other, or as they come in the order."""
    lanes: int = 16
    """How many row groups of a cache are read from in turn. A rank holds at most about
    2 * lanes / world_size of them, undecoded (3 MB each at k=64)."""
    threads: int = 2
    """Threads that read ahead."""
    alignment: Callable[[CacheReader], ToEvents | None] | None = None
    """For a student of another tokenizer: what makes events of a cache, or None for a cache of the
    student's own. Row groups then are held decoded (10 MB each at k=64)."""
    vocab_size: int = 0
    """Of the student, with `alignment`; at least that of each cache of its own tokenizer."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}")
        if self.batch_size < 1 or self.threads < 1:
            raise ValueError("batch_size and threads must be at least 1")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """One or several."""
        if isinstance(self.temperature, Sequence):
            return tuple(self.temperature)
        return (self.temperature,)


def temperature_indices(reader: CacheReader, wanted: Sequence[float]) -> tuple[int, ...]:
    """Which stored temperatures these are. Raises ValueError naming the stored ones if not any."""
    stored = reader.manifest.temperatures
    for value in wanted:
        if value not in stored:
            raise ValueError(
                f"temperature {value:g} is not stored in {reader.url}, which has "
                f"{', '.join(f'{t:g}' for t in stored)}. It cannot be computed from a sparse "
                "cache: train at a stored one, or dump again with it in `temperatures`"
            )
    return tuple(stored.index(value) for value in wanted)
