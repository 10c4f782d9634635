"""The distributions of targets as rows of 32-bit words, as they cross pipes and networks.

A row holds, in this order: K ids, K log probs, K draws (only with sampling), T log Z, T log tail,
1 label log prob, 1 entropy (only with method `sample`); floats keep their bits. `Reduction` says
how the rows came about.
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
    def row_words(self) -> int:
        """W."""
        entries = (3 if self.truncation.sampled else 2) * self.truncation.slots
        return entries + 2 * len(self.temperatures) + 1 + self.has_entropy

    @property
    def has_entropy(self) -> bool:
        """Whether rows end in the entropy."""
        return self.truncation.method == "sample"

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(to_json(self))

    @staticmethod
    @functools.lru_cache(64)
    def from_text(text: str) -> "Reduction":
        """From JSON. Raises ValueError."""
        return from_json(Reduction, json.loads(text), "reduction")


def pack(sparse: Sparse) -> torch.Tensor:
    """[n, W] int32 of the distributions of n targets, on their device."""
    draws = [] if sparse.draws is None else [sparse.draws]
    columns = [sparse.token_ids, sparse.logprobs, *draws, sparse.log_z, sparse.log_tail]
    columns.append(sparse.label_logprob.unsqueeze(1))
    if sparse.entropy is not None:
        columns.append(sparse.entropy.unsqueeze(1))
    return torch.cat([column.contiguous().view(torch.int32) for column in columns], dim=1)


def pack_scored(scored: ScoredSequence) -> NDArray[np.int32]:
    """[n, W] int32 of a scored sequence's targets."""
    assert scored.logprobs is not None and scored.log_tail is not None
    draws = [] if scored.draws is None else [scored.draws]
    columns = [scored.token_ids, scored.logprobs, *draws, scored.log_z, scored.log_tail]
    columns.append(scored.label_logprob[:, None])
    if scored.entropy is not None:
        columns.append(scored.entropy[:, None])
    return np.concatenate([np.ascontiguousarray(c).view(np.int32) for c in columns], axis=1)


def unpack(
    sequence: TokenSequence, rows: NDArray[np.int32], reduction: Reduction
) -> ScoredSequence:
    """Join a token sequence with the packed rows [n, W] of its targets."""
    has_draws = reduction.truncation.sampled
    num_temperatures = len(reduction.temperatures)
    entries = [reduction.truncation.slots] * (3 if has_draws else 2)
    scalars = [1, 1] if reduction.has_entropy else [1]
    widths = [*entries, num_temperatures, num_temperatures, *scalars]
    assert rows.shape[1] == sum(widths)
    cut = np.split(rows, np.cumsum(widths)[:-1], axis=1)
    columns = [np.ascontiguousarray(column) for column in cut]
    log_z, log_tail, label, *entropy = (
        column.view(np.float32) for column in columns[len(entries) :]
    )
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
        entropy=entropy[0][:, 0] if entropy else None,
    )


def scored_sequence(sequence: TokenSequence, sparse: Sparse) -> ScoredSequence:
    """Join a token sequence with the distributions of its targets."""

    def array(value: Tensor) -> np.ndarray:
        return value.cpu().numpy()

    return ScoredSequence(
        sample_id=sequence.sample_id,
        input_ids=sequence.input_ids,
        is_target=sequence.is_target,
        positions=np.flatnonzero(sequence.is_target).astype(np.int32),
        token_ids=array(sparse.token_ids),
        logprobs=array(sparse.logprobs),
        draws=None if sparse.draws is None else array(sparse.draws),
        log_z=array(sparse.log_z),
        log_tail=array(sparse.log_tail),
        label_logprob=array(sparse.label_logprob),
        entropy=None if sparse.entropy is None else array(sparse.entropy),
    )
