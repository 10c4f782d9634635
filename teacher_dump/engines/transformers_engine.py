"""The embedded engine: a transformers causal LM in this process.

The head is applied to chunks of target positions only, so [batch, length, V] logits never exist.
Shapes: B sequences in a batch, L padded length, H hidden, N targets of a batch, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from schemas import ScoredSequence, Truncation
from teacher_dump.engines.base import EngineError, TeacherConfig
from teacher_dump.sequences import TokenSequence
from teacher_dump.sparsify import NotFinite, Sparse, sparsify_hidden, uniforms_for

log = logging.getLogger(__name__)

WINDOW_BATCHES = 16
"""Sequences are sorted by length within windows of this many batches, then put back in order."""


class TransformersEngine:
    """Any causal LM that `AutoModelForCausalLM` loads; placed through accelerate."""

    def __init__(
        self,
        config: TeacherConfig,
        model_path: str,
        *,
        vocab_size: int,
        truncation: Truncation,
        temperatures: tuple[float, ...],
        max_length: int,
    ) -> None:
        """Load the teacher; see `open_engine`."""
        self._vocab_size, self._truncation = vocab_size, truncation
        self._temperatures = temperatures
        self._max_batch_tokens = max(config.max_batch_tokens, max_length)
        device = config.device
        if device == "auto":
            device = "auto" if torch.cuda.is_available() else "cpu"
        options = {"attn_implementation": config.attention} if config.attention else {}
        try:
            self._model, loading = AutoModelForCausalLM.from_pretrained(
                model_path,
                dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
                device_map=device,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in one line
                **options,
            )
        except Exception as error:  # whatever a device, a weight file or an architecture may raise
            raise EngineError(f"cannot load {model_path} on {device}: {error}") from error
        unlike = [name for name, *_ in loading["mismatched_keys"]]
        if absent := sorted({*loading["missing_keys"], *unlike}):  # they would be random
            raise EngineError(
                f"{model_path}: {len(absent)} tensors that its config.json asks for are not in the "
                f"weights, or have another shape there, first {absent[0]}; copy the model again"
            )
        self._model.eval()
        self._device = self._model.get_input_embeddings().weight.device
        self._head = self._find_head()
        rows = self._model.get_output_embeddings().weight.shape[0]
        if rows < vocab_size:
            raise EngineError(f"the teacher has {rows} output rows, fewer than {vocab_size} ids")
        log.info(
            "teacher %s on %s, %s, head %s",
            type(self._model).__name__,
            self._device,
            self._model.dtype,
            "in chunks of targets" if self._head else "with the whole forward",
        )

    def score(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence]:
        """The scored sequences in the order given; see `Engine.score`."""
        for window in self._windows(sequences):
            done: dict[int, ScoredSequence] = {}
            for batch in self._batches(sequences, window):
                done.update(self._score_batch(sequences, batch, first_sequence))
            for index in window:
                yield done[index]

    def close(self) -> None:
        """Free the teacher."""
        del self._model, self._head

    def _windows(self, sequences: Sequence[TokenSequence]) -> Iterator[list[int]]:
        window: list[int] = []
        tokens = 0
        for index, sequence in enumerate(sequences):
            window.append(index)
            tokens += len(sequence.input_ids)
            if tokens >= WINDOW_BATCHES * self._max_batch_tokens:
                yield window
                window, tokens = [], 0
        if window:
            yield window

    def _batches(
        self, sequences: Sequence[TokenSequence], window: list[int]
    ) -> Iterator[list[int]]:
        """Sequences of like length together, the longest first, bounded by padded tokens."""
        by_length = sorted(window, key=lambda i: -len(sequences[i].input_ids))
        while by_length:
            size = max(1, self._max_batch_tokens // len(sequences[by_length[0]].input_ids))
            yield by_length[:size]
            by_length = by_length[size:]

    @torch.inference_mode()
    def _score_batch(
        self, sequences: Sequence[TokenSequence], batch: list[int], first_sequence: int
    ) -> dict[int, ScoredSequence]:
        lengths = [len(sequences[i].input_ids) for i in batch]
        ids_BL = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        predicted_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        for row, index in enumerate(batch):
            sequence = sequences[index]
            ids_BL[row, : lengths[row]] = torch.tensor(sequence.input_ids)
            mask_BL[row, : lengths[row]] = 1
            # The distribution of token t is what the model says at t - 1.
            predicted_BL[row, : lengths[row] - 1] = torch.tensor(sequence.is_target[1:])
        labels_N = ids_BL[:, 1:][predicted_BL[:, :-1]].to(self._device)
        counts = [int(sequences[i].is_target.sum()) for i in batch]
        uniforms = None
        if self._truncation.sampled:
            uniforms = torch.from_numpy(
                np.concatenate(
                    [
                        uniforms_for(self._truncation, first_sequence + i, n)
                        for i, n in zip(batch, counts, strict=True)
                    ]
                )
            )
        sparse = self._sparsify(
            ids_BL.to(self._device),
            None if len(set(lengths)) == 1 else mask_BL.to(self._device),
            predicted_BL.to(self._device),
            labels_N,
            uniforms,
            lambda row: sequences[batch[int(np.searchsorted(np.cumsum(counts), row, "right"))]],
        )
        return {
            index: scored_sequence(sequences[index], part)
            for index, part in zip(batch, _split(sparse, counts), strict=True)
        }

    def _sparsify(
        self,
        ids_BL: Tensor,
        mask_BL: Tensor | None,
        predicted_BL: Tensor,
        labels_N: Tensor,
        uniforms: Tensor | None,
        sequence_of: Callable[[int], TokenSequence],
    ) -> Sparse:
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "use_cache": False}
        if self._head is not None:
            hidden_NH = self._model.base_model(**inputs).last_hidden_state[predicted_BL]
        else:
            hidden_NH = self._model(**inputs).logits[predicted_BL]
        try:
            parts = list(
                sparsify_hidden(
                    hidden_NH,
                    self._head or (lambda logits_NV: logits_NV),
                    labels_N,
                    vocab_size=self._vocab_size,
                    truncation=self._truncation,
                    temperatures=self._temperatures,
                    uniforms=uniforms,
                )
            )
        except NotFinite as error:
            raise EngineError(
                "the teacher gives NaN or infinite logits for sample "
                f"{sequence_of(error.row).sample_id}; "
                "try teacher.dtype: float32, and look at the record"
            ) from error
        return _join(parts)

    @torch.inference_mode()
    def _find_head(self) -> Callable[[Tensor], Tensor] | None:
        """The model's own head on hidden states, or None if it cannot be reproduced exactly.

        Checked by comparing with the model's logits on a few tokens, so that an architecture with
        another final step (scaling, capping) is caught rather than assumed away.
        """
        settings = self._model.config.get_text_config()
        linear = self._model.get_output_embeddings()
        cap = getattr(settings, "final_logit_softcapping", None)
        scale = getattr(settings, "logit_scale", None) or 1 / (
            getattr(settings, "logits_scaling", None) or 1
        )

        def head(hidden_NH: Tensor) -> Tensor:
            logits = linear(hidden_NH.to(linear.weight.device))
            if scale != 1:
                logits = logits * scale
            return cap * torch.tanh(logits / cap) if cap else logits

        probe = torch.arange(1, min(9, self._vocab_size), device=self._device).unsqueeze(0)
        try:
            hidden = self._model.base_model(input_ids=probe, use_cache=False).last_hidden_state
            ours = head(hidden[0]).float()
        except (AttributeError, TypeError, RuntimeError) as error:
            log.info("the head cannot be applied apart: %s", error)
            return None
        theirs = self._model(input_ids=probe, use_cache=False).logits[0].float().to(ours.device)
        same = ours.shape == theirs.shape and torch.allclose(
            ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True
        )
        return head if same else None


def scored_sequence(sequence: TokenSequence, sparse: Sparse) -> ScoredSequence:
    """Join a token sequence with the distributions of its targets."""

    def array(value: Tensor) -> np.ndarray:
        return value.cpu().numpy()

    return ScoredSequence(
        sample_id=sequence.sample_id,
        input_ids=sequence.input_ids,
        is_target=sequence.is_target,
        positions=np.flatnonzero(sequence.is_target).astype(np.int32),
        token_ids=array(sparse.token_ids),
        logprobs=array(sparse.logprobs),
        draws=None if sparse.draws is None else array(sparse.draws),
        log_z=array(sparse.log_z),
        log_tail=array(sparse.log_tail),
        label_logprob=array(sparse.label_logprob),
    )


FIELDS = ("token_ids", "logprobs", "draws", "log_z", "log_tail", "label_logprob")


def _join(parts: list[Sparse]) -> Sparse:
    """Concatenate chunks, on the CPU."""
    columns = [[getattr(part, name) for part in parts] for name in FIELDS]
    return Sparse(*(None if c[0] is None else torch.cat(c).cpu() for c in columns))  # type: ignore[arg-type]


def _split(sparse: Sparse, counts: list[int]) -> list[Sparse]:
    """Cut the targets of a batch into those of its sequences."""
    columns = [getattr(sparse, name) for name in FIELDS]
    cut = [[None] * len(counts) if c is None else c.split(counts) for c in columns]
    return [Sparse(*row) for row in zip(*cut, strict=True)]
