"""The targets of a scored sequence that are kept: those of which the teacher is least sure.

How many they are follows from the tokens alone, so the plan knows it; which ones, from the scores.
Shapes: n targets, m of them kept.
"""

import dataclasses
from typing import Any

import numpy as np

from decant.schemas import ScoredSequence
from decant.schemas.selection import num_selected
from decant.storage.inspect.statistics import bucket_entropy
from decant.teacher_dump.inputs.records import Mask, TokenSequence


def select_targets(scored: ScoredSequence, share: float) -> ScoredSequence:
    """The sequence with a share of its targets: the highest in entropy, of equal ones the first.

    The entropy is the teacher's at T=1 over the kept entries and all the rest as one class, or over
    the whole vocabulary where draws are all that is stored.
    """
    if share == 1:
        return scored
    entropy = scored.entropy
    if entropy is None:
        assert scored.logprobs is not None and scored.log_tail is not None
        entropy = bucket_entropy(scored.logprobs, scored.log_z[:, 0], scored.log_tail[:, 0], 1.0)
    count = num_selected(scored.num_targets, share)
    kept = np.sort(np.argsort(-entropy, kind="stable")[:count])
    positions = scored.positions[kept]
    is_target = np.zeros_like(scored.is_target)
    is_target[positions] = True
    known: dict[str, Any] = {name: values[kept] for name, values in scored.known().items()}
    return dataclasses.replace(
        scored,
        is_target=is_target,
        positions=positions,
        sampler_logprobs=(
            None if scored.sampler_logprobs is None else scored.sampler_logprobs[kept]
        ),
        **known,
    )


def lost_targets(sequence: TokenSequence | ScoredSequence, share: float) -> Mask:
    """[L] as many targets as would have been kept of a sequence that cannot be scored."""
    is_target = np.zeros_like(sequence.is_target)
    candidates = np.flatnonzero(sequence.is_target)
    is_target[candidates[: num_selected(len(candidates), share)]] = True
    return is_target
