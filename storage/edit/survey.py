"""What an operation must know of every sequence of a cache before it makes another: one pass.

Shapes: S sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decant.storage.cache.reader import CacheReader
from decant.storage.cache.rows import Rows
from decant.storage.edit.derived import Piece


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What one pass over a cache found of each of its sequences, in plan order."""

    cache: CacheReader
    lengths: NDArray[np.int64]
    """[S] tokens."""
    targets: NDArray[np.int64]
    """[S] targets, with those that were lost with rejected sequences."""
    is_rejected: NDArray[np.bool_]
    """[S]."""
    columns: dict[str, NDArray]
    """[S] whatever else was asked for, by name."""

    def __len__(self) -> int:
        return len(self.lengths)

    def pieces(self, keep: NDArray[np.bool_]) -> Iterator[Piece]:
        """The pieces [one for each shard of which something is kept] of these sequences [S]."""
        for plan in self.cache.plan:
            part = slice(plan.first_sequence, plan.first_sequence + plan.num_sequences)
            kept = keep[part]
            if kept.any():
                yield Piece(
                    cache=self.cache,
                    shard=plan.shard,
                    keep=None if kept.all() else kept,
                    sequences=int(kept.sum()),
                    tokens=int(self.lengths[part][kept].sum()),
                    targets=int(self.targets[part][kept].sum()),
                )


def survey(
    cache: CacheReader,
    columns: Callable[[Rows], dict[str, NDArray]],
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Look at every row group of a final cache; `columns` gives what is wanted of its sequences.

    `progress` is called with (row groups done, in all). Raises FormatError for damaged bytes.
    """
    lengths, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    found: dict[str, list[NDArray]] = {}
    groups = cache.row_groups()
    for done, group in enumerate(groups):
        rows = cache.read(group)
        lengths.append(np.diff(rows.row_starts))
        targets.append(np.diff(rows.target_starts))
        for name, values in columns(rows).items():
            found.setdefault(name, []).append(values)
        if progress:
            progress(done + 1, len(groups))
    every_target = np.concatenate(targets)
    is_rejected = np.zeros(len(every_target), bool)
    for entry in cache.rejected:
        is_rejected[entry.sequence] = True
        every_target[entry.sequence] = entry.targets
    return Survey(
        cache=cache,
        lengths=np.concatenate(lengths),
        targets=every_target,
        is_rejected=is_rejected,
        columns={name: np.concatenate(parts) for name, parts in found.items()},
    )


def grouped(pieces: Sequence[Piece], shard_targets: int) -> list[list[Piece]]:
    """Pieces in turn, joined to shards of at least so many targets; whole shards stay alone.

    A whole shard is left as it is only at the begin, where nothing was left out before it: behind
    that it would be written anew in any case.
    """
    groups: list[list[Piece]] = []
    first = room = 0
    for piece in pieces:
        stays = piece.keep is None and piece.record.first_sequence == first
        if stays or room <= 0:
            groups.append([piece])
            room = 0 if stays else shard_targets - piece.targets
        else:
            groups[-1].append(piece)
            room -= piece.targets
        first += piece.sequences
    return groups
