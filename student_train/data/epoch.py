"""One pass over a stream's part: finite and with a length, where the stream itself is endless."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

from decant.student_train.data.batch import Batch

if TYPE_CHECKING:
    from decant.student_train.data.stream import CacheStream

S = TypeVar("S")
"""What a step is given as."""


class OnePass(Generic[S]):
    """The steps of a stream up to the end of the pass that it is in.

    `len` is how many the next iteration gives. Iterated again after the end, it gives the next
    pass; left in between, the rest of this one.
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

    def __len__(self) -> int:
        size = self._stream.sequences_per_step * self._num_microbatches
        left = self._stream.num_sequences - self._stream.consumed % self._stream.num_sequences
        return -(-left // size)

    def __iter__(self) -> Iterator[S]:
        count = len(self)
        steps = self._stream.steps(self._num_microbatches, self._packing)
        with contextlib.closing(steps):
            for microbatches in islice(steps, count):
                yield self._given(microbatches)
