"""What crosses the pipe between the vLLM engine and its worker.

Numbers cross as a few arrays per window, never as an object per token; the distributions of
targets cross as packed rows (`packed_rows`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decant.teacher_dump.engines.packed_rows import Reduction
from decant.teacher_dump.engines.seam import Sampling

ROUTES = ("head", "prompt_logprobs")


class Refused(Exception):
    """Something that the user must change; the message says what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The teacher that is to be loaded, and how."""

    model_path: str
    trust_remote_code: bool
    """Whether the model's own Python files run."""
    dtype: str
    max_batch_tokens: int
    max_length: int
    """Longest sequence that will be scored; 0 = the model's own limit."""
    tensor_parallel: int
    route: str
    """One of ROUTES, or "" to choose."""
    on_cpu: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the worker does: the teacher, and what to make of its logits."""

    load: Load
    reduction: Reduction


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingJob:
    """As `Job`, for a worker that samples responses."""

    load: Load
    sampling: Sampling


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
    lengths: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]

    def sequences(self) -> Iterable[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Token ids and target positions of each."""
        ends = np.cumsum(self.lengths)[:-1]
        ids, masks = np.split(self.input_ids, ends), np.split(self.is_target, ends)
        for tokens, mask in zip(ids, masks, strict=True):
            yield tokens, np.flatnonzero(mask)

    def only(self, index: int) -> "Window":
        """The window of one of its sequences."""
        end = int(self.lengths[: index + 1].sum())
        chosen = slice(end - int(self.lengths[index]), end)
        return Window(
            self.number,
            self.first_sequence + index,
            self.lengths[index : index + 1],
            self.input_ids[chosen],
            self.is_target[chosen],
        )


@dataclass(frozen=True, slots=True, eq=False)
class ScoredWindow:
    """The packed rows of a window's targets, sequence by sequence."""

    number: int
    rows: list[NDArray[np.int32] | None]
    """None ends the list: for this sequence the teacher gives NaN or infinite logits."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The last message of a worker that gives up."""

    message: str
    is_clear: bool
    """Whether the message says all; else the worker's last lines belong to it."""
