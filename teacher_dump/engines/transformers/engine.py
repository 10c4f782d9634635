"""The embedded engine: a transformers causal LM in this process.

The head is applied to chunks of target positions only, so [batch, length, V] logits never exist.
Shapes: B sequences in a batch, L padded length, H hidden, N targets of a batch, V vocabulary.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor

from decant.schemas import Distributions, ScoredSequence, Truncation
from decant.schemas.distributions import joined
from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.packed_rows import scored_sequence
from decant.teacher_dump.engines.seam import EngineError, SequenceError, not_finite
from decant.teacher_dump.engines.sparsify import (
    Sparse,
    first_not_finite,
    sparsify_hidden,
    uniforms_for,
)
from decant.teacher_dump.engines.transformers.model import (
    input_device,
    is_out_of_memory,
    load_model,
    placement,
)
from decant.teacher_dump.inputs.records import TokenSequence

log = logging.getLogger(__name__)

WINDOW_BATCHES = 16
"""Sequences are sorted by length within windows of this many batches, then put back in order."""
WINDOW_BYTES = 128 << 20
"""Kept entries of a window, which wait for its end: it has fewer batches where K is large."""
PROBE, JUNK = 8, 24
"""Tokens of a sequence and of padding behind it that show whether the one sees the other."""
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
"""How far, relatively, hidden states may be apart that are the same; 0.05 in lower precision."""


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A batch whose results may still be on their way from the device."""

    batch: list[int]
    counts: list[int]
    """Targets of each sequence."""
    sparse: Sparse
    """On the CPU."""
    arrived: "torch.cuda.Event | None"


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
        self._model = load_model(config, model_path)
        self._device = input_device(self._model)
        self._head = self._find_head()
        self._masks = not self._padding_is_unseen()
        rows = self._model.get_output_embeddings().weight.shape[0]
        if rows < vocab_size:
            raise EngineError(f"the teacher has {rows} output rows, fewer than {vocab_size} ids")
        log.info(
            "teacher %s on %s, %s%s, head %s",
            type(self._model).__name__,
            placement(self._model),
            self._model.dtype,
            f", {config.quantization}" if config.quantization else "",
            "in chunks of targets" if self._head else "with the whole forward",
        )

    def score(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence]:
        """The scored sequences in the order given; see `Engine.score`.

        A batch that does not fit the memory is halved, and so are those that follow it.
        """
        for window in self._windows(sequences):
            left = sorted(window, key=lambda i: -len(sequences[i].input_ids))
            done: dict[int, ScoredSequence] = {}
            flying: Flight | None = None
            while left or flying:
                launched = self._launch(sequences, left, first_sequence) if left else None
                # The device is at work on the next batch while this one is taken apart.
                if flying:
                    done.update(_landed(flying, sequences))
                flying = launched
                left = left[len(launched.batch) :] if launched else []
            for index in window:
                yield done.pop(index)

    def reducing(
        self, *, vocab_size: int, truncation: Truncation, temperatures: tuple[float, ...]
    ) -> "TransformersEngine":
        """The same loaded teacher, of whose logits something else is made."""
        other = copy.copy(self)
        other._vocab_size, other._truncation = vocab_size, truncation
        other._temperatures = temperatures
        return other

    def close(self) -> None:
        """Free the teacher."""
        del self._model, self._head

    def _windows(self, sequences: Sequence[TokenSequence]) -> Iterator[list[int]]:
        window: list[int] = []
        tokens = 0
        most = min(
            WINDOW_BATCHES * self._max_batch_tokens,
            max(2 * self._max_batch_tokens, WINDOW_BYTES // (8 * max(self._truncation.slots, 1))),
        )
        for index, sequence in enumerate(sequences):
            window.append(index)
            tokens += len(sequence.input_ids)
            if tokens >= most:
                yield window
                window, tokens = [], 0
        if window:
            yield window

    def _launch(
        self, sequences: Sequence[TokenSequence], left: list[int], first_sequence: int
    ) -> Flight:
        """Score the first of those left, longest first: as many as fit `max_batch_tokens`."""
        length = len(sequences[left[0]].input_ids)
        while True:
            batch = left[: max(1, self._max_batch_tokens // length)]
            try:
                return self._forward(sequences, batch, first_sequence)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    sample = sequences[batch[0]].sample_id
                    raise SequenceError(
                        f"out of memory with sample {sample} alone, of {length} tokens: {error}",
                        batch[0],
                    ) from error
                reason = str(error).splitlines()[0]
            # Behind the except block, where nothing refers to the tensors of the failed try.
            self._max_batch_tokens = max(len(batch) // 2 * length, 1)
            log.warning(
                "out of memory with %d x %d tokens, going on with batches of at most %d: %s",
                len(batch),
                length,
                self._max_batch_tokens,
                reason,
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @torch.inference_mode()
    def _forward(
        self, sequences: Sequence[TokenSequence], batch: list[int], first_sequence: int
    ) -> Flight:
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
        padded = self._masks and len(set(lengths)) > 1
        inputs = {
            "input_ids": self._sent(ids_BL),
            "attention_mask": self._sent(mask_BL) if padded else None,
            "use_cache": False,
        }
        if self._head is not None:
            states_BLH = self._model.base_model(**inputs).last_hidden_state
        else:
            states_BLH = self._model(**inputs).logits
        # Places found on the CPU: to look for them on the device would wait for it.
        rows = self._sent(predicted_BL.flatten().nonzero()[:, 0]).to(states_BLH.device)
        counts = [int(sequences[i].is_target.sum()) for i in batch]
        uniforms = None
        if self._truncation.sampled:
            drawn = [
                uniforms_for(self._truncation, first_sequence + i, n)
                for i, n in zip(batch, counts, strict=True)
            ]
            uniforms = self._sent(torch.from_numpy(np.concatenate(drawn)))
        with align_module_device(self._model.get_output_embeddings()):  # once, where offloaded
            parts = list(
                sparsify_hidden(
                    states_BLH.flatten(0, 1)[rows],
                    self._head or (lambda logits_NV: logits_NV),
                    self._sent(ids_BL[:, 1:][predicted_BL[:, :-1]]),
                    vocab_size=self._vocab_size,
                    truncation=self._truncation,
                    temperatures=self._temperatures,
                    uniforms=uniforms,
                    check=False,
                )
            )
        device = parts[0].token_ids.device
        sparse, arrived = _joined(parts), None
        if device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
        return Flight(batch, counts, sparse, arrived)

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor on the teacher's device, without waiting for it."""
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    @torch.inference_mode()
    def _padding_is_unseen(self) -> bool:
        """Whether tokens behind a sequence change nothing in it, so that no mask is needed.

        Tried out, as not every causal LM is causal; without a mask attention has faster kernels.
        """
        tokens = torch.arange(1, 1 + PROBE + JUNK) % self._vocab_size
        whole = torch.stack([tokens, tokens.flip(0)])
        try:
            alone, padded = (
                self._model.base_model(input_ids=self._sent(ids), use_cache=False).last_hidden_state
                for ids in (whole[:, :PROBE], whole)
            )
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:
            log.info("padding is masked, as what it does cannot be tried out: %s", error)
            return False
        alone, padded = alone.float(), padded[:, :PROBE].float()
        distance = torch.linalg.vector_norm(alone - padded) / torch.linalg.vector_norm(alone)
        return bool(distance < ROUNDING.get(self._model.dtype, 0.05))

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
            if has_offloaded_params(linear):  # but in place now: its own hook would fetch it again
                logits = torch.nn.functional.linear(hidden_NH, linear.weight, linear.bias)
            else:
                logits = linear(hidden_NH.to(linear.weight.device))
            if scale != 1:
                logits = logits * scale
            return cap * torch.tanh(logits / cap) if cap else logits

        probe = torch.arange(1, min(9, self._vocab_size), device=self._device).unsqueeze(0)
        try:
            hidden = self._model.base_model(input_ids=probe, use_cache=False).last_hidden_state
            with align_module_device(linear):
                ours = head(hidden[0]).float()
        except (AttributeError, TypeError, RuntimeError) as error:
            log.info("the head cannot be applied apart: %s", error)
            return None
        theirs = self._model(input_ids=probe, use_cache=False).logits[0].float().to(ours.device)
        same = ours.shape == theirs.shape and torch.allclose(
            ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True
        )
        return head if same else None


def _landed(flight: Flight, sequences: Sequence[TokenSequence]) -> dict[int, ScoredSequence]:
    """The scored sequences of a batch by index. Raises SequenceError if one is not finite."""
    if flight.arrived:
        flight.arrived.synchronize()
    if (row := first_not_finite(flight.sparse)) is not None:
        index = flight.batch[int(np.searchsorted(np.cumsum(flight.counts), row, "right"))]
        raise not_finite(sequences[index], index)
    known = {name: value.numpy() for name, value in flight.sparse.known().items()}
    done: dict[int, ScoredSequence] = {}
    start = 0
    for index, count in zip(flight.batch, flight.counts, strict=True):
        rows = slice(start, start + count)
        own = {name: values[rows] for name, values in known.items()}
        done[index] = scored_sequence(sequences[index], own)
        start += count
    return done


def _joined(parts: list[Sparse]) -> Sparse:
    """Concatenate chunks, on the CPU; from a GPU they may arrive later, in pinned memory."""
    return Distributions(
        **joined(parts, lambda chunks: torch.cat(chunks).to("cpu", non_blocking=True))
    )
