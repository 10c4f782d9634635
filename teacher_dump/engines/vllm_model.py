"""The scoring head that runs inside vLLM: a teacher whose output is our reduction of its logits.

vLLM calls models that return something per token "pooling models". A teacher becomes one by
subclassing: the body, weights and `compute_logits` stay vLLM's own, the pooler is ours. Imports
vLLM; only the worker process loads this file.
Shapes: L tokens of a sequence, H hidden, n targets of a sequence, V vocabulary.
"""

from collections.abc import Callable, Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm import ModelRegistry, PoolingParams, TokensPrompt
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler.tokwise import AllPool, TokenPooler, TokenPoolerHead
from vllm.model_executor.models.interfaces_base import is_text_generation_model
from vllm.tasks import PoolingTask

from teacher_dump.engines.vllm_messages import Job, Window, not_finite, pack
from teacher_dump.sparsify import NotFinite, sparsify_hidden, uniforms_for

TASK: PoolingTask = "token_classify"  # with token_embed vLLM wants a tokenizer, for scoring pairs


class NotPossible(Exception):
    """This architecture cannot carry the scoring head here; says why."""


def register(architecture: str, job: Job) -> None:
    """Put the scoring head on an architecture, under its own name, in this process.

    The name stays because vLLM keys settings of some architectures by it. Raises NotPossible.
    """
    if architecture not in ModelRegistry.models:
        raise NotPossible(f"{architecture} is not one of vLLM's own models")
    base = ModelRegistry.models[architecture].load_model_cls()
    if not is_text_generation_model(base):
        raise NotPossible(f"vLLM's {architecture} computes no next-token logits")
    ModelRegistry.register_model(architecture, scoring_model(base, job))


def score(llm: Any, job: Job, window: Window) -> NDArray[np.int32]:
    """The packed rows of a window."""
    prompts, params, expected = [], [], []
    for offset, (sample_id, ids, positions) in enumerate(window.sequences()):
        prompts.append(TokensPrompt(prompt_token_ids=ids.tolist()))
        params.append(_params_for(positions, ids[positions], window.first_sequence + offset))
        expected.append((sample_id, len(positions)))
    outputs = llm.encode(prompts, params, pooling_task=TASK, use_tqdm=False)
    parts = []
    for (sample_id, num_targets), output in zip(expected, outputs, strict=True):
        rows = output.outputs.data.numpy()
        if rows.shape[1] == 0:
            raise not_finite(sample_id)
        assert len(rows) == num_targets and rows.dtype == np.int32
        parts.append(rows)
    return np.concatenate(parts)


def scoring_model(base: type[nn.Module], job: Job) -> type[nn.Module]:
    """The subclass of a vLLM model that answers with packed sparse distributions."""

    class ScoringModel(base):  # type: ignore[misc, valid-type]
        is_pooling_model = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            head = ScoringHead(self.compute_logits, job)
            self.pooler = TokenPooler(pooling=AllPool(), head=head)

    ScoringModel.__name__ = ScoringModel.__qualname__ = base.__name__
    return ScoringModel


class ScoringHead(TokenPoolerHead):
    """Hidden states of one sequence -> one packed row per target (`vllm_messages`)."""

    def __init__(self, compute_logits: Callable[[Tensor], Tensor | None], job: Job) -> None:
        """Keep the model's own last step, with its scaling and capping."""
        super().__init__()
        self._compute_logits = compute_logits
        self._job = job

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """Only the task of `_params_for`."""
        return {TASK}

    def forward_chunk(self, pooled_data: Tensor | None, pooling_param: PoolingParams) -> Any:
        """Reduce hidden states [L, H] to packed rows [n, W]; [0, 0] if some logits are not finite.

        None stands for a sequence of which only a part is computed yet, and for ranks that see no
        logits.
        """
        if pooled_data is None:
            return None
        hidden_LH, given = pooled_data, pooling_param.extra_kwargs
        if given is None:  # vLLM measures memory with made-up requests
            given = {"rows": np.arange(len(hidden_LH), dtype=np.int32).tobytes(), "sequence": 0}
            given["labels"] = bytes(len(given["rows"]))
        job = self._job
        device = hidden_LH.device
        rows_n = _int_tensor(given["rows"]).to(device)
        labels_n = _int_tensor(given["labels"]).to(device)
        uniforms = None
        if job.truncation.sampled:
            numbers = uniforms_for(job.truncation, given["sequence"], len(rows_n))
            uniforms = torch.from_numpy(numbers).to(device)
        chunks = sparsify_hidden(
            hidden_LH[rows_n],
            self._compute_logits,
            labels_n,
            vocab_size=job.vocab_size,
            truncation=job.truncation,
            temperatures=job.temperatures,
            uniforms=uniforms,
        )
        try:
            parts = [pack(sparse) for sparse in chunks]
        except NotFinite:  # to raise here would take the other sequences along
            return torch.empty(0, 0, dtype=torch.int32, device=device)
        return torch.cat(parts) if parts else None


def _params_for(positions: NDArray[Any], labels: NDArray[Any], sequence: int) -> PoolingParams:
    """Everything the head needs to know of one sequence, without an object per token."""
    return PoolingParams(
        task=TASK,
        extra_kwargs={
            "rows": (positions - 1).astype(np.int32).tobytes(),
            "labels": labels.astype(np.int32).tobytes(),
            "sequence": sequence,
        },
    )


def _int_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.int32).astype(np.int64))
