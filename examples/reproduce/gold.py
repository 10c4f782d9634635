"""GOLD's rule for students of another tokenizer, to compare with: unmatched tokens by their rank.

As in the hybrid ULD loss of TRL's GOLD (Patiño et al., Unlocking On-Policy Distillation for Any
Model Family, 2025). In each chunk of C, the distribution at its first token stands for all of it,
times the probabilities of its further tokens as they are. Tokens that both vocabularies have are
compared by the forward KL; all others are sorted by probability on each side and compared by
rank, with L1 (Boizard et al., Towards Cross-Tokenizer Distillation, 2024).

    loss = w_matched * Σ p log(p / q) + w_unmatched * Σ |p sorted - q sorted|

A cache has the teacher's kept ids alone, so this is not exact: what GOLD compares of the teacher's
tail, whose mass is the most that either sum can be wrong by in p, counts as probability 0. With the
tokens being matched by their bytes, end tokens are compared too. A dense reference that holds
[N, V] logits: for small students.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decant.storage import CacheReader, StoredRows
from decant.storage.cache.rows import decode_rows
from decant.student_train import CacheStream, OptimizerConfig, StudentConfig
from decant.student_train.alignment.aligner import Aligner
from decant.student_train.alignment.events import Events, Matching
from decant.student_train.alignment.pieces import Aligned
from decant.student_train.losses import EventTargets
from decant.student_train.model.alignment import own_tokenizer
from decant.student_train.model.student import load_student
from decant.student_train.runtime.optimizer import adamw, learning_rate

WAYS: dict[str, tuple[float, float] | None] = {"gold": None, "gold-even": (1.0, 1.0)}
"""Weights of matched and unmatched tokens. None, TRL's default: the shares of the teacher's
vocabulary that are matched and that are not."""
LEAST = math.log(1e-8)
"""Log probs of matched tokens are no less."""


class GoldAligner(Aligner):
    """Gives, as events of each chunk, all that the teacher keeps at its first token.

    Tokens that the student has not are there too, with id -1 and their probability.
    """

    def events(self, both: Aligned, rows: StoredRows, matching: Matching) -> Events:
        """Those of the chunks of a row group; both sums of `gold_loss` are over their slots."""
        first = both.chunks.teacher_first
        number = both.chunks.num_teacher
        where = both.teacher.where[first]
        kept = decode_rows(dataclasses.replace(rows, target_rows=where), self.layout)
        assert kept.logprobs is not None, "a cache of labels alone has nothing to rank"
        through = np.append(0, np.cumsum(rows.scalars["label_logprob"], dtype=np.float64))
        last = both.teacher.where[first + number - 1]
        further = through[last + 1] - through[where + 1]
        ids = np.where(kept.token_ids >= 0, matching.pairs[kept.token_ids], -1)
        mass = np.exp(kept.logprobs).astype(np.float64)
        return Events(
            token_ids=ids,
            log_p=(kept.logprobs + further[:, None]).astype(np.float32),
            log_rest=np.full(len(ids), -np.inf, np.float32),
            observed=(kept.label_logprob + further).astype(np.float32),
            kept_mass=mass.sum(1),
            found_mass=np.where(ids >= 0, mass, 0).sum(1),
        )


def gold_loss(
    logits: Tensor, targets: EventTargets, is_matched: Tensor, weights: tuple[float, float]
) -> Tensor:
    """The loss [C] of chunks, from logits [N, V]; `is_matched` [V] are the student's tokens."""
    log_q = logits.log_softmax(1)
    last = targets.last_rows
    first = last + 1 - targets.sizes
    of_labels = log_q.gather(1, targets.labels[:, None])[:, 0].cumsum(0)
    log_q = log_q[first] + (of_labels[last] - of_labels[first])[:, None]  # [C, V]
    p, is_pair = targets.log_p.exp(), targets.token_ids >= 0
    log_q_pairs = log_q.gather(1, targets.token_ids.clamp(min=0)).clamp(min=LEAST)
    terms = p * (targets.log_p.clamp(min=LEAST) - log_q_pairs)
    matched = torch.where(is_pair, terms, 0.0).sum(1)
    ours = log_q[:, ~is_matched].exp()
    theirs = torch.where(is_pair, 0.0, p).sort(1, descending=True).values
    most = min(ours.shape[1], theirs.shape[1])
    ranked = ours.topk(most, dim=1).values
    below = (ours.sum(1) - ranked.sum(1)) + theirs[:, most:].sum(1)  # against nothing
    unmatched = (ranked - theirs[:, :most]).abs().sum(1) + below
    return weights[0] * matched + weights[1] * unmatched


def train_gold(
    way: str,
    cache: str,
    output: Path,
    student: StudentConfig,
    optimizer_config: OptimizerConfig,
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train as `decant train` does, on the same sequences in the same order, by another loss."""
    reader = CacheReader(cache)
    tokenizer: Any = own_tokenizer(student.tokenizer)
    aligner = GoldAligner(reader, tokenizer, where=student.tokenizer)
    pairs = aligner.matching.pairs
    share = float((pairs >= 0).mean())
    weights = WAYS[way] or (share, 1 - share)
    is_matched = torch.zeros(aligner.vocab_size, dtype=torch.bool)
    is_matched[torch.from_numpy(pairs[pairs >= 0]).long()] = True
    model, _ = load_student(student, reader, seed, aligned=(tokenizer, aligner.vocab_size))
    optimizer = adamw(model, optimizer_config)
    stream = CacheStream(
        cache,
        batch_size=batch_size,
        seed=seed,
        alignment=lambda _: aligner,
        vocab_size=aligner.vocab_size,
    )
    model.train()
    for step, batch in zip(range(steps), stream, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optimizer_config, step, steps)
        logits = model(**batch).logits.flatten(0, 1)[batch.predictors]
        assert batch.events is not None
        loss = gold_loss(logits.float(), batch.events, is_matched, weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"{way} step {step}: loss {loss.item():.4f}", flush=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
