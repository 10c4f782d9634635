"""The scoring head that runs inside vLLM: a teacher whose output is our reduction of its logits.

vLLM calls models that return something per token "pooling models". A teacher becomes one by
subclassing: the body, weights and `compute_logits` stay vLLM's own, the pooler is ours. What is to
be made of the logits comes with each sequence, in `PoolingParams.extra_kwargs`. Imports vLLM; only
vLLM's own processes and the one that starts them load this file.
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

from decant.schemas import Truncation
from decant.teacher_dump.engines.packed_rows import Reduction, pack
from decant.teacher_dump.engines.sparsify import (
    first_not_finite,
    sparsify_hidden,
    uniforms_for,
)
from decant.teacher_dump.engines.vllm.messages import Window

TASK: PoolingTask = "token_classify"  # with token_embed vLLM wants a tokenizer, for scoring pairs


class NotPossible(Exception):
    """This architecture cannot carry the scoring head here; says why."""


def register(architecture: str) -> None:
    """Put the scoring head on an architecture, under its own name, in this process.

    The name stays because vLLM keys settings of some architectures by it. Calling it again does
    no harm. Raises NotPossible.
    """
    if architecture not in ModelRegistry.models:
        raise NotPossible(f"{architecture} is not one of vLLM's own models")
    base = ModelRegistry.models[architecture].load_model_cls()
    if hasattr(base, "scoring_head"):
        return
    if not is_text_generation_model(base):
        raise NotPossible(f"vLLM's {architecture} computes no next-token logits")
    ModelRegistry.register_model(architecture, scoring_model(base))


def score(llm: Any, reduction: Reduction, window: Window) -> list[NDArray[np.int32] | None]:
    """The packed rows of a window's sequences, None for those with logits that are not finite."""
    sequences = list(window.sequences())
    prompts = [TokensPrompt(prompt_token_ids=ids.tolist()) for ids, _ in sequences]
    params = [
        request_params(reduction, ids, positions, window.first_sequence + offset)
        for offset, (ids, positions) in enumerate(sequences)
    ]
    outputs = llm.encode(prompts, params, pooling_task=TASK, use_tqdm=False)
    return [
        rows_of(output, len(positions))
        for (_, positions), output in zip(sequences, outputs, strict=True)
    ]


def request_params(
    reduction: Reduction, ids: NDArray[Any], positions: NDArray[Any], sequence: int
) -> PoolingParams:
    """Everything the head needs to know of one sequence, without an object per token."""
    return PoolingParams(
        task=TASK,
        extra_kwargs={
            "rows": (positions - 1).astype(np.int32).tobytes(),
            "labels": ids[positions].astype(np.int32).tobytes(),
            "sequence": sequence,
            "reduction": reduction.to_text(),
        },
    )


def rows_of(output: Any, num_targets: int) -> NDArray[np.int32] | None:
    """What the head answered for one sequence."""
    rows: NDArray[np.int32] = output.outputs.data.numpy()
    if rows.shape[1] == 0:
        return None
    assert len(rows) == num_targets and rows.dtype == np.int32
    return rows


def scoring_model(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a vLLM model that answers with packed sparse distributions."""

    class ScoringModel(base):  # type: ignore[misc, valid-type]
        is_pooling_model = True
        scoring_head = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            vocab_size = vllm_config.model_config.get_vocab_size()
            head = ScoringHead(self.compute_logits, vocab_size)
            self.pooler = TokenPooler(pooling=AllPool(), head=head)

    ScoringModel.__name__ = ScoringModel.__qualname__ = base.__name__
    return ScoringModel


class ScoringHead(TokenPoolerHead):
    """Hidden states of one sequence -> one packed row per target (`packed_rows`)."""

    def __init__(self, compute_logits: Callable[[Tensor], Tensor | None], vocab_size: int) -> None:
        """Keep the model's own last step, with its scaling and capping."""
        super().__init__()
        self._compute_logits = compute_logits
        self._default = Reduction(
            vocab_size=vocab_size,
            truncation=Truncation(k=min(64, vocab_size)),
            temperatures=(1.0, 2.0),
        )

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """Only the task of `request_params`."""
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
            given |= {"labels": bytes(len(given["rows"])), "reduction": self._default.to_text()}
        reduction = Reduction.from_text(given["reduction"])
        truncation = reduction.truncation
        device = hidden_LH.device
        rows_n = _int_tensor(given["rows"]).to(device)
        labels_n = _int_tensor(given["labels"]).to(device)
        uniforms = None
        if truncation.sampled:
            numbers = uniforms_for(truncation, given["sequence"], len(rows_n))
            uniforms = torch.from_numpy(numbers).to(device)
        # Unchecked: tensor-parallel ranks compute logits together, all of them or none.
        chunks = list(
            sparsify_hidden(
                hidden_LH[rows_n],
                self._compute_logits,
                labels_n,
                vocab_size=reduction.vocab_size,
                truncation=truncation,
                temperatures=reduction.temperatures,
                uniforms=uniforms,
                check=False,
            )
        )
        if any(first_not_finite(chunk) is not None for chunk in chunks):
            return torch.empty(0, 0, dtype=torch.int32, device=device)
        return torch.cat([pack(chunk) for chunk in chunks]) if chunks else None


def _int_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.int32).astype(np.int64))
