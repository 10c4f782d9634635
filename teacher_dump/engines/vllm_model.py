"""The scoring head that runs inside vLLM: a teacher whose output is our reduction of its logits.

vLLM calls models that return something per token "pooling models". A teacher becomes one by
subclassing: the body, weights and `compute_logits` stay vLLM's own, the pooler is ours. Imports
vLLM; only the worker process loads this file.
Shapes: L tokens of a sequence, H hidden, n targets of a sequence, V vocabulary.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm import ModelRegistry, PoolingParams
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler.tokwise import AllPool, TokenPooler, TokenPoolerHead
from vllm.model_executor.models.interfaces_base import is_text_generation_model
from vllm.tasks import PoolingTask

from schemas import Truncation
from teacher_dump.engines.vllm_rows import pack
from teacher_dump.sparsify import NotFinite, chunk_rows, sparsify, uniforms_for

TASK: PoolingTask = "token_classify"  # with token_embed vLLM wants a tokenizer, for scoring pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """What the head makes of the logits; the same for all sequences."""

    vocab_size: int
    truncation: Truncation
    temperatures: tuple[float, ...]


class NotPossible(Exception):
    """This architecture cannot carry the scoring head here; says why."""


def params_for(positions: np.ndarray, labels: np.ndarray, sequence: int) -> PoolingParams:
    """Everything the head needs to know of one sequence, without an object per token."""
    return PoolingParams(
        task=TASK,
        extra_kwargs={
            "rows": (positions - 1).astype(np.int32).tobytes(),
            "labels": labels.astype(np.int32).tobytes(),
            "sequence": sequence,
        },
    )


def register(architecture: str, reduction: Reduction) -> None:
    """Put the scoring head on an architecture, under its own name, in this process.

    The name stays because vLLM keys settings of some architectures by it. Raises NotPossible.
    """
    if architecture not in ModelRegistry.models:
        raise NotPossible(f"{architecture} is not one of vLLM's own models")
    base = ModelRegistry.models[architecture].load_model_cls()
    if not is_text_generation_model(base):
        raise NotPossible(f"vLLM's {architecture} computes no next-token logits")
    ModelRegistry.register_model(architecture, scoring_model(base, reduction))


def scoring_model(base: type[nn.Module], reduction: Reduction) -> type[nn.Module]:
    """The subclass of a vLLM model that answers with packed sparse distributions."""

    class ScoringModel(base):  # type: ignore[misc, valid-type]
        is_pooling_model = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            head = ScoringHead(self.compute_logits, reduction)
            self.pooler = TokenPooler(pooling=AllPool(), head=head)

    ScoringModel.__name__ = ScoringModel.__qualname__ = base.__name__
    return ScoringModel


class ScoringHead(TokenPoolerHead):
    """Hidden states of one sequence -> one packed row per target (`vllm_rows`)."""

    def __init__(
        self, compute_logits: Callable[[Tensor], Tensor | None], reduction: Reduction
    ) -> None:
        """Keep the model's own last step, with its scaling and capping."""
        super().__init__()
        self._compute_logits = compute_logits
        self._reduction = reduction

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """Only the task of `params_for`."""
        return {TASK}

    def forward_chunk(self, pooled_data: Tensor | None, pooling_param: PoolingParams) -> Any:
        """Reduce hidden states [L, H] to packed rows [n, W].

        Logits that are not finite give [1, 1], the number of the first such target. None stands
        for a sequence of which only a part is computed yet, and for ranks that see no logits.
        """
        if pooled_data is None:
            return None
        hidden_LH, given = pooled_data, pooling_param.extra_kwargs
        if given is None:  # vLLM measures memory with made-up requests
            given = {"rows": np.arange(len(hidden_LH), dtype=np.int32).tobytes(), "sequence": 0}
            given["labels"] = bytes(len(given["rows"]))
        reduction = self._reduction
        device = hidden_LH.device
        rows_n = _int_tensor(given["rows"]).to(device)
        labels_n = _int_tensor(given["labels"]).to(device)
        uniforms = None
        if reduction.truncation.sampled:
            numbers = uniforms_for(reduction.truncation, given["sequence"], len(rows_n))
            uniforms = torch.from_numpy(numbers).to(device)
        size = chunk_rows(reduction.vocab_size, device)
        parts = []
        for start in range(0, max(1, len(rows_n)), size):
            chunk = slice(start, start + size)
            logits = self._compute_logits(hidden_LH[rows_n[chunk]])
            if logits is None:
                return None
            assert logits.shape[1] >= reduction.vocab_size
            try:
                sparse = sparsify(
                    logits[:, : reduction.vocab_size],
                    labels_n[chunk],
                    reduction.truncation,
                    reduction.temperatures,
                    None if uniforms is None else uniforms[chunk],
                )
            except NotFinite as error:
                return torch.tensor([[start + error.row]], dtype=torch.int32, device=device)
            parts.append(pack(sparse))
        return torch.cat(parts)


def _int_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.int32).astype(np.int64))
