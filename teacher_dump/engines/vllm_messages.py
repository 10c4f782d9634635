"""What crosses the pipe between the vLLM engine and its worker.

Numbers cross as a few arrays per window, never as an object per token. The distribution of a target
is a packed row of 32-bit words, in this order: K ids, K log probs, K draws (only with sampling),
T log Z, T log tail, 1 label log prob; floats keep their bits.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from schemas import ScoredSequence, Truncation
from teacher_dump.sequences import TokenSequence
from teacher_dump.sparsify import Sparse

ROUTES = ("head", "prompt_logprobs")


class Refused(Exception):
    """Something that the user must change; the message says what."""


def not_finite(sample_id: str) -> Refused:
    """The error that names the sample."""
    return Refused(
        f"the teacher gives NaN or infinite logits for sample {sample_id}; "
        "try teacher.dtype: float32, and look at the record"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the worker loads."""

    model_path: str
    dtype: str
    max_batch_tokens: int
    vocab_size: int
    truncation: Truncation
    temperatures: tuple[float, ...]
    max_length: int
    route: str
    """One of ROUTES, or "" to choose."""
    on_cpu: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker's answer to a job."""

    route: str
    why: str
    """Why this route, if it is not the first choice."""
    version: str
    dtype: str
    max_length: int
    """Longest sequence that can be scored: the job's, or less if the model allows less."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Sequences to score, laid end to end."""

    number: int
    first_sequence: int
    sample_ids: list[str]
    lengths: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]

    def sequences(self) -> Iterable[tuple[str, NDArray[np.int32], NDArray[np.int64]]]:
        """Sample id, token ids and target positions of each."""
        ends = np.cumsum(self.lengths)[:-1]
        ids, masks = np.split(self.input_ids, ends), np.split(self.is_target, ends)
        for sample_id, tokens, mask in zip(self.sample_ids, ids, masks, strict=True):
            yield sample_id, tokens, np.flatnonzero(mask)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The packed rows of a window's targets, in order."""

    number: int
    rows: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Failed:
    """The last message of a worker that gives up."""

    message: str


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
