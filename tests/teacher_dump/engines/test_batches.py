"""Claims about windows of sequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decant.teacher_dump.engines import EngineError
from decant.teacher_dump.engines.batches import windows
from decant.teacher_dump.inputs.records import TokenSequence


def sequences_of(lengths: list[int]) -> list[TokenSequence]:
    """Sequences of these lengths."""
    return [
        TokenSequence(str(i), np.zeros(n, np.int32), np.arange(n) > 0)
        for i, n in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 30)), st.integers(1, 60))
def test_windows_hold_all_in_order_and_no_more_than_allowed(
    lengths: list[int], max_tokens: int
) -> None:
    """As many as fit, each sequence in one window; one that is too long is alone."""
    sequences = sequences_of(lengths)
    cut = list(windows(sequences, max_tokens))
    assert [s for _, members in cut for s in members] == sequences
    assert [start for start, _ in cut] == list(
        np.cumsum([0, *(len(members) for _, members in cut)])[: len(cut)]
    )
    for number, (start, members) in enumerate(cut):
        tokens = sum(lengths[start : start + len(members)])
        assert tokens <= max_tokens or len(members) == 1
        if number + 1 < len(cut):
            assert tokens + lengths[start + len(members)] > max_tokens


def test_an_overlong_sequence_is_refused_by_name() -> None:
    """When its turn comes, not before those in front of it."""
    cut = windows(sequences_of([5, 5, 9]), 5, max_length=8)
    assert next(cut)[0] == 0
    with pytest.raises(EngineError, match="sample 2 has 9 tokens, this teacher reads at most 8"):
        list(cut)
