"""One record of a source, and the error that names a bad one."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Row = tuple[str, str, dict[str, Any]]
"""The id it gets without an id field, where it stands, its fields."""


class SourceError(ValueError):
    """The input data, or the path to it, cannot be used; the message says where and what to do."""


class Unrenderable(SourceError):
    """One conversation cannot become a sequence as it is meant; others of the source may."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the source, as it was found."""

    sample_id: str
    fields: dict[str, Any]
    where: str
    """For error messages, e.g. "data.jsonl.zst line 12" (lines from 1, rows from 0)."""
    messages: str = ""
    """The conversation that it is, as `schemas.Conversation` writes it; "" where that is not known,
    or not yet."""
    sampler_logprobs: npt.NDArray[np.float32] | None = None
    """Of ready ids: as `TokenSequence` has them."""


Ids = npt.NDArray[np.int64]


Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """What the teacher reads in one forward, and the tokens whose prediction is stored."""

    sample_id: str
    input_ids: npt.NDArray[np.int32]
    """[L]"""
    is_target: Mask
    """[L]; [0] is always False: nothing predicts the first token."""
    messages: str = ""
    """The conversation that the tokens are of, as `schemas.Conversation` writes it; or ""."""
    sampler_logprobs: npt.NDArray[np.float32] | None = None
    """[L] nats, of the model that sampled the targets, as `ScoredSequence` has them; 0 elsewhere.
    None where that is the teacher, or nobody."""
