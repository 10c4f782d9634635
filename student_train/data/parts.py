"""The targets of a batch in the parts of its loss: consecutive ones of one divergence.

Shapes: N targets of a batch.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from decant.student_train.config.loss import LossTerms, Terms, of_source
from decant.student_train.data.batch import Batch
from decant.student_train.losses import EventTargets, LossPart, SparseTargets
from decant.student_train.losses.kinds import SAMPLED


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchPart:
    """Consecutive targets of a batch that one divergence is taken on."""

    rows: slice
    terms: LossTerms
    """Their weights may differ: `weights_of` has them."""
    targets: SparseTargets | EventTargets

    @property
    def loss(self) -> LossPart:
        """What the fused loss is asked for."""
        terms = self.terms
        return LossPart(
            targets=self.targets,
            kind=terms.kind,
            temperature=terms.temperature,
            tail=terms.tail,
            scale_by_t2=terms.scale_by_t2,
            options=terms.options,
        )


def parts_of(batch: Batch, terms: Terms) -> list[BatchPart]:
    """The targets of a batch, in their order; of several caches as few parts as there may be."""
    runs: list[tuple[LossTerms, slice]] = []
    if isinstance(terms, LossTerms) or len({str(one.divergence()) for one in terms}) == 1:
        runs = [(of_source(terms, 0), slice(0, batch.num_targets))]
    else:
        for source, rows in batch.runs():
            its = terms[source]
            if runs and runs[-1][0].divergence() == its.divergence():
                runs[-1] = (its, slice(runs[-1][1].start, rows.stop))
            else:
                runs.append((its, rows))
    return [
        BatchPart(rows=rows, terms=its, targets=targets_for(batch, its)[rows]) for its, rows in runs
    ]


def targets_for(batch: Batch, terms: LossTerms) -> SparseTargets | EventTargets:
    """What a kind looks at, of all targets of a batch."""
    if terms.kind in SAMPLED:
        return batch.sampled_targets
    targets = batch.targets_at(terms.temperature)
    if batch.lam is None or not isinstance(targets, SparseTargets):
        return targets
    return dataclasses.replace(targets, lam=batch.lam)


def weights_of(batch: Batch, terms: Terms) -> tuple[float | Tensor, float | Tensor]:
    """Those of divergence and cross-entropy: one for all targets, or [N] by their caches."""
    each = (terms,) if isinstance(terms, LossTerms) else terms

    def weight(name: str) -> float | Tensor:
        values = [getattr(one, name) for one in each]
        if all(value == values[0] for value in values):
            return float(values[0])
        assert batch.source is not None
        return torch.tensor(values, device=batch.source.device).index_select(0, batch.source)

    return weight("kd_weight"), weight("ce_weight")
