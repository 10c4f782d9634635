"""The batches that a dry run measures are those that need the most memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from decant.student_train import CacheStream
from decant.student_train.data.heaviest import heaviest_heldout, heaviest_step


@pytest.mark.parametrize(("packing", "accumulation"), [("none", 1), ("none", 3), ("rows", 2)])
def test_a_run_has_no_larger_microbatch(cache: Path, packing: str, accumulation: int) -> None:
    """Of the steps of three epochs, none is larger by more than a tenth; nothing is consumed."""
    stream = CacheStream(cache, batch_size=4)
    num_steps = 3 * stream.num_sequences // (4 * accumulation)
    first, *_ = heaviest_step(stream, accumulation, packing, num_steps)
    assert stream.consumed == 0
    steps = stream.steps(accumulation, packing)
    sizes = [batch.input_ids.numel() for _ in range(num_steps) for batch in next(steps)]
    steps.close()
    assert max(sizes) <= 1.1 * first.input_ids.numel()
    assert first.input_ids.numel() <= 1.1 * max(sizes)


def test_the_largest_batch_of_an_evaluation_is_found(cache: Path) -> None:
    """Among those that an evaluation takes."""
    stream = CacheStream(cache, batch_size=5, part="heldout", heldout_fraction=0.4)
    batch = heaviest_heldout(stream)
    longest = max(sequence.input_ids.size for sequence in stream.reader)
    assert batch is not None and len(batch.sample_ids) <= 5
    assert batch.input_ids.shape[1] <= longest
