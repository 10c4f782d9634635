"""What sequences of other caches bring into a shard, and the proof that it is stored unchanged."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from decant.schemas import FormatError, ScoredSequence
from decant.storage.cache.rows import Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """What the commit record of a shard says whose sequences come from shards of other caches."""

    kl_error_mean: float
    kl_error_max: float
    logprob_error_mean: float | None
    logprob_error_max: float | None
    """None where it is not known of one of the shards."""
    seconds: float
    """Of the scoring."""
    worker: str
    """Who scored."""


def refuse_changed(given: Sequence[ScoredSequence], stored: Rows) -> None:
    """Raise FormatError, naming sample and field, unless each value is stored bit for bit."""
    for ours, theirs in zip(given, stored, strict=True):
        fields = {"input_ids": ours.input_ids, "is_target": ours.is_target, **ours.known()}
        if ours.sampler_logprobs is not None:
            fields["sampler_logprobs"] = ours.sampler_logprobs
        for name, values in fields.items():
            found = getattr(theirs, name)
            if np.asarray(found).tobytes() != np.ascontiguousarray(values).tobytes():
                raise FormatError(
                    f"sample {ours.sample_id}: {name} would not be stored as it is in the cache it "
                    "comes from, so nothing of it is published: please report this"
                )
