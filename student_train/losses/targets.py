"""The teacher's side of a loss: kept ids, their log probs, and the mass of everything not kept.

Owns the shapes, the checks, and the step from stored T=1 log probs to log p_T. Knows nothing about
students or divergences.

Shape letters: N targets, K slots per target, V ids of the student's vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decant.schemas.distributions import Distributions

PADDING_ID = -1

# A teacher mass below exp(LOG_FLOOR), zero included, counts as exp(LOG_FLOOR): near the smallest
# normal float32, so q log(q / p) stays finite where the teacher rules a token out.
LOG_FLOOR = -87.0

# float32 stand-in for log 0 inside a logsumexp: unlike -inf it has a zero gradient, not a NaN.
MASKED_LOGIT = -1e30

# A logsumexp below this is that of masked logits alone, at any temperature: there is no tail.
NO_TAIL = -1e20

# Stored log probs may be quantised, so the total mass is only nearly 1; a wrong temperature is far.
_MASS_TOLERANCE = 0.1
_LOGPROB_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class SparseTargets:
    """The teacher's distributions of N targets, K kept ids each.

    `p_T(v) = exp(logprobs / T - log_z)` for the kept ids v, and `exp(log_tail)` is the mass under
    p_T of all the others. `log_z` and `log_tail` belong to the temperature in use.
    """

    token_ids: Tensor
    """[N, K] int64 (or int32) kept ids, -1 in unused slots, no id twice in a row."""
    logprobs: Tensor | None
    """[N, K] float32 log probs at T=1 over the full vocabulary, -inf in unused slots; None where
    the draws alone are known."""
    log_z: Tensor
    """[N] float32: log Σ_v p(v)^(1/T) over the full vocabulary, 0 at T=1."""
    log_tail: Tensor
    """[N] float32: log of the mass under p_T of everything not kept, -inf when there is none."""
    draws: Tensor | None = None
    """[N, K] integer: how often each id was drawn, 0 for an exact head entry; None if unsampled."""
    entropy: Tensor | None = None
    """[N] float32 nats of the whole distribution at T=1; where there are no log probs."""
    sampler_logprobs: Tensor | None = None
    """[N] float32 nats: what the model that sampled the label gave it; of `of_labels` alone."""
    lam: Tensor | None = None
    """[N] float32 in [0, 1): of each target, in place of the option lam of a skewed divergence."""
    of_label_alone: bool = False
    """Whether the one kept id is the label, as `of_labels` makes them."""
    checked_for: tuple[int, float] | None = None
    """(student vocabulary, temperature) that `validate` has passed; kept by `to` and by slices."""

    @classmethod
    def of(
        cls,
        distributions: Distributions[Any],
        stored: Sequence[float] = (1.0,),
        temperature: float = 1.0,
    ) -> SparseTargets:
        """The targets of a scored sequence, or of distributions in numpy or torch, as losses want.

        `stored` are the temperatures of their cache (`reader.manifest.temperatures`), `temperature`
        the one that the loss is to be computed at. Raises ValueError if `stored` cannot be theirs,
        or if `temperature` is not one of them.
        """
        columns = distributions.log_z.shape[1]
        if len(stored) != columns:
            raise ValueError(
                f"log_z has {columns} columns, one for each temperature of the cache, but stored "
                f"is {list(stored)}: give the manifest's temperatures"
            )
        if temperature not in stored:
            raise ValueError(
                f"temperature {temperature:g} is not stored: {', '.join(f'{t:g}' for t in stored)}"
            )
        column = list(stored).index(temperature)
        log_z = _float_tensor(distributions.log_z)[:, column]
        log_tail = _float_tensor(distributions.log_tail)
        return cls(
            token_ids=torch.as_tensor(distributions.token_ids).to(torch.int64),
            logprobs=_float_tensor(distributions.logprobs),
            log_z=log_z,
            log_tail=torch.full_like(log_z, -torch.inf)
            if log_tail is None
            else log_tail[:, column],
            draws=None if distributions.draws is None else torch.as_tensor(distributions.draws),
            entropy=_float_tensor(distributions.entropy),
        )

    @classmethod
    def of_labels(cls, labels: Any, logprobs: Any, sampler_logprobs: Any = None) -> SparseTargets:
        """Targets of which the actual token alone is known, for kind `opd`, at T=1.

        `labels` [N] are the tokens, `logprobs` [N] the teacher's log probs of them, and
        `sampler_logprobs` [N] those of the model that sampled them, which `clip` needs.
        """
        log_p = _float_tensor(logprobs)
        sampler = _float_tensor(sampler_logprobs)
        return cls(
            token_ids=torch.as_tensor(labels).to(torch.int64)[:, None],
            logprobs=log_p[:, None],
            log_z=torch.zeros_like(log_p),
            log_tail=torch.log(-torch.expm1(log_p.clamp(max=0))),
            sampler_logprobs=sampler,
            of_label_alone=True,
        )

    def __len__(self) -> int:
        """Return N."""
        return self.token_ids.shape[0]

    def __getitem__(self, rows: slice) -> SparseTargets:
        """Return the targets of a slice of rows, as views."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """Return the same targets on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map(self, function: Callable[[Tensor], Tensor]) -> SparseTargets:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            name: function(v) for name, v in values.items() if isinstance(v, Tensor)
        }
        return dataclasses.replace(self, **moved)

    def validate(self, vocab_size: int, temperature: float = 1.0) -> SparseTargets:
        """Check every rule of the fields against a student vocabulary; return self, marked checked.

        The losses call this once per call; targets already checked for the same vocabulary and
        temperature pass for free. On a GPU the check waits for the device: validate before `to`.
        Raises ValueError with the first offending row and its numbers.
        """
        if self.checked_for is not None:
            smaller, at = self.checked_for
            if smaller <= vocab_size and at == float(temperature):
                return self
        targets = self._as_tensors()
        targets._check_layout()
        targets = dataclasses.replace(targets, token_ids=targets.token_ids.to(torch.int64))
        if len(targets) > 0:
            targets._check_values(vocab_size, temperature)
        return dataclasses.replace(targets, checked_for=(vocab_size, float(temperature)))

    def _as_tensors(self) -> SparseTargets:
        """The same with tensors where arrays of numpy were given."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors: dict[str, Any] = {
            name: torch.from_numpy(value)
            for name, value in values.items()
            if isinstance(value, np.ndarray)
        }
        return dataclasses.replace(self, **tensors)

    def _check_layout(self) -> None:
        if self.token_ids.ndim != 2 or self.token_ids.shape[1] == 0:
            raise ValueError(
                f"token_ids must be [N, K] with K >= 1, got shape {tuple(self.token_ids.shape)}"
            )
        if self.token_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"token_ids must be int64 or int32, got {self.token_ids.dtype}")
        num_targets = self.token_ids.shape[0]
        expected = {
            "logprobs": self.token_ids.shape,
            "log_z": (num_targets,),
            "log_tail": (num_targets,),
            "draws": self.token_ids.shape,
            "entropy": (num_targets,),
            "sampler_logprobs": (num_targets,),
            "lam": (num_targets,),
        }
        if self.logprobs is None and (self.draws is None or self.entropy is None):
            raise ValueError("targets without log probs need draws and the teacher's entropy")
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.shape != torch.Size(shape):
                raise ValueError(
                    f"{name} must have shape {tuple(shape)} beside token_ids "
                    f"{tuple(self.token_ids.shape)}, got {tuple(tensor.shape)}"
                )
            if tensor.device != self.token_ids.device:
                raise ValueError(
                    f"{name} is on {tensor.device}, token_ids on {self.token_ids.device}"
                )
            if name == "draws":
                if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                    raise ValueError(f"draws must hold integer counts, got {tensor.dtype}")
            elif tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name} must be float32 (or float64), got {tensor.dtype}")

    def _check_values(self, vocab_size: int, temperature: float) -> None:
        ids, real = self.token_ids, self.is_real()
        ordered = ids.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        fewest_draws = ids.new_zeros(len(self)) if self.draws is None else self.draws.amin(1)
        # Each rule: the rows that break it, and what to say of the first. NaN breaks every bound.
        rules: list[tuple[Tensor, Callable[[int], str]]] = [
            (
                ids.amin(1) < PADDING_ID,
                lambda row: f"token id {int(ids[row].min())}: unused slots must hold {PADDING_ID}",
            ),
            (
                ids.amax(1) >= vocab_size,
                lambda row: (
                    f"token id {int(ids[row].max())} is beyond the student's vocabulary of "
                    f"{vocab_size}: teacher and student must share one tokenizer"
                ),
            ),
            (
                twice.any(1),
                lambda row: (
                    f"token id {int(ordered[row, 1:][twice[row]][0])} stands in more than "
                    f"one slot: each kept id must stand in one"
                ),
            ),
            (~real.any(1), lambda row: "no kept id: a target needs at least one"),
            (
                fewest_draws < 0,
                lambda row: f"draws must be >= 0, got {int(fewest_draws[row])}",
            ),
            *(self._label_rules() if self.of_label_alone else []),
            *(self._draw_rules() if self.logprobs is None else self._logprob_rules(temperature)),
        ]
        if not bool(torch.stack([rows for rows, _ in rules]).any()):
            return
        for rows, message in rules:
            if bool(rows.any()):
                row = int(rows.nonzero()[0])
                raise ValueError(f"target {row} of {len(self)}: {message(row)}")

    def _label_rules(self) -> list[tuple[Tensor, Callable[[int], str]]]:
        logprobs, sampler = self.logprobs, self.sampler_logprobs
        assert logprobs is not None
        rules: list[tuple[Tensor, Callable[[int], str]]] = [
            (
                ~logprobs[:, 0].isfinite(),
                lambda row: (
                    f"the teacher's log prob of the sampled token must be finite, got "
                    f"{float(logprobs[row, 0])}: a distribution that was cut off says nothing of "
                    "an id beyond the cut, take the exact log prob (a cache's label_logprob)"
                ),
            )
        ]
        if sampler is not None:
            rules.append(
                (
                    ~(sampler.isfinite() & (sampler <= _LOGPROB_TOLERANCE)),
                    lambda row: (
                        f"the sampler's log prob of the sampled token must be finite and <= 0, got "
                        f"{float(sampler[row])}"
                    ),
                )
            )
        return rules

    def _draw_rules(self) -> list[tuple[Tensor, Callable[[int], str]]]:
        draws, entropy = self.draws, self.entropy
        assert draws is not None and entropy is not None
        bad = ((draws > 0) != self.is_real()).any(1)
        return [
            (bad, lambda row: f"every kept id needs draws and no other, got {draws[row].tolist()}"),
            (
                ~(entropy.isfinite() & (entropy >= -_LOGPROB_TOLERANCE)),
                lambda row: f"the entropy must be finite and >= 0, got {float(entropy[row])}",
            ),
        ]

    def _logprob_rules(self, temperature: float) -> list[tuple[Tensor, Callable[[int], str]]]:
        real, logprobs = self.is_real(), self.logprobs
        assert logprobs is not None
        log_p = torch.where(real, logprobs / temperature - self.log_z[:, None], -torch.inf)
        mass = log_p.exp().sum(1) + self.log_tail.exp()
        return [
            (
                (real & ~(logprobs <= _LOGPROB_TOLERANCE)).any(1),
                lambda row: f"log probs must be <= 0, got {logprobs[row][real[row]].tolist()}",
            ),
            (
                ~self.log_z.isfinite() | ~(self.log_tail <= _LOGPROB_TOLERANCE),
                lambda row: (
                    f"log_z must be finite and log_tail <= 0, got "
                    f"log_z={float(self.log_z[row])} and log_tail={float(self.log_tail[row])}"
                ),
            ),
            (
                ~((mass - 1).abs() <= _MASS_TOLERANCE),
                lambda row: (
                    f"kept and tail mass add up to {float(mass[row]):.4f} instead of 1: "
                    f"log_z and log_tail must be those of temperature {temperature}"
                ),
            ),
        ]

    def is_real(self) -> Tensor:
        """Return [N, K]: True in the slots that hold an id."""
        return self.token_ids >= 0

    def filled_slots(self) -> Tensor:
        """Return [N, K]: each slot's own index, or in an unused slot that of a slot in use.

        Gathering through it repeats a kept entry instead of reaching for id -1, so writing the
        result back over the vocabulary touches kept ids only.
        """
        own = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        return torch.where(self.is_real(), own, self.token_ids.argmax(dim=1, keepdim=True))

    def filled_ids(self) -> Tensor:
        """Return [N, K]: the kept ids, unused slots repeating one of them."""
        return self.token_ids.gather(1, self.filled_slots())

    def log_p(self, temperature: float) -> Tensor:
        """Return [N, K]: log p_T of the kept ids, not below LOG_FLOOR, LOG_FLOOR if unused."""
        assert self.logprobs is not None
        log_p = self.logprobs / temperature - self.log_z[:, None]
        return torch.where(self.is_real(), log_p, LOG_FLOOR).clamp(min=LOG_FLOOR)

    def with_tail_on(self, labels: Tensor, vocab_size: int, temperature: float) -> SparseTargets:
        """The targets with the mass of the tail given to `labels` [N], K + 1 slots of them.

        A label that is kept has both; one that is not has a slot of its own. Raises ValueError
        unless there is an id of the student's vocabulary for each target.
        """
        if labels.shape != (len(self),) or bool(((labels < 0) | (labels >= vocab_size)).any()):
            raise ValueError(
                f"tail='label' needs [{len(self)}] labels, one id below {vocab_size} for each "
                f"target, got {tuple(labels.shape)} from {labels.amin()} to {labels.amax()}"
            )
        assert self.logprobs is not None
        is_label = self.token_ids == labels[:, None]
        is_kept = is_label.any(1, keepdim=True)
        log_p = self.logprobs / temperature - self.log_z[:, None]
        tail = self.log_tail[:, None]
        log_p = torch.where(is_label, torch.logaddexp(log_p, tail.expand_as(log_p)), log_p)
        log_p = torch.cat([log_p, torch.where(is_kept, -torch.inf, tail)], dim=1)
        own = torch.where(is_kept, PADDING_ID, labels[:, None])
        return dataclasses.replace(
            self,
            token_ids=torch.cat([self.token_ids, own], dim=1),
            logprobs=temperature * (log_p + self.log_z[:, None]),
            log_tail=torch.full_like(self.log_tail, -torch.inf),
        )

    def kept_mass(self, temperature: float = 1.0) -> Tensor:
        """Return [N]: Σ p_T over the kept ids."""
        return torch.where(self.is_real(), self.log_p(temperature).exp(), 0.0).sum(1)

    def below(self, mu: float = 0.5, temperature: float = 1.0) -> Tensor:
        """Return [N]: whether the kept mass is under `mu`, where the akl split is not exact."""
        return self.kept_mass(temperature) < mu

    def num_below(self, mu: float = 0.5, temperature: float = 1.0) -> int:
        """Count the targets whose kept mass is under `mu`; on a GPU it waits for the device."""
        return int(self.below(mu, temperature).sum())

    def draw_weights(self, dtype: torch.dtype) -> Tensor:
        """Return [N, K]: weights w with E[Σ w f] = Σ_v p(v) f(v) for the sampled targets, T=1.

        w = p(v) in the exact head; beyond it R · draws(v) / Σ draws, where R is the mass outside
        the head, summed from the drawn entries and `log_tail`; 1 where the draws alone are known.
        """
        assert self.draws is not None
        if self.logprobs is None:
            return self.draws.to(dtype) / self.draws.sum(1, keepdim=True)
        real, log_p = self.is_real(), self.log_p(1.0).to(dtype)
        is_head = real & (self.draws == 0)
        drawn = torch.where(real, self.draws, 0).to(log_p.dtype)
        probs = log_p.exp()
        mass_outside_head = torch.where(drawn > 0, probs, 0.0).sum(1) + self.log_tail.exp()
        per_draw = mass_outside_head / drawn.sum(1).clamp(min=1.0)
        return torch.where(is_head, probs, drawn * per_draw[:, None])


def _float_tensor(values: Any) -> Any:
    """A float32 (or float64) tensor of numpy's or torch's numbers; None of None."""
    if values is None:
        return None
    tensor = torch.as_tensor(values)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
