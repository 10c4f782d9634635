"""What stands in a shard for a sequence that the teacher could not score."""

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Layout, ScoredSequence
from decant.schemas.distributions import FIELDS
from decant.schemas.shards import REASON_LENGTH


def one_line(reason: str) -> str:
    """A reason as a record holds it: one line of printable text, cut where it is too long."""
    line = " ".join(reason.split())
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 1] + "…"


def without_targets(
    sample_id: str, input_ids: NDArray[np.int32], messages: str | None, layout: Layout
) -> ScoredSequence:
    """A sequence with these tokens and no target, in the fields of a layout."""
    sizes = 0, layout.slots, len(layout.temperatures)
    nothing: dict[str, NDArray] = {
        name: np.zeros(FIELDS[name].shape(*sizes), FIELDS[name].dtype) for name in layout.fields
    }
    return ScoredSequence(
        sample_id=sample_id,
        input_ids=input_ids,
        is_target=np.zeros(len(input_ids), np.bool_),
        positions=np.zeros(0, np.int32),
        messages=messages,
        sampler_logprobs=np.zeros(0, np.float32) if layout.has_sampler else None,
        **nothing,
    )
