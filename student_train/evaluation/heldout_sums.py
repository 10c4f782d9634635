"""What a student is worth on targets that it was not trained on, beside the teacher's word.

Sums over targets, so that chunks, batches and processes add up; `metrics` turns them into means.
Shape letters: N targets, R rows of a chunk, K slots, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decant.student_train.config.loss import Terms
from decant.student_train.data.batch import Batch
from decant.student_train.data.parts import parts_of, weights_of
from decant.student_train.losses import EventTargets, SparseTargets, sparse_divergence
from decant.student_train.losses.divergences import OUTSIDE, Divergence, outside_means
from decant.student_train.losses.events import row_slices
from decant.student_train.losses.kinds import SAMPLED
from decant.student_train.losses.targets import MASKED_LOGIT

NUM_BINS = 15
"""Equal-width bins of confidence in [0, 1] for the calibration error."""
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldoutSums:
    """Sums over targets, float64."""

    targets: Tensor
    """[] how many."""
    ce: Tensor
    """[] cross-entropy of the actual tokens, nats."""
    divergence: Tensor
    """[] the configured divergence, T² included, nats."""
    loss: Tensor
    """[] kd_weight · divergence + ce_weight · cross-entropy."""
    teacher_ce: Tensor
    """[] the teacher's cross-entropy of the actual tokens, nats."""
    correct: Tensor
    """[] targets whose most probable token is the actual one."""
    agreeing: Tensor
    """[] targets whose most probable token is the teacher's, of those in `with_top1`."""
    with_top1: Tensor
    """[] targets whose teacher's most probable token is known: not those of draws alone."""
    with_probs: Tensor
    """[] targets whose probabilities are known: not those of draws alone."""
    overlap_kept: Tensor
    """[] Σ min(p, q) over the kept ids."""
    overlap_rest: Tensor
    """[] min of both sides' mass outside the kept ids: no less than Σ min(p, q) over them."""
    outside: Tensor
    """[5] what lies outside the kept ids, at the loss's temperature: `divergences.OUTSIDE`."""
    bytes: Tensor
    """[] bytes of the actual tokens; 0 where they are not known."""
    bins: Tensor
    """[NUM_BINS, 3] by confidence: targets, correct ones, Σ confidence."""

    @staticmethod
    def zero(device: torch.device | str = "cpu") -> "HeldoutSums":
        """Of no targets."""
        names = HeldoutSums.__dataclass_fields__
        zeros = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
        bins = torch.zeros(NUM_BINS, 3, dtype=torch.float64, device=device)
        outside = torch.zeros(len(OUTSIDE), dtype=torch.float64, device=device)
        return HeldoutSums(**{**zeros, "bins": bins, "outside": outside})

    def __add__(self, other: "HeldoutSums") -> "HeldoutSums":
        names = HeldoutSums.__dataclass_fields__
        return HeldoutSums(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def map(self, function: Callable[[Tensor], Tensor]) -> "HeldoutSums":
        """All sums through a function, as one flat tensor."""
        tensors = [getattr(self, name) for name in HeldoutSums.__dataclass_fields__]
        flat = function(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return HeldoutSums(
            **{
                name: part.view(tensor.shape)
                for name, part, tensor in zip(
                    HeldoutSums.__dataclass_fields__, parts, tensors, strict=True
                )
            }
        )

    def without_agreement(self) -> "HeldoutSums":
        """Without top-1 agreement: labels alone tell it only where the label is the likeliest."""
        nothing = torch.zeros_like(self.agreeing)
        return dataclasses.replace(self, agreeing=nothing, with_top1=nothing)

    def metrics(self) -> dict[str, float]:
        """The means, without what draws or labels do not tell: acceptance, top-1 agreement."""
        count = max(float(self.targets), 1.0)
        ce = float(self.ce) / count
        gaps = (self.bins[:, 1] - self.bins[:, 2]).abs().sum()
        found = {
            "heldout_ce": ce,
            "heldout_perplexity": math.exp(min(ce, 700.0)),
            "heldout_divergence": float(self.divergence) / count,
            "heldout_loss": float(self.loss) / count,
            "teacher_ce": float(self.teacher_ce) / count,
            "ece": float(gaps) / count,
            "top1_accuracy": float(self.correct) / count,
        }
        if self.bytes:
            num_bytes = float(self.bytes)
            found["heldout_bits_per_byte"] = float(self.ce) / math.log(2) / num_bytes
            found["heldout_divergence_per_byte"] = float(self.divergence) / num_bytes
        if self.with_probs:
            lower = float(self.overlap_kept / self.with_probs)
            upper = lower + float(self.overlap_rest / self.with_probs)
            found |= {"acceptance_lower": lower, "acceptance_upper": upper}
        for name, value in outside_means(self.outside.tolist()).items():
            found[f"heldout_{name}"] = value
        if self.with_top1:
            found["top1_agreement"] = float(self.agreeing / self.with_top1)
        return found


def rows_at_once(vocab_size: int) -> int:
    """Targets of a chunk whose logits are to be held at once."""
    return max(64, CHUNK_BYTES // (4 * vocab_size))


@torch.no_grad()
def sums_of_chunks(
    logits_of: Callable[[slice], Tensor],
    batch: Batch,
    terms: Terms,
    vocab_size: int,
    chunk_rows: int | None = None,
    label_bytes: Tensor | None = None,
) -> HeldoutSums:
    """The sums over a batch; `logits_of(rows)` gives float32 logits [R, V] of some of its targets.

    V is at least `vocab_size`; what is beyond is cut off. `label_bytes` [V] are the bytes of each
    token, if they are known.
    """
    total = HeldoutSums.zero(batch.labels.device)
    size = chunk_rows or rows_at_once(vocab_size)
    at_1, weights_N = batch.targets_at(1.0), weights_of(batch, terms)
    chunks = [
        (part, rows, slice(part.rows.start + rows.start, part.rows.start + rows.stop))
        for part in parts_of(batch, terms)
        for rows in row_slices(part.targets, size)
    ]
    for part, inside, rows in chunks:
        logits_RV = logits_of(rows)[:, :vocab_size].float()
        weights = [w[rows] if isinstance(w, Tensor) else w for w in weights_N]
        targets, options = part.targets[inside], part.terms.divergence()
        if part.terms.kind in SAMPLED:
            options |= {"clip": 0.0}  # nobody trains on these, and they may have no sampler
        kd_R = sparse_divergence(
            logits_RV, targets, labels=batch.labels[rows], vocab_size=vocab_size, **options
        )
        outside = Divergence.of(**options).outside_of_logits(logits_RV, targets)
        ce_R = nn.functional.cross_entropy(logits_RV, batch.labels[rows], reduction="none")
        confidence_R, chosen_R = logits_RV.softmax(1).max(1)
        correct_R = chosen_R == batch.labels[rows]
        teacher = at_1[rows]
        kept_R = rest_R = 0 * ce_R
        if isinstance(teacher, EventTargets):
            known_R, agreeing_R = agreement_of_events(chosen_R, teacher)
            has_probs = False
        else:
            known_R, agreeing_R = _agreement(chosen_R, teacher)
            has_probs = teacher.logprobs is not None
        if has_probs:
            assert isinstance(teacher, SparseTargets)
            kept_R, rest_R = _overlap(logits_RV, teacher)
        total += HeldoutSums(
            targets=_sum(torch.ones_like(ce_R)),
            ce=_sum(ce_R),
            divergence=_sum(kd_R),
            loss=_sum(weights[0] * kd_R + weights[1] * ce_R),
            teacher_ce=-_sum(batch.label_logprob[rows]),
            correct=_sum(correct_R),
            agreeing=_sum(agreeing_R),
            with_top1=_sum(known_R),
            with_probs=_sum(torch.full_like(ce_R, float(has_probs))),
            overlap_kept=_sum(kept_R),
            overlap_rest=_sum(rest_R),
            outside=outside.double(),
            bytes=_sum(0 * ce_R if label_bytes is None else label_bytes[batch.labels[rows]]),
            bins=_binned(confidence_R, correct_R),
        )
    return total


def _sum(values_R: Tensor) -> Tensor:
    return values_R.sum(dtype=torch.float64)


def _agreement(chosen_R: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """Whether the teacher's most probable token is known, and whether it was chosen."""
    known_R = torch.ones_like(chosen_R, dtype=torch.bool)
    if targets.draws is not None:  # an exact head begins with it; drawn ids may lack it
        known_R = targets.draws[:, 0] == 0
    return known_R, known_R & (chosen_R == targets.token_ids[:, 0])


def agreement_of_events(chosen_R: Tensor, targets: EventTargets) -> tuple[Tensor, Tensor]:
    """The same of events; known in the last row of each chunk, where one is more than the rest."""
    log_p_C, slot_C = targets.log_p.max(1)
    known_R, agreeing_R = (torch.zeros_like(chosen_R, dtype=torch.bool) for _ in range(2))
    last_C = targets.last_rows
    top_C = targets.token_ids.gather(1, slot_C[:, None]).squeeze(1)
    known_R[last_C] = log_p_C > targets.log_rest
    agreeing_R[last_C] = known_R[last_C] & (chosen_R[last_C] == top_C)
    return known_R, agreeing_R


def _overlap(logits_RV: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """Σ min(p, q) over the kept ids at T=1, and min of the masses of all others."""
    assert targets.logprobs is not None
    real_RK, ids_RK = targets.is_real(), targets.filled_ids()
    lse_R = logits_RV.logsumexp(1)
    q_RK = (logits_RV.gather(1, ids_RK) - lse_R[:, None]).exp()
    p_RK = targets.logprobs.exp()
    kept_R = torch.where(real_RK, torch.minimum(p_RK, q_RK), 0.0).sum(1)
    rest_RV = logits_RV.scatter(1, ids_RK, MASKED_LOGIT)
    q_rest_R = (rest_RV.logsumexp(1) - lse_R).exp()
    return kept_R, torch.minimum(targets.log_tail.exp(), q_rest_R)


def _binned(confidence_R: Tensor, correct_R: Tensor) -> Tensor:
    """[NUM_BINS, 3]; bin b holds the confidences in (b, b+1] / NUM_BINS."""
    index_R = (confidence_R.double() * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
    rows_R3 = torch.stack(
        [torch.ones_like(confidence_R), correct_R.to(confidence_R.dtype), confidence_R], dim=1
    )
    bins = torch.zeros(NUM_BINS, 3, dtype=torch.float64, device=confidence_R.device)
    return bins.index_add_(0, index_R, rows_R3.double())
