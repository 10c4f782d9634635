"""Stored ids and log probs on the device where a batch is: numbers to ids, planes to values.

What `storage/cache/numbering.py` and `logprobs.py` do with numpy, also on a GPU.

Shapes: N targets of a batch, K slots, M runs of targets of one numbering, S numbers listed.
"""

import dataclasses
import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decant.storage.cache.numbering import Numbering, ids_of_planes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Numberings:
    """The numberings of the row groups that a batch's runs of targets come from."""

    known: tuple[Numbering | None, ...]
    """[M] None: numbers are ids."""
    heads: Tensor
    """[M, S] int32: the ids of the first numbers, 0 behind the last."""
    sizes: Tensor
    """[M] int32: numbers from here on are of the id that is so much less."""
    runs: Tensor
    """[N] int32: the run of each target."""

    @staticmethod
    def of(known: list[Numbering | None], counts: list[int]) -> "Numberings | None":
        """Of sequences with so many targets each; None where numbers are ids in all of them."""
        if not any(known):
            return None
        runs: list[tuple[Numbering | None, int]] = []
        for numbering, count in zip(known, counts, strict=True):
            if runs and runs[-1][0] is numbering:
                count += runs.pop()[1]
            runs.append((numbering, count))
        sizes = [0 if numbering is None else len(numbering.head) for numbering, _ in runs]
        heads = torch.zeros(len(runs), max(sizes), dtype=torch.int32)
        for row, size, (numbering, _) in zip(heads, sizes, runs, strict=True):
            if numbering is not None:
                row[:size] = torch.from_numpy(numbering.head)
        return Numberings(
            known=tuple(numbering for numbering, _ in runs),
            heads=heads,
            sizes=torch.tensor(sizes, dtype=torch.int32),
            runs=torch.repeat_interleave(torch.tensor([n for _, n in runs])).to(torch.int32),
        )

    def of_targets(self, rows: Tensor) -> "Numberings":
        """Those of the targets at `rows` [n], int64, alone."""
        return dataclasses.replace(self, runs=self.runs.index_select(0, rows))

    def ids(self, planes: list[NDArray], vocab_size: int) -> Tensor:
        """[N, K] int64 ids from the bytes of their numbers [N, K], lowest first, on the CPU."""
        runs = self.runs.numpy()
        edges = [0, *(np.flatnonzero(np.diff(runs)) + 1).tolist(), len(runs)]
        parts = [
            ids_of_planes(
                [plane[start:end] for plane in planes],
                self.known[int(runs[start])] if start < end else None,
                vocab_size,
                np.int64,
            )
            for start, end in itertools.pairwise(edges)
        ]
        return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def numbers_of_planes(planes: list[Tensor]) -> Tensor:
    """[N, K] int32 from their bytes, lowest first."""
    numbers = planes[0].to(torch.int32)
    for i, plane in enumerate(planes[1:]):
        numbers |= plane.to(torch.int32) << 8 * (i + 1)
    return numbers


def ids_on_device(planes: list[Tensor], numberings: Numberings) -> Tensor:
    """`Numberings.ids` on any device."""
    numbers = numbers_of_planes(planes)
    sizes = numberings.sizes.index_select(0, numberings.runs)[:, None]
    at = torch.minimum(numbers, sizes - 1).clamp_(min=0)
    at += (numberings.runs * numberings.heads.shape[1])[:, None]
    listed = numberings.heads.flatten().index_select(0, at.flatten()).view(at.shape)
    return torch.where(numbers < sizes, listed, numbers - sizes).to(torch.int64)


def values_on_device(columns: tuple[Tensor, ...], slots: int, compact: bool) -> Tensor:
    """`storage.cache.logprobs.of_planes` on any device."""
    if len(columns) == 1:
        return columns[0]
    if compact:
        low, high = columns
        halves = [low & 15 | high << 4, low >> 4 | high & 240]
        return torch.cat(halves, dim=1)[:, :slots]
    bits, values = {
        2: (torch.int16, torch.float16),
        4: (torch.int32, torch.float32),
    }[len(columns)]
    steps = torch.stack(columns, dim=2).view(bits).squeeze(2)
    return steps.cumsum(1, dtype=bits).view(values)
