"""The batches of a run that need the most memory, by the lengths of some of its sequences."""

import itertools
import random
from collections.abc import Sequence

from decant.student_train.data.batch import Batch
from decant.student_train.data.heldout import heldout_batches
from decant.student_train.data.packing import deal, rows_of
from decant.student_train.data.stream import CacheStream, SequenceStream

LOOKED_AT = 32
"""Row groups whose sequences are looked at; a rank of a run holds about as many."""
TRIED_STEPS = 1000


def heaviest_step(
    stream: SequenceStream, num_microbatches: int, packing: str, steps: int
) -> list[Batch]:
    """The microbatches of a step of which one has the most tokens, padding included.

    Of as many steps as the run has, up to TRIED_STEPS, drawn from sequences of the first row groups
    of its order; all sequences of a small cache. Empty if none can be read yet.
    """
    sample = stream.next_sequences(LOOKED_AT)
    if not sample:
        return []
    size = stream.batch_size * num_microbatches
    draw = random.Random(0)
    lengths = [found.length for found in sample]
    longest = lengths.index(max(lengths))
    most: tuple[int, list[int]] = (-1, [])
    for _ in range(min(steps, TRIED_STEPS)):
        step = draw.sample(range(len(sample)), min(size, len(sample)))
        step += draw.choices(range(len(sample)), k=size - len(step))
        if longest not in step and size * steps >= len(sample):  # it comes in some step
            step[0] = longest
        most = max(most, (_tokens([lengths[i] for i in step], num_microbatches, packing), step))
    chosen = [sample[i] for i in most[1]]
    picks = deal([found.length for found in chosen], num_microbatches, packing)
    batches = [stream.collate([chosen[i] for i in group], packing) for group in picks]
    return sorted(batches, key=lambda batch: -batch.input_ids.numel())


def heaviest_heldout(stream: CacheStream) -> Batch | None:
    """The batch with the most tokens, padding included, among the first of an evaluation."""
    batches = itertools.islice(heldout_batches(stream), LOOKED_AT)
    return max((b for b, _ in batches), key=lambda batch: batch.input_ids.numel(), default=None)


def _tokens(lengths: Sequence[int], num_microbatches: int, packing: str) -> int:
    """Of the largest microbatch of a step, padding included."""
    sizes = []
    for group in deal(lengths, num_microbatches, packing):
        inside = [lengths[i] for i in group]
        rows = rows_of(inside, packing)
        sizes.append(len(rows) * max(sum(inside[i] for i in row) for row in rows))
    return max(sizes)
