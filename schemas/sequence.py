"""One sequence of tokens and the teacher's sparse distribution of each of its targets.

Shapes: L tokens, n targets.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.schemas.conversation import Conversation
from decant.schemas.distributions import Distributions


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredSequence(Distributions[NDArray[Any]]):
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
    messages: str | None = None
    """The conversation that the tokens are of, as `Conversation.to_text` writes it; None where it
    is unknown or there is none. A sequence that was cut may hold a part of it alone."""
    sampler_logprobs: NDArray[np.float32] | None = None
    """[n] nats: log prob that the model which sampled the targets gave to each, over the whole
    shared vocabulary, without temperature and before top-p; None where it is not kept."""

    @property
    def conversation(self) -> Conversation | None:
        """What `messages` says. Raises FormatError if it is no conversation."""
        if self.messages is None:
            return None
        return Conversation.of_text(self.messages, f"sample {self.sample_id}")

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.positions)

    @property
    def labels(self) -> NDArray[np.int32]:
        """[n] the actual token of each target."""
        return self.input_ids[self.positions]
