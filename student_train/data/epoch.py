"""One pass over a stream's part: finite and with a length, where the stream itself is endless."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from decant.student_train.data.batch import Batch

if TYPE_CHECKING:
    from decant.student_train.data.stream import CacheStream

S = TypeVar("S")
"""What a step is given as."""


class OnePass(Generic[S]):
    """The steps of a stream up to the end of the pass that it is in.

    `len` is how many are left, also while it is iterated.
    """

    def __init__(
        self,
        stream: "CacheStream",
        num_microbatches: int,
        packing: str,
        given: Callable[[list[Batch]], S],
    ) -> None:
        if num_microbatches < 1:
            raise ValueError(f"num_microbatches must be at least 1, found {num_microbatches}")
        self._stream, self._num_microbatches = stream, num_microbatches
        self._packing, self._given = packing, given
        self._end = (stream.consumed // stream.num_sequences + 1) * stream.num_sequences

    def __len__(self) -> int:
        size = self._stream.sequences_per_step * self._num_microbatches
        return max(0, -(-(self._end - self._stream.consumed) // size))

    def __iter__(self) -> Iterator[S]:
        steps = self._stream.steps(self._num_microbatches, self._packing)
        with contextlib.closing(steps):
            while len(self):
                yield self._given(next(steps))
