"""The top k of a distribution at T=1, where that is all that a teacher gives.

What an engine sees of vLLM's prompt_logprobs, or of a server's answer. The mass that is not kept is
1 - sum p, which float32 log probs cannot tell exactly; it is held between what is known of it.
Shapes: n targets, K slots.
"""

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Truncation
from decant.teacher_dump.engines.seam import EngineError
from decant.teacher_dump.engines.sparsify import LOGPROB_FLOOR

TAIL_RESOLUTION = 2.0**-23
"""Float32 log probs cannot say whether less than this is left."""


def problem_with(truncation: Truncation, temperatures: tuple[float, ...]) -> str:
    """What of this cannot be had from the top k at T=1; "" if all can."""
    rule = truncation.rule
    if rule.varies or rule.has_draws:
        return f"truncation.method {truncation.method}"
    if tuple(temperatures) != (1.0,):
        return f"temperatures {list(temperatures)}"
    return ""


def refuse_request(truncation: Truncation, temperatures: tuple[float, ...]) -> None:
    """Raise EngineError unless the top k at T=1 is all that is wanted."""
    if problem := problem_with(truncation, temperatures):
        raise EngineError(
            f"{problem} cannot be had with teacher.engine openai: stock servers give the top k at "
            "T=1. Use truncation.method topk or label with temperatures [1.0], or serve the "
            "teacher with `decant serve` and ask it with teacher.engine http"
        )


def known_of(
    token_ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    labels: NDArray[np.int32],
    label_logprob: NDArray[np.float32],
    *,
    vocab_size: int,
    unnamed_mass: NDArray[np.float64] | float = 0.0,
) -> dict[str, NDArray]:
    """The fields of `Distributions` of n targets, from their top entries [n, K], best first.

    The mass not kept is 1 - sum p, at least what is known to be missing (an actual token outside
    the top K, and `unnamed_mass` [n] of entries without an id) and at most V - K times the last
    kept, unless an entry without an id holds more.
    """
    outside = ~(token_ids == labels[:, None]).any(axis=1)
    missing = np.where(outside, label_logprob, -np.inf)
    return {
        "token_ids": token_ids,
        "logprobs": np.maximum(logprobs, np.float32(LOGPROB_FLOOR)),
        "log_z": np.zeros((len(labels), 1), np.float32),
        "log_tail": _log_tail(logprobs, missing, unnamed_mass, vocab_size),
        "label_logprob": np.maximum(label_logprob, np.float32(LOGPROB_FLOOR)),
    }


def _log_tail(
    kept: NDArray[np.float32],
    missing: NDArray[np.float32],
    unnamed_mass: NDArray[np.float64] | float,
    vocab_size: int,
) -> NDArray[np.float32]:
    """[n, 1] log of the mass that the kept log probs [n, K] leave, `missing` [n] known to be."""
    p = np.exp(kept.astype(np.float64))
    least = np.maximum(np.exp(missing.astype(np.float64)), TAIL_RESOLUTION)
    tail = np.maximum(1 - p.sum(axis=1), least)
    if p.shape[1]:
        tail = np.minimum(tail, (vocab_size - p.shape[1]) * p[:, -1])
    tail = np.maximum(tail, unnamed_mass)
    with np.errstate(divide="ignore"):
        log_tail: NDArray[np.float32] = np.log(tail[:, None]).astype(np.float32)
    return log_tail
