"""The distributions of targets as rows of 32-bit words, as they cross pipes and networks.

A row holds the fields of `Distributions` that the truncation method gives, in the order of their
list: K ids, K log probs, K draws, T log Z, T log tail, 1 label log prob, 1 entropy; floats keep
their bits. `Reduction` says how the rows came about.
Shapes: n targets, K slots, T temperatures, W words.
"""

import functools
import json
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decant.schemas import ScoredSequence, Truncation, from_json, to_json
from decant.schemas.distributions import FIELDS, ONE
from decant.teacher_dump.engines.sparsify import Sparse
from decant.teacher_dump.inputs.records import TokenSequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """How logits become what is stored."""

    vocab_size: int
    """Logits beyond the shared vocabulary are cut before normalisation."""
    truncation: Truncation
    temperatures: tuple[float, ...]

    @property
    def widths(self) -> dict[str, int]:
        """Words of each field of a row, in their order."""
        slots, temperatures = self.truncation.slots, len(self.temperatures)
        return {name: FIELDS[name].width(slots, temperatures) for name in self.truncation.given}

    @property
    def row_words(self) -> int:
        """W."""
        return sum(self.widths.values())

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(to_json(self))

    @staticmethod
    @functools.lru_cache(64)
    def from_text(text: str) -> "Reduction":
        """From JSON. Raises ValueError."""
        return from_json(Reduction, json.loads(text), "reduction")


def pack(sparse: Sparse) -> Tensor:
    """[n, W] int32 of the distributions of n targets, on their device."""
    columns = [value.contiguous().view(torch.int32) for value in sparse.known().values()]
    return torch.cat([c if c.ndim == 2 else c.unsqueeze(1) for c in columns], dim=1)


def pack_scored(scored: ScoredSequence) -> NDArray[np.int32]:
    """[n, W] int32 of a scored sequence's targets."""
    columns = [np.ascontiguousarray(value).view(np.int32) for value in scored.known().values()]
    return np.concatenate([c if c.ndim == 2 else c[:, None] for c in columns], axis=1)


def unpack(
    sequence: TokenSequence, rows: NDArray[np.int32], reduction: Reduction
) -> ScoredSequence:
    """Join a token sequence with the packed rows [n, W] of its targets."""
    known: dict[str, NDArray] = {}
    start = 0
    for name, width in reduction.widths.items():
        words = rows[:, start] if FIELDS[name].axis == ONE else rows[:, start : start + width]
        known[name] = np.ascontiguousarray(words).view(FIELDS[name].dtype)
        start += width
    assert rows.shape[1] == start
    return scored_sequence(sequence, known)


def scored_sequence(sequence: TokenSequence, known: dict[str, NDArray]) -> ScoredSequence:
    """Join a token sequence with what is known of the distributions of its targets."""
    sampler = sequence.sampler_logprobs
    return ScoredSequence(
        sample_id=sequence.sample_id,
        input_ids=sequence.input_ids,
        is_target=sequence.is_target,
        positions=np.flatnonzero(sequence.is_target).astype(np.int32),
        messages=sequence.messages or None,
        sampler_logprobs=None if sampler is None else sampler[sequence.is_target],
        **known,
    )
