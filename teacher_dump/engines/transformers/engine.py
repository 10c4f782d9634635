"""The embedded engine: a transformers causal LM in this process.

The head is applied to chunks of target positions only, so [batch, length, V] logits never exist.
Shapes: B sequences in a batch, L padded length, H hidden, N targets of a batch, V vocabulary.
"""

import copy
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import align_module_device
from numpy.typing import NDArray
from torch import Tensor

from decant.schemas import Distributions, ScoredSequence, Truncation
from decant.schemas.distributions import joined
from decant.teacher_dump.engines.batches import windows
from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.packed_rows import scored_sequence
from decant.teacher_dump.engines.seam import SequenceError, not_finite
from decant.teacher_dump.engines.sparsify import (
    Sparse,
    first_not_finite,
    sparsify_hidden,
    uniforms_for,
)
from decant.teacher_dump.engines.transformers.head import find_head
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
    find_sharing,
    refuse_sight_of_later_tokens,
    rounding_of,
)
from decant.teacher_dump.inputs.records import TokenSequence

log = logging.getLogger(__name__)

WINDOW_BATCHES = 16
"""Sequences are sorted by length within windows of this many batches, then put back in order."""
WINDOW_BYTES = 128 << 20
"""Kept entries of a window, which wait for its end: it has fewer batches where K is large."""
SAY_EVERY_SECONDS = 60.0
"""Between two lines that say how far a window has come."""


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
        name = type(self._model).__name__
        refuse_too_few_rows(self._model, vocab_size)
        self._head = find_head(self._model, self._device, vocab_size)
        self._groups = LengthGroups(self._model)
        probed = (self._states, self._groups, vocab_size, max_length)
        tolerance = rounding_of(self._model)
        refuse_sight_of_later_tokens(*probed, tolerance=tolerance, name=name)
        self._sharing = find_sharing(
            self._read,
            *probed[1:],
            batch_tokens=self._max_batch_tokens,
            tolerance=tolerance,
            what=f"what {name} says of a sequence",
        )
        log.info(
            "teacher %s on %s, %s%s, head %s",
            name,
            placement(self._model),
            self._model.dtype,
            f", {config.quantization}" if config.quantization else "",
            "in chunks of targets" if self._head else "with the whole forward",
        )

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(self._model.dtype).removeprefix("torch.")

    def score(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence]:
        """The scored sequences in the order given; see `Engine.score`.

        A batch that does not fit the memory is halved, and so are those that follow it.
        """
        most = min(
            WINDOW_BATCHES * self._max_batch_tokens,
            max(2 * self._max_batch_tokens, WINDOW_BYTES // (8 * max(self._truncation.slots, 1))),
        )
        for start, members in windows(sequences, most):
            window = range(start, start + len(members))
            left = sorted(window, key=lambda i: -len(sequences[i].input_ids))
            done: dict[int, ScoredSequence] = {}
            flying: Flight | None = None
            said = started = time.monotonic()
            while left or flying:
                launched = self._launch(sequences, left, first_sequence) if left else None
                # The device is at work on the next batch while this one is taken apart.
                if flying:
                    done.update(_landed(flying, sequences))
                flying = launched
                left = left[len(launched.batch) :] if launched else []
                if left and done and time.monotonic() - said >= SAY_EVERY_SECONDS:
                    said = time.monotonic()
                    _say(done.values(), len(members), said - started)
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

    def _launch(
        self, sequences: Sequence[TokenSequence], left: list[int], first_sequence: int
    ) -> Flight:
        """Score the first of those left, longest first: as many as fit `max_batch_tokens`."""
        length = len(sequences[left[0]].input_ids)
        while True:
            batch = self._alike(sequences, left[: max(1, self._max_batch_tokens // length)])
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

    def _alike(self, sequences: Sequence[TokenSequence], batch: list[int]) -> list[int]:
        """The first of a batch, longest first, that may be computed together."""
        lengths = [len(sequences[i].input_ids) for i in batch]
        if self._sharing < Sharing.EVERYTHING:
            return batch[: lengths.count(lengths[0]) if self._sharing else 1]
        group = self._groups.group(lengths[0])
        return batch[: sum(self._groups.group(length) == group for length in lengths)]

    @torch.inference_mode()
    def _forward(
        self, sequences: Sequence[TokenSequence], batch: list[int], first_sequence: int
    ) -> Flight:
        lengths = [len(sequences[i].input_ids) for i in batch]
        ids_BL = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        predicted_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        for row, index in enumerate(batch):
            sequence = sequences[index]
            ids_BL[row, : lengths[row]] = torch.tensor(sequence.input_ids)
            # The distribution of token t is what the model says at t - 1.
            predicted_BL[row, : lengths[row] - 1] = torch.tensor(sequence.is_target[1:])
        self._groups.forget()
        states_BLH = self._states(ids_BL)  # no mask: padding comes after all that is looked at
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
        linear = self._model.get_output_embeddings()
        with align_module_device(linear) if linear else nullcontext():  # once, where offloaded
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

    def _read(self, texts: Sequence[NDArray[np.int32]], _: NDArray[np.int32]) -> Tensor:
        """[B, L, H] of the least of L tokens of each text, in one batch."""
        ids_BL = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        for row, text in enumerate(texts):
            ids_BL[row, : len(text)] = torch.from_numpy(text)
        self._groups.forget()
        return self._states(ids_BL)[:, : min(map(len, texts))]

    def _states(self, ids_BL: Tensor) -> Tensor:
        """What a batch without a mask is scored from: hidden states, or logits."""
        inputs = {"input_ids": self._sent(ids_BL), "use_cache": False}
        if self._head is not None:
            return self._model.base_model(**inputs).last_hidden_state
        return self._model(**inputs).logits


def _say(done: Collection[ScoredSequence], total: int, seconds: float) -> None:
    """Log how far a window has come, which is given whole, on a slow teacher after minutes."""
    rate = sum(scored.num_targets for scored in done) / seconds
    log.info("teacher: %d of the next %d sequences scored, %.0f targets/s", len(done), total, rate)


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
