"""How vLLM is asked for samples: prompts in, responses out.

Imports vLLM; only its processes load this file.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import vllm
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import LogitsProcessor

from decant.teacher_dump.engines.seam import Prompt, Response, Sampling
from decant.teacher_dump.engines.vllm.messages import Ready, Refused, SamplingJob
from decant.teacher_dump.engines.vllm.setup import choose

VOCABULARY = "decant_vocab_size"


def load(job: SamplingJob) -> tuple[Callable[[list[Prompt]], list[Response]], Ready]:
    """Load the teacher and say how it is sampled from. Raises Refused."""
    setup = choose(job.load)
    if setup.num_rows < job.sampling.vocab_size:
        raise Refused(
            f"the teacher has {setup.num_rows} output rows, fewer than {job.sampling.vocab_size} "
            "ids"
        )
    # A prompt taken in pieces moves its seed's generator, which a CPU's cannot take back.
    step_tokens = max(setup.options["max_num_batched_tokens"], setup.options["max_model_len"])
    whole_prompts = {"enable_chunked_prefill": False, "max_num_batched_tokens": step_tokens}
    llm = vllm.LLM(
        **setup.options | whole_prompts,
        logits_processors=[f"{UsableLogits.__module__}:{UsableLogits.__name__}"],
        additional_config={VOCABULARY: job.sampling.vocab_size},
    )

    if job.sampling.with_logprobs and setup.num_rows > job.sampling.vocab_size:
        llm.collective_rpc("cut_logits", args=(job.sampling.vocab_size,))

    def answer(prompts: list[Prompt]) -> list[Response]:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=prompt.token_ids.tolist()) for prompt in prompts],
            [sampling_params(job.sampling, prompt) for prompt in prompts],
            use_tqdm=False,
        )
        return [response_of(output.outputs[0]) for output in outputs]

    return answer, setup.ready


def sampling_params(sampling: Sampling, prompt: Prompt) -> vllm.SamplingParams:
    """What vLLM is asked for one response."""
    return vllm.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.temperature else 1.0,
        seed=prompt.seed,
        max_tokens=prompt.max_new_tokens,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,  # the stop ids alone end a response
        logprobs=0 if sampling.with_logprobs else None,  # of the drawn token, and of no others
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def response_of(output: Any) -> Response:
    """One of vLLM's outputs."""
    reason = output.finish_reason
    assert reason in ("stop", "length"), reason
    ids = np.array(output.token_ids, dtype=np.int32)
    logprobs = None
    if output.logprobs is not None:
        said = zip(output.logprobs, ids.tolist(), strict=True)
        logprobs = np.array([place[token].logprob for place, token in said], np.float32)
    return Response(token_ids=ids, finish_reason=str(reason), logprobs=logprobs)


class UsableLogits(LogitsProcessor):
    """Cuts the padding of the output layer off, and refuses NaN, of which nothing can be drawn."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """Remember the vocabulary."""
        self._vocab_size = int(vllm_config.additional_config[VOCABULARY])

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Of all requests of a step, [B, V]."""
        if bool(torch.isnan(logits[:, : self._vocab_size]).any()):
            raise Refused(
                "the teacher gives NaN logits while it samples; try teacher.dtype: float32"
            )
        logits[:, self._vocab_size :] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        """No: the padding may hold the largest."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """There is none."""
