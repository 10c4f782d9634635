"""Targets of a student of another tokenizer: chunks of its tokens, with events as their classes.

Owns the step from the student's reduced rows to the classes of a chunk; the equations stand in
docs/losses.md. Knows nothing of tokenizers: which events there are is decided elsewhere.

Shape letters: N rows (the student's tokens), C chunks of consecutive rows, E slots for events.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decant.student_train.losses.targets import LOG_FLOOR, MASKED_LOGIT, NO_TAIL, SparseTargets
from decant.student_train.losses.terms import divergence_of_classes

_MASS_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class EventTargets:
    """The teacher's probabilities of what the student's tokens of C chunks may be.

    The last row of a chunk has the events, `token_ids` being what the student's token there is in
    each of them; the rows before it are fixed at `labels`. P(event) = exp(log_p), and
    P(all the rest) = exp(log_rest).
    """

    token_ids: Tensor
    """[C, E] int64, -1 in unused slots, no id twice in a row, at least one in each."""
    log_p: Tensor
    """[C, E] float, -inf in unused slots."""
    log_rest: Tensor
    """[C] float, -inf where nothing is left."""
    labels: Tensor
    """[N] int64: the student's tokens."""
    sizes: Tensor
    """[C] int64 on the CPU: rows of each chunk, at least 1; N in all."""
    checked_for: tuple[int, float] | None = None
    """As in `SparseTargets`."""

    def __len__(self) -> int:
        """Return N."""
        return self.labels.shape[0]

    def __getitem__(self, rows: slice) -> EventTargets:
        """Return the chunks of a slice of rows, which begins and ends with chunks."""
        ends = self.sizes.cumsum(0)
        begin, stop, _ = rows.indices(len(self))
        first, last = (int(torch.searchsorted(ends, at, right=True)) for at in (begin, stop))
        chunks = slice(first, last)
        assert stop <= begin or int(self.sizes[chunks].sum()) == stop - begin, "a chunk was cut"
        return dataclasses.replace(
            self,
            token_ids=self.token_ids[chunks],
            log_p=self.log_p[chunks],
            log_rest=self.log_rest[chunks],
            labels=self.labels[rows],
            sizes=self.sizes[chunks],
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> EventTargets:
        """Return the same targets on `device`; the sizes stay where they are."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def map(self, function: Callable[[Tensor], Tensor]) -> EventTargets:
        """Return the same targets with all tensors but the sizes through a function."""
        names = ("token_ids", "log_p", "log_rest", "labels")
        moved: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return dataclasses.replace(self, **moved)

    def validate(self, vocab_size: int, temperature: float = 1.0) -> EventTargets:
        """Check shapes and values against a student's vocabulary; return self, marked checked.

        Raises ValueError with the first offending chunk and its numbers.
        """
        if temperature != 1:
            raise ValueError(
                f"events are strings, and a product of probabilities at temperature "
                f"{temperature:g} is that of no string: train at temperature 1"
            )
        if self.checked_for is not None and self.checked_for[0] <= vocab_size:
            return self
        num_chunks, slots = self.token_ids.shape
        for name, shape in (("log_p", (num_chunks, slots)), ("log_rest", (num_chunks,))):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(getattr(self, name).shape)}")
        if len(self.sizes) != num_chunks or int(self.sizes.sum()) != len(self):
            raise ValueError(
                f"sizes must be those of {num_chunks} chunks of {len(self)} rows, got "
                f"{len(self.sizes)} of {int(self.sizes.sum())}"
            )
        if num_chunks:
            self._check_values(vocab_size)
        return dataclasses.replace(self, checked_for=(vocab_size, 1.0))

    def _check_values(self, vocab_size: int) -> None:
        ids = self.token_ids
        ordered = ids.sort(dim=1).values
        mass = torch.where(ids >= 0, self.log_p.exp(), 0.0).sum(1) + self.log_rest.exp()
        rules = {
            f"an id outside of -1 to {vocab_size - 1}": (ids < -1) | (ids >= vocab_size),
            "an id in two slots": (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0),
            "no event": (ids < 0).all(1, keepdim=True),
            "events and rest whose probabilities do not add up to 1": (
                ~((mass - 1).abs() <= _MASS_TOLERANCE)
            )[:, None],
        }
        for what, broken in rules.items():
            if bool(broken.any()):
                chunk = int(broken.any(1).nonzero()[0])
                raise ValueError(
                    f"chunk {chunk} of {len(ids)} has {what}: ids {ids[chunk].tolist()}, "
                    f"probabilities adding up to {float(mass[chunk]):.4f}"
                )

    @property
    def last_rows(self) -> Tensor:
        """[C] the row that has the events of each chunk, where the targets are."""
        return (self.sizes.cumsum(0) - 1).to(self.labels.device)

    def row_ids(self) -> Tensor:
        """[N, E]: the ids that count in each row, the label alone before a chunk's last row."""
        ids = self.token_ids.new_full((len(self), self.token_ids.shape[1]), -1)
        ids[:, 0] = self.labels
        ids[self.last_rows] = self.token_ids
        return ids

    def is_real(self) -> Tensor:
        """Return [N, E]: True in the slots that hold an id."""
        return self.row_ids() >= 0

    def filled_ids(self) -> Tensor:
        """Return [N, E]: the ids of each row, unused slots repeating one of them."""
        ids = self.row_ids()
        return torch.where(ids >= 0, ids, ids.amax(1, keepdim=True))

    def divergence(
        self, kind: str, x_NE: Tensor, lse_tail_N: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Return the loss [N] of each chunk in its last row, 0 in the others.

        From the student's logits at `filled_ids` and the logsumexp of each row's other logits.
        """
        real_NE, last_C = self.is_real(), self.last_rows
        classes_NC = torch.cat([torch.where(real_NE, x_NE, MASKED_LOGIT), lse_tail_N[:, None]], 1)
        log_q_NC = classes_NC.log_softmax(1)
        before_C, log_rest_C = self._chunked(log_q_NC[:, 0], log_q_NC[:, -1])
        used_CE = self.token_ids >= 0
        log_q_CE = torch.where(used_CE, before_C[:, None] + log_q_NC[last_C, :-1], LOG_FLOOR)
        log_q_rest_C = torch.where(log_rest_C > NO_TAIL, log_rest_C, LOG_FLOOR)
        log_p_CE = torch.where(used_CE, self.log_p.to(x_NE.dtype), LOG_FLOOR)
        log_p_rest_C = self.log_rest.to(x_NE.dtype)
        loss_C = divergence_of_classes(
            kind,
            torch.cat([log_p_CE, log_p_rest_C[:, None]], 1).clamp(min=LOG_FLOOR),
            torch.cat([log_q_CE, log_q_rest_C[:, None]], 1),
            options,
            has_bucket=True,
        )
        return loss_C.new_zeros(len(self)).index_add(0, last_C, loss_C)

    def _chunked(self, log_label_N: Tensor, log_rest_N: Tensor) -> tuple[Tensor, Tensor]:
        """[C] log Q of the tokens before each chunk's last, and [C] of all that is no event.

        Q(rest) = Σ_j Q(tokens before j) · q_j(not the label, or at the last: no event).
        """
        longest = int(self.sizes.max()) if len(self.sizes) else 1
        if longest == 1:
            return torch.zeros_like(log_rest_N), log_rest_N
        sizes_C1 = self.sizes[:, None].to(self.labels.device)
        first_C1 = self.last_rows[:, None] + 1 - sizes_C1
        place_P = torch.arange(longest, device=self.labels.device)
        rows_CP = torch.minimum(first_C1 + place_P, self.last_rows[:, None])
        is_before_CP = place_P < sizes_C1 - 1
        steps_CP = torch.where(is_before_CP, log_label_N[rows_CP], 0.0)
        through_CP = steps_CP.cumsum(1)
        before_CP = torch.cat([torch.zeros_like(steps_CP[:, :1]), through_CP[:, :-1]], 1)
        terms_CP = torch.where(
            place_P < sizes_C1, before_CP + log_rest_N[rows_CP], 2 * MASKED_LOGIT
        )
        return before_CP[:, -1], terms_CP.logsumexp(1)


def row_slices(targets: SparseTargets | EventTargets, most_rows: int) -> Iterator[slice]:
    """Yield slices of at most so many rows that cut no chunk; a longer chunk has its own."""
    if isinstance(targets, SparseTargets):
        for start in range(0, len(targets), most_rows):
            yield slice(start, min(start + most_rows, len(targets)))
        return
    ends = targets.sizes.cumsum(0)
    start = 0
    while start < len(targets):
        fits = int(torch.searchsorted(ends, start + most_rows, right=True))
        fits = max(fits, int(torch.searchsorted(ends, start, right=True)) + 1)
        stop = int(ends[fits - 1])
        yield slice(start, stop)
        start = stop
