"""The data of one optimizer step at a time, arranged and read ahead in a thread of its own."""

import dataclasses
import itertools
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from decant.student_train.data.batch import Batch
from decant.student_train.data.packing import arrange, lengths_of
from decant.student_train.data.stream import SequenceStream


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepData:
    """What this process takes to one optimizer step."""

    microbatches: list[Batch]
    """At least one; every process has as many."""
    state: dict[str, Any]
    """The stream's state behind this step: what a checkpoint after it needs."""
    epoch: float
    """How often the data has been passed behind this step."""
    num_tokens: int
    """Of this process, without padding."""

    @property
    def num_targets(self) -> int:
        """Of this process."""
        return sum(batch.num_targets for batch in self.microbatches)


def steps_of(
    stream: SequenceStream,
    *,
    num_microbatches: int,
    packing: str = "none",
    pin_memory: bool = False,
) -> Generator[StepData, None, None]:
    """The steps of a stream, from its state on, one ahead of what was taken.

    `packing` is as for `arrange`. The stream itself runs ahead: `StepData.state` is what counts.
    """
    batches = iter(stream)

    def next_step() -> StepData | None:
        microbatches = list(itertools.islice(batches, num_microbatches))
        if not microbatches:
            return None
        num_tokens = sum(int(lengths_of(batch).sum()) for batch in microbatches)
        microbatches = arrange(microbatches, packing)
        if pin_memory:
            microbatches = [batch.pin_memory() for batch in microbatches]
        return StepData(
            microbatches=microbatches,
            state=stream.state_dict(),
            epoch=stream.epoch,
            num_tokens=num_tokens,
        )

    with ThreadPoolExecutor(1, thread_name_prefix="steps") as thread:
        ahead = thread.submit(next_step)
        try:
            while (step := ahead.result()) is not None:
                ahead = thread.submit(next_step)
                yield step
        finally:
            stream.close()
            ahead.cancel()
            thread.submit(batches.close).result()
