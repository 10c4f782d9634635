"""What a server says of a prompt's tokens, checked before anything is made of it.

Knows no server: an API reads its own answer into entries per token, and this refuses what no
distribution could be. Shapes: L tokens, K entries kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MASS_SLACK = 1e-3
"""How far the probabilities of a token may sum above 1: log probs of 16 bits, not logits."""
ABOVE_ZERO = 1e-4
"""How far a log prob may lie above 0."""
SAME_ENTRY = 1e-2
"""How far the actual token's log prob may lie from its entry among the top ones."""

MOST_NATS = 10**6
"""How large an integer log prob may be."""


class AnswerError(ValueError):
    """An answer that is not what was asked for."""


class TooFew(AnswerError):
    """It has fewer entries for a token than were asked for."""


class NotFinite(AnswerError):
    """The teacher gives NaN, or nothing, where a log prob is due."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenEntries:
    """What an API read of one token."""

    token_id: int
    """The actual token, as the server understood it."""
    logprob: Any
    """Its log prob; None where the server gives none."""
    top: Sequence[tuple[int | str, Any]]
    """Ids and log probs of the most probable tokens, the actual one perhaps among them; in place of
    an id the text that names none, or several."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TopEntries:
    """The top K of tokens 1 to L - 1, best first."""

    token_ids: NDArray[np.int32]
    """[L - 1, K]."""
    logprobs: NDArray[np.float32]
    """[L - 1, K]; -inf where the server says so."""
    label_logprob: NDArray[np.float32]
    """[L - 1]."""

    def at(self, positions: NDArray[np.intp]) -> "TopEntries":
        """Those of these tokens."""
        rows = positions - 1
        return TopEntries(
            token_ids=self.token_ids[rows],
            logprobs=self.logprobs[rows],
            label_logprob=self.label_logprob[rows],
        )


def check_tokens(given: Sequence[Any], ids: NDArray[np.int32]) -> None:
    """Raise AnswerError unless the server read exactly the ids that were sent."""
    if len(given) != len(ids):
        what = "adds tokens, such as special ones" if len(given) > len(ids) else "cuts the prompt"
        raise AnswerError(f"it read {len(given)} tokens of {len(ids)} sent: the server {what}")
    for place, (theirs, ours) in enumerate(zip(given, ids.tolist(), strict=True)):
        if theirs != ours:
            raise AnswerError(f"it read token {place} as id {theirs}, sent was {ours}")


def top_entries(
    rows: Sequence[TokenEntries | None],
    wanted: NDArray[np.bool_],
    k: int,
    vocab_size: int,
) -> TopEntries:
    """The top `k` of the `wanted` tokens of `rows`, which begin with token 1; others hold zeros.

    With k = 0 the most probable ones are not looked at. Raises AnswerError, or NotFinite.
    """
    n = len(rows)
    token_ids = np.zeros((n, k), np.int32)
    logprobs = np.zeros((n, k), np.float32)
    label_logprob = np.zeros(n, np.float32)
    for row, entries in enumerate(rows):
        if not wanted[row]:
            continue
        token = row + 1
        if entries is None:
            raise AnswerError(f"it gives no log probs for token {token}")
        label = _number(entries.logprob, token)
        found: dict[int, float] = {}
        for index, value in entries.top if k else ():
            if isinstance(index, str):
                raise AnswerError(
                    f"it names {index!r} among the most probable for token {token}, which is the "
                    "text of no id or of several"
                )
            if index in found:
                raise AnswerError(f"it gives id {index} twice for token {token}")
            if not 0 <= index < vocab_size:
                raise AnswerError(
                    f"it gives id {index} for token {token}, teacher.tokenizer has ids below "
                    f"{vocab_size}"
                )
            found[index] = _number(value, token)
        best = sorted(found.items(), key=lambda entry: -entry[1])[:k]
        if len(best) < k:
            raise TooFew(f"it gives {len(best)} of {k} entries for token {token}")
        _check_masses(found, entries.token_id, label, token)
        token_ids[row] = [index for index, _ in best]
        logprobs[row] = [value for _, value in best]
        label_logprob[row] = label
    return TopEntries(token_ids=token_ids, logprobs=logprobs, label_logprob=label_logprob)


def _number(value: Any, token: int) -> float:
    """A log prob, -inf included."""
    if value is None:
        raise NotFinite(f"it gives null as a log prob of token {token}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AnswerError(f"it gives {value!r} as a log prob of token {token}")
    if isinstance(value, int) and abs(value) > MOST_NATS:
        raise AnswerError(f"it gives an integer of absurd size as a log prob of token {token}")
    if not value < np.inf:  # NaN too
        raise NotFinite(f"it gives {value} as a log prob of token {token}")
    if value > ABOVE_ZERO:
        raise AnswerError(
            f"it gives {value:.4g} for token {token}, above 0: logits, not log probs "
            "(vLLM: --logprobs-mode raw_logprobs)"
        )
    return float(value)


def _check_masses(found: dict[int, float], label_id: int, label: float, token: int) -> None:
    mass = float(np.exp(list(found.values())).sum())
    if label_id in found:
        if abs(found[label_id] - label) > SAME_ENTRY * (1 + abs(label)) and label > -1e3:
            raise AnswerError(
                f"it gives {label:.4f} for token {token} itself and {found[label_id]:.4f} for the "
                "same id among the most probable"
            )
    elif found and label > min(found.values()) + SAME_ENTRY:
        raise AnswerError(
            f"it leaves token {token} itself, at {label:.4f}, out of the most probable, which go "
            f"down to {min(found.values()):.4f}"
        )
    else:
        mass += float(np.exp(label))
    if mass > 1 + MASS_SLACK:
        raise AnswerError(
            f"the probabilities it gives for token {token} sum to {mass:.4f}: they are "
            "renormalised over some of the vocabulary, or no probabilities"
        )
