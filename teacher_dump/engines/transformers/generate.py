"""Sample responses with `generate` of transformers; see `seam.Generator`.

Every token is drawn from one uniform number of its response's own seed, so that a response does not
depend on which others share its batch but by rounding. Batches follow from the prompts alone.
Shapes: B prompts of a batch, P padded prompt length, V vocabulary.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
from decant.teacher_dump.engines.transformers.lengths import LengthGroups
from decant.teacher_dump.engines.transformers.model import (
    input_device,
    is_out_of_memory,
    load_model,
    placement,
    refuse_too_few_rows,
)
from decant.teacher_dump.engines.transformers.probes import (
    Sharing,
    cache_is_faithful,
    find_sharing,
    refuse_sight_of_later_tokens,
    rounding_of,
)

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Answer:
    """A response that is being sampled."""

    prompt: Prompt
    index: int
    """Of the prompt among those given."""
    drawn: NDArray[np.int32]
    """Tokens so far."""
    logprobs: NDArray[np.float32]
    """Of these tokens; of length 0 where they are not asked for."""

    @property
    def ids(self) -> NDArray[np.int32]:
        """Prompt and response."""
        return np.concatenate([self.prompt.token_ids, self.drawn])

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prompt.token_ids) + len(self.drawn)

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self.prompt.max_new_tokens - len(self.drawn)

    @property
    def whole(self) -> int:
        """Tokens with the longest response."""
        return len(self.prompt.token_ids) + self.prompt.max_new_tokens


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
        name = type(self._model).__name__
        refuse_too_few_rows(self._model, sampling.vocab_size)
        self._groups = LengthGroups(self._model)
        probed = (self._groups, sampling.vocab_size, max_length)
        tolerance = rounding_of(self._model)
        refuse_sight_of_later_tokens(self._states, *probed, tolerance=tolerance, name=name)
        self._caches = True
        if not cache_is_faithful(self._forced, self._last_logits, *probed, tolerance=tolerance):
            self._caches = False
            log.warning("%s samples otherwise with a cache of keys and values: none is kept", name)
        self._sharing = find_sharing(
            self._forced,
            *probed,
            batch_tokens=self._max_batch_tokens,
            tolerance=tolerance,
            what=f"what {name} answers to a prompt",
        )
        log.info(
            "%s on %s, %s, samples responses",
            name,
            placement(self._model),
            self._model.dtype,
        )

    def generate(self, prompts: Sequence[Prompt]) -> list[Response]:
        """One response per prompt, in the order given; see `Generator.generate`.

        Goes on in rounds where the length of a text changes how the teacher reads all of it. A
        batch that does not fit the memory is halved.
        """
        done: dict[int, Response] = {}
        nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
        left = [Answer(prompt, index, *nothing) for index, prompt in enumerate(prompts)]
        while left:
            left.sort(key=lambda answer: (-answer.whole, answer.index))
            size = max(1, self._max_batch_tokens // left[0].whole)
            kind = self._kind(left[0])
            batch = [answer for answer in left if self._kind(answer) == kind]
            batch = batch[: size if self._sharing else 1]
            self._extend(batch)
            for answer in batch:
                if response := self._finished(answer):
                    done[answer.index] = response
            left = [answer for answer in left if answer.index not in done]
        return [done[index] for index in range(len(prompts))]

    def close(self) -> None:
        """Free the teacher."""
        del self._model

    def _kind(self, answer: Answer) -> tuple[int, ...]:
        """Answers of one kind may share a batch."""
        mixed = self._sharing == Sharing.EVERYTHING
        return (*self._groups.group(answer.length), 0 if mixed else answer.length)

    def _finished(self, answer: Answer) -> Response | None:
        stops = np.flatnonzero(np.isin(answer.drawn, self._sampling.stop_ids))
        if not len(stops) and answer.room:
            return None
        count = stops[0] + 1 if len(stops) else len(answer.drawn)
        return Response(
            token_ids=answer.drawn[:count],
            finish_reason="stop" if len(stops) else "length",
            logprobs=answer.logprobs[:count] if self._sampling.with_logprobs else None,
        )

    def _extend(self, batch: list[Answer]) -> None:
        """Draw tokens for each until all end, or the longest leaves its group of lengths."""
        try:
            return self._sample(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            log.warning("%d prompts do not fit the memory: halving the batch", len(batch))
        torch.cuda.empty_cache()
        half = len(batch) // 2
        self._extend(batch[:half])
        self._extend(batch[half:])

    def _sample(self, batch: list[Answer]) -> None:
        steps = max(answer.room for answer in batch)
        longest = max(answer.length for answer in batch)
        if (end := self._groups.end(longest)) is not None:
            steps = min(steps, end - longest + 1)
        drawing = _Drawing(self._sampling, batch, steps, longest)
        rows = self._run([answer.ids for answer in batch], steps, drawing, self._sampling.stop_ids)
        logprobs = drawing.logprobs()
        for answer, row, said in zip(batch, rows, logprobs, strict=True):
            room = answer.room
            answer.drawn = np.concatenate([answer.drawn, row[:room]])
            answer.logprobs = np.concatenate([answer.logprobs, said[:room]])

    @torch.inference_mode()
    def _run(
        self,
        texts: Sequence[NDArray[np.int32]],
        steps: int,
        processor: LogitsProcessor,
        stop_ids: tuple[int, ...] = (),
    ) -> NDArray[np.int32]:
        """[B, up to `steps`] ids after the texts, which are padded on the left: all begin at once.

        Each is the largest of the scores that the processor makes.
        """
        longest, padding = max(map(len, texts)), stop_ids[0] if stop_ids else 0
        ids_BP = torch.full((len(texts), longest), padding, dtype=torch.long)
        mask_BP = torch.zeros_like(ids_BP)
        for row, text in enumerate(texts):
            ids_BP[row, longest - len(text) :] = torch.tensor(text)
            mask_BP[row, longest - len(text) :] = 1
        self._groups.forget()
        out = self._model.generate(
            ids_BP.to(self._device),
            attention_mask=mask_BP.to(self._device),
            generation_config=GenerationConfig(
                do_sample=False,  # the processor has drawn already
                max_new_tokens=steps,
                eos_token_id=list(stop_ids) or None,
                pad_token_id=padding,
                use_cache=self._caches,
            ),
            logits_processor=LogitsProcessorList([processor]),
        )
        ids: NDArray[np.int32] = out[:, longest:].cpu().numpy().astype(np.int32)
        return ids

    def _states(self, ids_BL: Tensor) -> Tensor:
        """Hidden states of a plain forward, or logits where the model has no body of its own."""
        inputs = {"input_ids": ids_BL.to(self._device), "use_cache": False}
        try:
            return self._model.base_model(**inputs).last_hidden_state
        except (AttributeError, TypeError):
            return self._model(**inputs).logits

    def _last_logits(self, ids_BL: Tensor, count: int) -> Tensor:
        """[B, count, V] of a plain forward, of the last tokens alone where the model can."""
        inputs: dict[str, Any] = {"input_ids": ids_BL.to(self._device), "use_cache": False}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            inputs["logits_to_keep"] = count
        self._groups.forget()
        return self._model(**inputs).logits[:, -count:]

    def _forced(self, texts: Sequence[NDArray[np.int32]], forced: NDArray[np.int32]) -> Tensor:
        """[B, steps, V] logits after the texts, while each goes on with the same forced tokens."""
        forcing = _Forcing(forced)
        self._run(texts, len(forced), forcing)
        return torch.stack(forcing.seen, dim=1)


class _Forcing(LogitsProcessor):
    """Remembers the logits and leaves one token possible, the same in all rows."""

    def __init__(self, forced: NDArray[np.int32]) -> None:
        self._forced = forced
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] -inf everywhere but at the next token."""
        token = int(self._forced[len(self.seen)])
        self.seen.append(scores.clone())
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = 0
        return only


class _Drawing(LogitsProcessor):
    """Leaves one token possible: that which the uniform number of its row and step falls on."""

    def __init__(self, sampling: Sampling, batch: list[Answer], steps: int, longest: int) -> None:
        self._vocab_size, self._longest = sampling.vocab_size, longest
        self._names = [answer.prompt.name for answer in batch]
        self._logprobs: list[Tensor] | None = [] if sampling.with_logprobs else None
        self._shapers = LogitsProcessorList()
        if sampling.temperature not in (0, 1):
            self._shapers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            self._shapers.append(TopPLogitsWarper(sampling.top_p))
        self._uniforms: np.ndarray | None = None
        if sampling.temperature:
            self._uniforms = np.stack([_uniforms(answer, steps) for answer in batch])

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
            return self._only(scores, scores.argmax(dim=1, keepdim=True))
        step = input_ids.shape[1] - self._longest
        p = torch.softmax(self._shapers(input_ids, scores).double(), dim=1)
        reached = p.cumsum(dim=1)
        total = reached[:, -1:]
        u = torch.from_numpy(self._uniforms[:, step, None]).to(p.device) * total
        # The first id whose cumulative mass exceeds u, which has a mass of its own.
        u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
        return self._only(scores, torch.searchsorted(reached, u, right=True))

    def logprobs(self) -> NDArray[np.float32]:
        """[B, steps] of the tokens that were drawn; steps 0 where they are not asked for."""
        if not self._logprobs:
            return np.zeros((len(self._names), 0), np.float32)
        found: NDArray[np.float32] = torch.cat(self._logprobs, dim=1).cpu().numpy()
        return found

    def _only(self, scores: Tensor, drawn: Tensor) -> Tensor:
        """[B, V] 0 at the drawn ids [B, 1], -inf elsewhere; their log probs are remembered."""
        if self._logprobs is not None:
            self._logprobs.append(scores.gather(1, drawn) - scores.logsumexp(dim=1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0)


def _uniforms(answer: Answer, steps: int) -> NDArray[np.float64]:
    """[steps] the numbers of a response's own seed that its next tokens are drawn with."""
    start = len(answer.drawn)
    return np.random.default_rng(answer.prompt.seed).random(start + steps)[start:]
