"""Sample responses with `generate` of transformers; see `generation.py`.

Every token is drawn from one uniform number of its response's own seed, so that a response does not
depend on which others share its batch but by rounding. Batches follow from the prompts alone.
Shapes: B prompts of a batch, P padded prompt length, V vocabulary.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.seam import EngineError, Prompt, Response, Sampling
from decant.teacher_dump.engines.transformers.model import (
    input_device,
    is_out_of_memory,
    load_model,
    placement,
)

log = logging.getLogger(__name__)


class TransformersGenerator:
    """A causal LM that samples; batches bounded by `teacher.max_batch_tokens`."""

    def __init__(
        self, config: TeacherConfig, model_path: str, *, sampling: Sampling, max_length: int
    ) -> None:
        """Load the teacher; see `open_generator`."""
        self._sampling = sampling
        self._max_batch_tokens = max(config.max_batch_tokens, max_length)
        self._model = load_model(config, model_path)
        self._device = input_device(self._model)
        # The saved one may hold a temperature, top_k or penalties, which would be applied as well.
        self._model.generation_config = GenerationConfig()
        log.info(
            "teacher %s on %s, %s, samples responses",
            type(self._model).__name__,
            placement(self._model),
            self._model.dtype,
        )

    def generate(self, prompts: Sequence[Prompt]) -> list[Response]:
        """One response per prompt, in the order given; see `Generator.generate`.

        A batch that does not fit the memory is halved.
        """
        done: dict[int, Response] = {}
        left = sorted(range(len(prompts)), key=lambda i: (-_length(prompts[i]), i))
        while left:
            size = max(1, self._max_batch_tokens // _length(prompts[left[0]]))
            batch, left = left[:size], left[size:]
            responses = self._batch([prompts[i] for i in batch])
            done.update(zip(batch, responses, strict=True))
        return [done[index] for index in range(len(prompts))]

    def close(self) -> None:
        """Free the teacher."""
        del self._model

    def _batch(self, prompts: list[Prompt]) -> list[Response]:
        try:
            return self._sample(prompts)
        except (RuntimeError, MemoryError) as error:
            if len(prompts) == 1 or not is_out_of_memory(error):
                raise
            log.warning("%d prompts do not fit the memory: halving the batch", len(prompts))
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return self._batch(prompts[:half]) + self._batch(prompts[half:])

    @torch.inference_mode()
    def _sample(self, prompts: list[Prompt]) -> list[Response]:
        lengths = [len(prompt.token_ids) for prompt in prompts]
        most = max(prompt.max_new_tokens for prompt in prompts)
        stop_ids = list(self._sampling.stop_ids)
        padding = stop_ids[0] if stop_ids else 0
        ids_BP = torch.full((len(prompts), max(lengths)), padding, dtype=torch.long)
        mask_BP = torch.zeros_like(ids_BP)
        for row, prompt in enumerate(prompts):  # padded on the left: responses begin together
            ids_BP[row, -lengths[row] :] = torch.tensor(prompt.token_ids)
            mask_BP[row, -lengths[row] :] = 1
        out = self._model.generate(
            ids_BP.to(self._device),
            attention_mask=mask_BP.to(self._device),
            generation_config=GenerationConfig(
                do_sample=False,  # the processor has drawn already
                max_new_tokens=most,
                eos_token_id=stop_ids or None,
                pad_token_id=padding,
            ),
            logits_processor=LogitsProcessorList([_Drawing(self._sampling, prompts, max(lengths))]),
        )
        generated = out[:, max(lengths) :].cpu().numpy().astype(np.int32)
        return [
            _response(row, prompt.max_new_tokens, stop_ids)
            for row, prompt in zip(generated, prompts, strict=True)
        ]


class _Drawing(LogitsProcessor):
    """Leaves one token possible: that which the uniform number of its row and step falls on."""

    def __init__(self, sampling: Sampling, prompts: list[Prompt], prompt_length: int) -> None:
        self._vocab_size, self._prompt_length = sampling.vocab_size, prompt_length
        self._names = [prompt.name for prompt in prompts]
        self._shapers = LogitsProcessorList()
        if sampling.temperature not in (0, 1):
            self._shapers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            self._shapers.append(TopPLogitsWarper(sampling.top_p))
        self._uniforms: np.ndarray | None = None
        if sampling.temperature:
            most = max(prompt.max_new_tokens for prompt in prompts)
            self._uniforms = np.stack(
                [np.random.default_rng(prompt.seed).random(most) for prompt in prompts]
            )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] -inf everywhere but at the drawn ids."""
        advice = "" if scores.dtype == torch.float32 else "try teacher.dtype: float32, and "
        scores = scores.float().clone()
        scores[:, self._vocab_size :] = -torch.inf
        bad = ~torch.isfinite(scores.amax(dim=1))
        if bad.any():
            name = self._names[int(bad.nonzero()[0, 0])]
            raise EngineError(
                f"the teacher gives NaN or infinite logits while it answers {name}; {advice}look "
                "at the record"
            )
        if self._uniforms is None:
            return scores
        step = input_ids.shape[1] - self._prompt_length
        p = torch.softmax(self._shapers(input_ids, scores).double(), dim=1)
        reached = p.cumsum(dim=1)
        total = reached[:, -1:]
        u = torch.from_numpy(self._uniforms[:, step, None]).to(p.device) * total
        # The first id whose cumulative mass exceeds u, which has a mass of its own.
        u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
        drawn = torch.searchsorted(reached, u, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0)


def _length(prompt: Prompt) -> int:
    """Tokens with the longest response."""
    return len(prompt.token_ids) + prompt.max_new_tokens


def _response(row: np.ndarray, max_new_tokens: int, stop_ids: list[int]) -> Response:
    row = row[:max_new_tokens]
    stops = np.flatnonzero(np.isin(row, stop_ids))
    ids = row[: stops[0] + 1] if len(stops) else row
    return Response(token_ids=ids, finish_reason="stop" if len(stops) else "length")
