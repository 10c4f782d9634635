"""What a loaded model does with tokens that it should not look at, tried out on the model itself.

Asked at every length at which the model may change (`LengthGroups`): whether a token sees later
ones; what may share a batch with a text; whether cached keys and values give what a plain forward
gives. An architecture's name answers none of this.
Shapes: B rows, L tokens, H whatever the model says of each token.
"""

import enum
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decant.teacher_dump.engines.seam import EngineError
from decant.teacher_dump.engines.transformers.lengths import LengthGroups
from decant.teacher_dump.engines.transformers.model import is_out_of_memory

log = logging.getLogger(__name__)

PROBE, JUNK = 8, 24
"""Tokens of a sequence, and after it, that show whether the one sees the other."""
ROUNDING, HALF_ROUNDING, QUANTISED_ROUNDING = 1e-3, 0.1, 0.3
"""How far, relatively, states may be apart that are the same: in float32, in lower precision, and
with quantised weights, where outliers among all tokens of a batch decide what is rounded."""

TOGETHER_TOKENS = 1024
"""Tokens that any machine has the memory to read at once."""
STEPS = 3
"""Tokens that are drawn to see what sampling does."""

States = Callable[[Tensor], Tensor]
"""[B, L] token ids to [B, L, H]; the model's own, or its logits."""
Says = Callable[[Sequence[NDArray[np.int32]], NDArray[np.int32]], Tensor]
"""[B, ...] what is taken from the model for a batch of texts, and tokens that follow each."""


class Sharing(enum.IntEnum):
    """What may share a batch."""

    NOTHING = 0
    EQUAL_LENGTHS = 1
    EVERYTHING = 2


def probed_lengths(groups: LengthGroups, max_length: int) -> list[int]:
    """A short length, and one beyond each boundary that a text of `max_length` tokens passes."""
    beyond = [boundary + JUNK for boundary in groups.boundaries if boundary < max_length]
    return sorted({max(2, min(length, max_length)) for length in (PROBE + JUNK, *beyond)})


@torch.inference_mode()
def refuse_sight_of_later_tokens(
    states: States,
    groups: LengthGroups,
    vocab_size: int,
    max_length: int,
    *,
    tolerance: float,
    name: str,
) -> None:
    """Raise EngineError if what `name` says of a token depends on a later one.

    Rounding may send a token to another expert; then two of three runs still agree, which they
    never do where later tokens are seen.
    """
    for length in probed_lengths(groups, max_length):
        seen = length - JUNK if length >= PROBE + JUNK else max(1, length // 2)
        runs = [_tokens(length, vocab_size) for _ in range(3)]
        for run, ids in enumerate(runs):
            ids[0, seen:] = (ids[0, seen:] * (run + 2) + run) % vocab_size
        try:
            said = _said(states, groups, runs, seen)
        except Exception as error:
            if not is_out_of_memory(error):
                raise EngineError(f"{name} cannot read {length} tokens: {error}") from error
            log.warning("no memory to try out what %s does at %d tokens", name, length)
            return
        apart = torch.stack([_distances(a, b) for a, b in itertools.combinations(said, 2)])
        if bool((apart.amin(dim=0) > tolerance).any()):
            again = _said(states, groups, runs, seen)[0]
            if bool((_distances(said[0], again) > tolerance).any()):
                raise EngineError(
                    f"{name} does not say the same of the same tokens twice: it draws random "
                    "numbers, or keeps something between two texts, so its scores mean nothing"
                )
            raise EngineError(
                f"{name} sees later tokens: what it says at token {seen} of {length} changes with "
                "the tokens after it, so it predicts nothing. A decoder is expected; if this model "
                "is meant as one, its config.json must say so (is_decoder: true)"
            )


@torch.inference_mode()
def find_sharing(
    says: Says,
    groups: LengthGroups,
    vocab_size: int,
    max_length: int,
    *,
    batch_tokens: int,
    tolerance: float,
    what: str,
) -> Sharing:
    """What may share a batch with a text and change nothing in it, at any length.

    `what` the model does so is said in the log, unless everything may. Rounding may send a token
    to another expert, so a difference counts where three texts in a row have it. Lengths of which
    no two fit `batch_tokens` never share a batch.
    """
    found = Sharing.EVERYTHING
    for length in probed_lengths(groups, max(2, min(max_length - STEPS, batch_tokens // 2))):
        texts = [_prompts(groups, vocab_size, length, seed) for seed in range(3)]
        if len(texts[0].short) < length and not _any_same(
            says, [([t.short], [t.short, t.long], t.following) for t in texts], tolerance
        ):
            found = min(found, Sharing.EQUAL_LENGTHS)
        if found < Sharing.EVERYTHING and not _any_same(
            says, [([t.short], [t.short, t.other], t.following) for t in texts], tolerance
        ):
            found = Sharing.NOTHING
            break
    if found < Sharing.EVERYTHING:
        log.warning("%s changes with what shares a batch: %s", what, found.name.lower())
    return found


@torch.inference_mode()
def cache_is_faithful(
    forced: Says,
    last_logits: Callable[[Tensor, int], Tensor],
    groups: LengthGroups,
    vocab_size: int,
    max_length: int,
    *,
    tolerance: float,
) -> bool:
    """Whether logits from cached keys and values, step by step, are those of a plain forward.

    `forced` gives them with a cache, for texts that go on with given tokens, `last_logits` without.
    """
    for length in probed_lengths(groups, max(2, max_length - STEPS)):
        for seed in range(3):
            text = _prompts(groups, vocab_size, length, seed)
            ids = np.concatenate([text.long, text.following[:-1]])
            row = torch.from_numpy(ids).long().unsqueeze(0)
            plain = last_logits(row, len(text.following))
            if _same(forced([text.long], text.following), plain, tolerance):
                break
        else:
            return False
    return True


@dataclass(frozen=True, slots=True, eq=False)
class _Texts:
    short: NDArray[np.int32]
    other: NDArray[np.int32]
    """As long."""
    long: NDArray[np.int32]
    """Of the same group of lengths."""
    following: NDArray[np.int32]
    """Up to STEPS tokens, with which all stay in their group."""


def _prompts(groups: LengthGroups, vocab_size: int, length: int, seed: int) -> _Texts:
    """Texts of up to `length` tokens."""
    end = groups.end(length)
    steps = STEPS if end is None else min(STEPS, end - length + 1)
    long = _tokens(length + steps, vocab_size, seed)[0].numpy().astype(np.int32)
    short = max(groups.start(length), min(PROBE, length))
    return _Texts(long[:short], long[::-1][:short].copy(), long[:length], long[length:])


def _any_same(
    says: Says,
    pairs: list[tuple[list[NDArray[np.int32]], list[NDArray[np.int32]], NDArray[np.int32]]],
    tolerance: float,
) -> bool:
    """Whether in any of the pairs of batches the first text is read the same."""
    return any(_same(says(a, more)[:1], says(b, more)[:1], tolerance) for a, b, more in pairs)


def _same(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors are apart by at most this share of the first, where both are finite."""
    one, other = (
        torch.nan_to_num(states.float(), 0, 0, 0).to(one.device) for states in (one, other)
    )
    return bool(torch.linalg.vector_norm(one - other) <= tolerance * torch.linalg.vector_norm(one))


def _tokens(length: int, vocab_size: int, seed: int = 0) -> Tensor:
    """[1, L] ids, none of which repeats soon."""
    return ((torch.arange(1, 1 + length) * (7 + 4 * seed) + 3 + seed) % vocab_size).unsqueeze(0)


def _said(
    states: States, groups: LengthGroups, rows: Sequence[Tensor], seen: int
) -> Sequence[Tensor]:
    """[1, L <= seen, H] of each row, in one forward if they are short: weights may be on a disk."""
    groups.forget()
    if rows[0].shape[1] * len(rows) <= TOGETHER_TOKENS:
        return states(torch.cat(list(rows)))[:, :seen].split(1)
    return [states(ids)[:, :seen] for ids in rows]


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """[L] how far each token's states are apart, as a share of the first; 0 where one is NaN."""
    one, other = one[0].float(), other[0].float()
    size = torch.linalg.vector_norm(one, dim=-1)
    return torch.nan_to_num(torch.linalg.vector_norm(one - other, dim=-1) / size, 0, 0, 0)


def rounding_of(model: Any) -> float:
    """The one of these that a loaded model has."""
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not getattr(quantiser.quantization_config, "dequantize", False):
        return QUANTISED_ROUNDING
    return ROUNDING if model.dtype in (torch.float32, torch.float64) else HALF_ROUNDING
