"""What a student is worth on held-out targets, from a cache alone."""

import torch
from accelerate import Accelerator

from student_train.distiller import Distiller
from student_train.stream import CacheStream, heldout_batches


@torch.no_grad()
def evaluate(model: Distiller, stream: CacheStream, accelerator: Accelerator) -> dict[str, float]:
    """Means over all targets of the stream's part, in nats, the same on every rank.

    `heldout_ce`: cross-entropy of the actual tokens; `heldout_divergence`: the configured
    divergence with its T^2; `teacher_ce`: the teacher's cross-entropy on the same tokens.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for batch, counts in heldout_batches(stream):
        out = model(batch.to(accelerator.device))
        if counts:
            n = batch.num_targets
            sums += torch.tensor(
                [out.ce.item() * n, out.kd.item() * n, -batch.teacher_logprob.sum().item(), n],
                dtype=torch.float64,
            )
    model.train(was_training)
    totals = accelerator.reduce(sums.float().to(accelerator.device), reduction="sum").tolist()
    ce, divergence, teacher_ce, targets = totals
    return {
        "heldout_ce": ce / targets,
        "heldout_divergence": divergence / targets,
        "teacher_ce": teacher_ce / targets,
    }
