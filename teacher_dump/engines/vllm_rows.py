"""Packed rows: the sparse distribution of a target as 32-bit words, which cross the pipe.

One array per window instead of an object per token or sequence. A row is, in this order: K ids,
K log probs, K draws (only with sampling), T log Z, T log tail, 1 label log prob; floats keep their
bits.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from schemas import ScoredSequence
from teacher_dump.sequences import TokenSequence
from teacher_dump.sparsify import Sparse


def pack(sparse: Sparse) -> torch.Tensor:
    """[n, W] int32 of the distributions of n targets."""
    draws = [] if sparse.draws is None else [sparse.draws]
    columns = [sparse.token_ids, sparse.logprobs, *draws, sparse.log_z, sparse.log_tail]
    columns.append(sparse.label_logprob.unsqueeze(1))
    return torch.cat([column.contiguous().view(torch.int32) for column in columns], dim=1)


def unpack(
    sequence: TokenSequence,
    rows: NDArray[np.int32],
    *,
    slots: int,
    num_temperatures: int,
    has_draws: bool,
) -> ScoredSequence:
    """Join a token sequence with the packed rows [n, W] of its targets."""
    entries = [slots] * (3 if has_draws else 2)
    widths = [*entries, num_temperatures, num_temperatures, 1]
    assert rows.shape[1] == sum(widths)
    cut = np.split(rows, np.cumsum(widths)[:-1], axis=1)
    columns = [np.ascontiguousarray(column) for column in cut]
    log_z, log_tail, label = (column.view(np.float32) for column in columns[-3:])
    return ScoredSequence(
        sample_id=sequence.sample_id,
        input_ids=sequence.input_ids,
        is_target=sequence.is_target,
        positions=np.flatnonzero(sequence.is_target).astype(np.int32),
        token_ids=columns[0],
        logprobs=columns[1].view(np.float32),
        draws=columns[2] if has_draws else None,
        log_z=log_z,
        log_tail=log_tail,
        label_logprob=label[:, 0],
    )
