"""The public route: vLLM's own prompt_logprobs, the top k at T=1 over all output rows.

For teachers that cannot carry the scoring head (`vllm_model`), which is exact where this is not.
vLLM is imported when a window is scored, never with this file.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from decant.schemas import Distributions
from decant.teacher_dump.engines.packed_rows import Reduction, pack
from decant.teacher_dump.engines.top_entries import known_of, problem_with
from decant.teacher_dump.engines.vllm.messages import Refused, Window

STEP_BYTES = 1 << 30
"""vLLM holds the float32 log probs of all tokens of a step at once, up to this much."""


def check(reduction: Reduction, num_rows: int, why: str) -> None:
    """Raise Refused unless prompt_logprobs can give what is asked."""
    problem = problem_with(reduction.truncation, reduction.temperatures)
    if not problem and num_rows != reduction.vocab_size:
        problem = f"{num_rows} output rows for a vocabulary of {reduction.vocab_size} (padding)"
    if problem:
        raise Refused(
            f"{problem} cannot be had from vLLM's prompt_logprobs, which are the top k at T=1 over "
            f"all output rows, and its full logits cannot be used ({why}). "
            "Use teacher.engine: transformers"
        )


def max_step_tokens(num_rows: int) -> int:
    """How many tokens vLLM may compute at a time with this many output rows."""
    return max(512, STEP_BYTES // (4 * num_rows))


def score(llm: Any, reduction: Reduction, window: Window) -> list[NDArray[np.int32] | None]:
    """The packed rows of a window's sequences, from vLLM's flat answer."""
    from vllm import TokensPrompt

    params = request_params(reduction)
    sequences = list(window.sequences())
    prompts = [TokensPrompt(prompt_token_ids=ids.tolist()) for ids, _ in sequences]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        rows_from_flat(output.prompt_logprobs, reduction, ids, positions)
        for (ids, positions), output in zip(sequences, outputs, strict=True)
    ]


def request_params(reduction: Reduction) -> Any:
    """What vLLM is asked for."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        prompt_logprobs=reduction.truncation.slots,
        max_tokens=1,
        temperature=0,
        detokenize=False,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def rows_from_flat(
    flat: Any, reduction: Reduction, ids: NDArray[np.int32], positions: NDArray[np.int64]
) -> NDArray[np.int32] | None:
    """Packed rows of the targets from vLLM's flat answer: per token itself, then ranks 1 to k.

    None if log probs of the targets are not finite. Of the mass not kept see `top_entries`.
    """
    k = reduction.truncation.slots
    entries = (len(ids) - 1, k + 1)
    token_ids = np.array(flat.token_ids, dtype=np.int32).reshape(entries)[positions - 1]
    logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(entries)[positions - 1]
    assert np.array_equal(token_ids[:, 0], ids[positions])
    if not (logprobs < np.inf).all():
        return None
    known = known_of(
        token_ids[:, 1:],
        logprobs[:, 1:],
        token_ids[:, 0],
        logprobs[:, 0],
        vocab_size=reduction.vocab_size,
    )
    given = {name: torch.from_numpy(known[name]) for name in reduction.truncation.given}
    rows: NDArray[np.int32] = pack(Distributions(**given)).numpy()
    return rows
