"""Dense logits to a sparse distribution that is exact where it counts, in bounded memory.

The one place where entries are chosen and masses computed; every engine that sees logits uses it.
Shapes: n targets, V vocabulary, K slots, T temperatures.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decant.schemas import Distributions, Truncation

LOGPROB_FLOOR = -10_000.0
"""Log probs are floored here, so that a teacher's -inf logits stay finite numbers."""
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Float32 logits reduced at a time: near the cache on a CPU, enough to fill a GPU."""
ID_BITS = (1 << 29) - 1
"""What float32 leaves unused of a float64."""
PRODUCT_ROWS = 128
"""Rows per product with the head, at least: fewer leave a wide head bound by its own reading."""


class NotFinite(ValueError):
    """Some logits are NaN or +inf; `row` is the first such target."""

    def __init__(self, row: int) -> None:
        """Remember the row of the chunk."""
        super().__init__(f"logits of target {row} are not finite")
        self.row = row


Sparse = Distributions[Tensor]
"""The sparse distributions of n targets, on the logits' device."""


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """How many targets' logits fit `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


def sparsify_hidden(
    hidden_NH: Tensor,
    compute_logits: Callable[[Tensor], Tensor | None],
    labels_N: Tensor,
    *,
    vocab_size: int,
    truncation: Truncation,
    temperatures: tuple[float, ...],
    uniforms: Tensor | None = None,
    check: bool = True,
) -> Iterator[Sparse]:
    """Apply a head to hidden states a few rows at a time and sparsify its logits, cut to the ids.

    At no time are there more logits than `chunk_rows` or `PRODUCT_ROWS` say. Yields nothing where
    the head gives None, as on the ranks of a tensor-parallel model that see no logits.
    Raises NotFinite with the row of `hidden_NH`; without `check`, see `sparsify`.
    """
    size = chunk_rows(vocab_size, hidden_NH.device)
    step = max(size, PRODUCT_ROWS)
    for start in range(0, len(hidden_NH), step):
        logits_NV = compute_logits(hidden_NH[start : start + step])
        if logits_NV is None:
            return
        assert logits_NV.shape[1] >= vocab_size
        for offset, chunk_NV in enumerate(logits_NV[:, :vocab_size].split(size)):
            first = start + offset * size
            rows = slice(first, first + len(chunk_NV))
            try:
                yield sparsify(
                    chunk_NV,
                    labels_N[rows].to(chunk_NV.device),
                    truncation,
                    temperatures,
                    None if uniforms is None else uniforms[rows].to(chunk_NV.device),
                    check=check,
                )
            except NotFinite as error:
                raise NotFinite(first + error.row) from None


def uniforms_for(truncation: Truncation, sequence: int, num_targets: int) -> NDArray[np.float64]:
    """[n, draws] random numbers of one sequence: they depend on the seed and plan index alone."""
    generator = np.random.Generator(np.random.Philox(key=[truncation.seed, sequence]))
    return generator.random((num_targets, truncation.draws))


def sparsify(
    logits: Tensor,
    labels: Tensor,
    truncation: Truncation,
    temperatures: tuple[float, ...],
    uniforms: Tensor | None = None,
    *,
    check: bool = True,
) -> Sparse:
    """Reduce logits [n, V] (cut to the shared vocabulary) to what a cache stores.

    With x the logits: log p = x - lse(x); log Z_T = lse(x/T) - lse(x)/T; the tail mass is the
    logsumexp over the complement of the kept ids, never 1 - sum p, which cancels.
    `uniforms` [n, draws] in [0, 1) are the random numbers of a sampling truncation.
    `logits` may be overwritten. Raises NotFinite on NaN or +inf, for which a GPU is waited for;
    without `check` its row holds NaN instead, which `first_not_finite` finds later.
    """
    x = logits.float()
    token_ids, draws = _chosen(x, truncation, uniforms)
    entropy = _entropy(x) if "entropy" in truncation.given else None
    if not truncation.rule.varies:
        used, kept_ids = None, token_ids
        kept = x.gather(1, kept_ids)
        # The last kept one bounds the rest too: no pass for a maximum is needed.
        bound = kept[:, -1:] if truncation.slots else x.amax(dim=1, keepdim=True)
    else:
        used, kept_ids = token_ids >= 0, token_ids.clamp(min=0)
        kept = x.gather(1, kept_ids).masked_fill(~used, -math.inf)
    label = x.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    if used is not None:
        # Unused slots point at id 0: let them write what is there already, or -inf if 0 is kept.
        zero_is_kept = ((token_ids == 0) & used).any(dim=1, keepdim=True)
        at_zero = x[:, :1].masked_fill(zero_is_kept, -math.inf)
        x.scatter_(1, kept_ids, torch.where(used, -math.inf, at_zero))
        bound = x.amax(dim=1, keepdim=True)
    bound = bound.clamp(min=torch.finfo(torch.float32).min)

    # From here on relative to the first kept logit, so that an offset of all costs no digits.
    first = kept[:, :1] if truncation.slots else bound
    kept, label, rest_bound = kept - first, label - first[:, 0], (bound - first)[:, 0]
    log_sums, log_tails = [], []
    for temperature in temperatures:
        last = temperature == temperatures[-1]
        tail = _log_sum_exp_(
            x if last else x.clone(), bound, temperature, kept_ids if used is None else None
        )
        tail += rest_bound / temperature
        log_sum = torch.logaddexp(torch.logsumexp(kept / temperature, dim=1), tail)
        log_sums.append(log_sum)
        log_tails.append(tail - log_sum)
    base = log_sums[0]
    log_z = [
        log_sum - base / temperature
        for log_sum, temperature in zip(log_sums, temperatures, strict=True)
    ]
    logprobs = (kept - base[:, None]).clamp_(min=LOGPROB_FLOOR)
    known: dict[str, Any] = {
        "token_ids": token_ids.int(),
        "logprobs": logprobs if used is None else logprobs.masked_fill_(~used, -math.inf),
        "draws": draws,
        "log_z": torch.stack(log_z, dim=1),
        "log_tail": torch.stack(log_tails, dim=1),
        "label_logprob": (label - base).clamp(min=LOGPROB_FLOOR),
        "entropy": entropy,
    }
    sparse: Sparse = Distributions(**{name: known[name] for name in truncation.given})
    if check and (row := first_not_finite(sparse)) is not None:
        raise NotFinite(row)
    return sparse


def first_not_finite(sparse: Sparse) -> int | None:
    """The first row made of logits that are NaN or +inf, if there is one."""
    bad = torch.isnan(sparse.log_z[:, 0])  # log Z - log Z at T=1: else 0
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def _chosen(
    x: Tensor, truncation: Truncation, uniforms: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Kept ids [n, K] in descending logit, -1 = unused, and draw counts [n, K] if sampled."""
    if not truncation.slots:
        return torch.zeros(len(x), 0, dtype=torch.long, device=x.device), None
    if not truncation.rule.has_head:
        assert uniforms is not None
        return _drawn(x, uniforms)
    head = _top(x, truncation.k)
    if truncation.p < 1:
        p = torch.softmax(x, dim=1).gather(1, head)
        before = p.cumsum(dim=1) - p
        rank = torch.arange(truncation.k, device=x.device)
        head = head.masked_fill((before >= truncation.p) & (rank >= truncation.min_k), -1)
    if not truncation.sampled:
        return head, None
    assert uniforms is not None
    tail = x.scatter(1, head, -math.inf)
    ids, draws = _drawn(tail, uniforms)
    empty = torch.isinf(tail.amax(dim=1, keepdim=True))  # nothing left to draw from
    ids, draws = ids.masked_fill(empty, -1), draws.masked_fill(empty, 0)
    return torch.cat([head, ids], dim=1), torch.cat([torch.zeros_like(head).int(), draws], dim=1)


def _drawn(x: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids drawn with replacement from softmax(x), most probable first, with counts.

    By inversion of the cumulative distribution in float64: the same numbers give the same draws
    whatever the batch.
    """
    cumulative = torch.softmax(x.double(), dim=1).cumsum(dim=1)
    points = uniforms.to(cumulative) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, points, right=True).clamp(max=x.shape[1] - 1)
    ids = ids.sort(dim=1).values
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    run = new.long().cumsum(dim=1) - 1
    counts = torch.zeros_like(ids).scatter_add_(1, run, torch.ones_like(ids))
    distinct = torch.full_like(ids, -1).scatter_(1, run, ids)
    score = x.gather(1, distinct.clamp(min=0)).masked_fill(distinct < 0, -math.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    return distinct.gather(1, order), counts.gather(1, order).int()


def _entropy(x: Tensor) -> Tensor:
    """[n] -sum p log p of softmax(x) in nats; an id of probability 0 adds nothing."""
    log_p = torch.log_softmax(x, dim=1).clamp_(min=LOGPROB_FLOOR)
    return -(log_p.exp() * log_p).sum(dim=1)


def _top(x: Tensor, k: int) -> Tensor:
    """Ids of the k largest entries of each row, largest first."""
    return _top_blocks(x, k) if x.device.type == "cpu" else x.topk(k).indices


def _top_blocks(x: Tensor, k: int) -> Tensor:
    """`_top` on a CPU, with numpy's vectorised selection: torch's own takes 2 to 10 times as long.

    In a wide row the k largest entries lie in the k blocks with the largest maxima, so only those
    blocks are looked through. Block b holds the ids congruent to b, so that the maxima run along
    contiguous memory.
    """
    n, vocab = x.shape
    width = round(math.sqrt(vocab / k))
    if width < 3:
        return _sorted_top(x, torch.arange(vocab), k)
    num_blocks = vocab // width
    whole = num_blocks * width
    maxima = x[:, :whole].view(n, width, num_blocks).amax(dim=1)
    starts = torch.arange(0, whole, num_blocks)
    ids = (_largest(maxima, k)[:, None, :] + starts[:, None]).view(n, -1)
    if whole < vocab:
        ids = torch.cat([ids, torch.arange(whole, vocab).expand(n, -1)], dim=1)
    return _sorted_top(x.gather(1, ids), ids, k)


def _largest(x: Tensor, k: int) -> Tensor:
    """[n, k] where the k largest entries of each row are, in any order."""
    if k == x.shape[1]:
        return torch.arange(k).expand(len(x), -1)
    return torch.from_numpy(np.argpartition(x.numpy(), -k, axis=1)[:, -k:].copy())


def _sorted_top(x: Tensor, ids: Tensor, k: int) -> Tensor:
    """[n, k] ids of the k largest entries of each row, largest first; `ids` are those of x.

    A float32 as a float64 has 29 bits to spare. They carry the id, so that values alone are moved,
    which is far faster than to move places by values. Of rows with NaN or +inf any id is given.
    """
    floor = torch.finfo(torch.float32).min  # -inf would become NaN
    keys = x.clamp(min=floor).double().view(torch.int64).bitwise_or_(ids).numpy()
    values = keys.view(np.float64)
    if k < values.shape[1]:
        values = np.partition(values, -k, axis=1)[:, -k:].copy()
    values.sort(axis=1)
    return torch.from_numpy(values.view(np.int64)[:, ::-1] & ID_BITS)


def _log_sum_exp_(x: Tensor, shift: Tensor, temperature: float, without: Tensor | None) -> Tensor:
    """[n] log sum exp((x - shift) / T) of rows [n, V] but their ids `without` [n, k].

    None of the ids summed may be above the shift. Overwrites x.
    """
    x.sub_(shift)
    if temperature != 1:
        x.div_(temperature)
    x.exp_()  # before the ids are cut: an exponential of -inf takes several times as long
    if without is not None:
        x.scatter_(1, without, 0.0)
    return x.sum(dim=1).log_()
