"""The data of one optimizer step at a time, read ahead in a thread of its own."""

import dataclasses
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from decant.student_train.data.batch import Batch
from decant.student_train.data.stream import SequenceStream


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepData:
    """What this process takes to one optimizer step."""

    microbatches: list[Batch]
    """At least one; every process has as many."""
    state: dict[str, Any]
    """The stream's state after this step: what a checkpoint needs."""
    epoch: float
    """How often the data has been passed after this step."""

    @property
    def num_targets(self) -> int:
        """Targets of this process."""
        return sum(batch.num_targets for batch in self.microbatches)

    @property
    def num_tokens(self) -> int:
        """Tokens of this process, without padding."""
        return sum(batch.num_tokens for batch in self.microbatches)


def steps_of(
    stream: SequenceStream,
    *,
    num_microbatches: int,
    packing: str = "none",
    pin_memory: bool = False,
) -> Generator[StepData, None, None]:
    """The steps of a stream, from its state on, one ahead of what was taken.

    `packing` is as in `TrainConfig`. The stream itself runs ahead: `StepData.state` is what counts.
    """
    steps = stream.steps(num_microbatches, packing)

    def next_step() -> StepData | None:
        microbatches = next(steps, None)
        if microbatches is None:
            return None
        if pin_memory:
            microbatches = [batch.pin_memory() for batch in microbatches]
        return StepData(
            microbatches=microbatches,
            state=stream.state_dict(),
            epoch=stream.epoch,
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
            thread.submit(steps.close).result()
