"""One sequence of tokens and the teacher's sparse distribution of each of its targets.

Shapes: L tokens, n targets, K slots per target, T stored temperatures.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredSequence:
    """A scored sequence; target i is the token at `positions[i]` and its teacher distribution.

    The distribution of target i is the teacher's prediction of `input_ids[positions[i]]` given the
    tokens before it: row `positions[i] - 1` of a causal forward's logits. Position 0 has no
    prediction and is never a target. The stored temperatures stand in the manifest.
    """

    sample_id: str
    """The source's own id of the record this sequence comes from."""
    input_ids: NDArray[np.int32]
    """[L] token ids."""
    is_target: NDArray[np.bool_]
    """[L] which tokens have a stored distribution."""
    positions: NDArray[np.int32]
    """[n] indices of the targets: `np.flatnonzero(is_target)`."""
    token_ids: NDArray[np.int32]
    """[n, K] kept vocabulary ids in descending probability, or ascending without log probs;
    -1 = unused slot."""
    logprobs: NDArray[np.float32] | None
    """[n, K] log probs at T=1 in nats over the whole shared vocabulary; -inf = unused slot. None
    in a cache that holds draws without log probs."""
    draws: NDArray[np.int32] | None
    """[n, K] how often each id was drawn (0 = exact head entry), or None without sampling."""
    log_z: NDArray[np.float32]
    """[n, T] log sum_v p(v)^(1/T) over the whole vocabulary; 0 at T=1."""
    log_tail: NDArray[np.float32] | None
    """[n, T] log mass under p_T of everything not kept; -inf when nothing is left. None without
    log probs."""
    label_logprob: NDArray[np.float32]
    """[n] the teacher's log prob (T=1) of the actual token."""
    entropy: NDArray[np.float32] | None = None
    """[n] nats, of the teacher's whole distribution at T=1: with method `sample`, from version 3 of
    the format on."""

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.positions)

    @property
    def labels(self) -> NDArray[np.int32]:
        """[n] the actual token of each target."""
        return self.input_ids[self.positions]
