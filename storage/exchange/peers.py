"""What trainers of other tools read of a cache: log probs of the most probable ids of each target.

Shapes: L tokens of a sequence, n targets, K slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from decant.schemas import ScoredSequence
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.rows import Rows

MOST_ENTRIES = 1 << 22
"""Of a table whose sequences are all of one length."""
NO_VALUE = -1e9
"""Of places without an entry: e^-1e9 is 0, and nothing computed from it is NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """What is written of every sequence."""

    slots: int
    """K."""
    longest: int
    """Tokens of the longest sequence."""
    temperature: float
    column: int
    """Of the temperature, in `log_z`."""
    renormalise: bool

    @staticmethod
    def of(reader: CacheReader, to: str, *, temperature: float, renormalise: bool) -> "Peer":
        """For a cache. Raises ValueError if its distributions are none that a trainer can take."""
        manifest = reader.manifest
        if not (manifest.layout.has_logprobs and manifest.truncation.rule.is_top):
            raise ValueError(
                f"{reader.url} keeps {manifest.truncation.text()}: {to} takes log probs of the "
                "most probable ids; --to lists writes what there is"
            )
        if temperature not in manifest.temperatures:
            stored = ", ".join(f"{t:g}" for t in manifest.temperatures)
            raise ValueError(
                f"--temperature {temperature:g} is not stored: {reader.url} has {stored}"
            )
        longest = 0
        if to == "distillkit":  # whose rows are all of one length
            longest = max((len(sequence.input_ids) for sequence in reader), default=0)
        return Peer(
            slots=manifest.layout.slots,
            longest=longest,
            temperature=temperature,
            column=manifest.temperatures.index(temperature),
            renormalise=renormalise,
        )

    def batches(self, rows: Rows) -> Iterator[list[ScoredSequence]]:
        """The sequences of a row group, few at a time where all are filled up to the longest."""
        each = max(MOST_ENTRIES // (self.longest * self.slots), 1) if self.longest else len(rows)
        for start in range(0, len(rows), max(each, 1)):
            yield [rows[i] for i in range(start, min(start + each, len(rows)))]

    def values(self, sequence: ScoredSequence) -> NDArray[np.float32]:
        """[n, K] log probs at the temperature, over the vocabulary or the kept ids."""
        assert sequence.logprobs is not None
        values: NDArray[np.float64] = sequence.logprobs / np.float64(self.temperature)
        values = values - sequence.log_z[:, self.column, None]
        if self.renormalise and len(values):
            values = values - np.logaddexp.reduce(values, axis=1)[:, None]
        return values.astype(np.float32)


def ragged(lengths: NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    """Lists of these lengths out of values that lie one after the other."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)
