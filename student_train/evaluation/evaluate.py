"""Evaluate a student: on held-out targets, from caches alone, and by what it generates."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from decant.student_train.config.loss import Terms, of_source
from decant.student_train.data.heldout import heldout_batches
from decant.student_train.data.stream import CacheStream
from decant.student_train.evaluation.answers import Generation
from decant.student_train.evaluation.heldout_sums import HeldoutSums


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What a student is evaluated on, and what for."""

    streams: Mapping[str, CacheStream]
    """Held-out targets by name."""
    generation: Generation | None
    """Prompts to answer."""
    terms: Terms
    """Numbers of the loss to compute divergences with: those of the last step, all along; of each
    of the streams, where these are of the caches of a mixture that differ in them."""

    def __bool__(self) -> bool:
        return bool(self.streams) or self.generation is not None

    def metrics(
        self, model: torch.nn.Module, accelerator: Accelerator, output: Path | None = None
    ) -> dict[str, float]:
        """All metrics, the same on every process; answers go into `output` if given."""
        found: dict[str, float] = {}
        if self.streams:
            found |= evaluate(model, self.streams, accelerator, self.terms)
        if self.generation:
            student = accelerator.unwrap_model(model).student
            found |= self.generation.metrics(student, accelerator, output)
        return found


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    streams: Mapping[str, CacheStream],
    accelerator: Accelerator,
    terms: Terms,
) -> dict[str, float]:
    """The means of `HeldoutSums` over all targets of the streams' parts, the same on every process.

    With several streams also those of each, as `metric/name`. `terms` are the numbers of the loss
    to compute divergences with: the same at every evaluation, so that they can be compared.
    """
    distiller: Any = accelerator.unwrap_model(model)
    was_training = model.training
    model.eval()
    found: dict[str, float] = {}
    total = HeldoutSums.zero()
    for source, (name, stream) in enumerate(streams.items()):
        sums = HeldoutSums.zero(accelerator.device)
        for batch, counts in heldout_batches(stream):
            its = distiller.measure(batch.to(accelerator.device), of_source(terms, source))
            if counts:
                sums += its
        sums = sums.map(lambda flat: accelerator.reduce(flat, reduction="sum").cpu())
        if not any(reader.manifest.truncation.rule.has_entries for reader in stream.readers):
            sums = sums.without_agreement()
        total += sums
        if len(streams) > 1:
            found |= {f"{key}/{name}": value for key, value in sums.metrics().items()}
    model.train(was_training)
    return total.metrics() | found
