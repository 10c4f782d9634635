"""A sample of a stream of token sequences, stratified by source file and by length.

One pass, in memory bounded by the sample: a reservoir per stratum (Vitter's algorithm R), of which
as many sequences are taken as the stratum's share of all targets. Weights undo the rounding.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from decant.teacher_dump.inputs.records import Record, TokenSequence

MOST_GROUPS = 16
"""Files beyond this many share strata, as neighbours."""
RECENT_RECORDS = 4096
"""Records whose file is remembered until their sequences come: more than are encoded at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A sequence of the sample."""

    sequence: TokenSequence
    weight: float
    """How many targets of the source each of its targets stands for."""


@dataclass(slots=True)
class _Stratum:
    targets: int = 0
    sequences: int = 0
    kept: list[tuple[int, TokenSequence]] = field(default_factory=list)


class StratifiedSample:
    """Offered every sequence of a source, draws `size` of them; the same at every run."""

    def __init__(self, size: int) -> None:
        """Empty."""
        self._size = size
        self._generator = np.random.default_rng(0)
        self._strata: dict[tuple[int, int], _Stratum] = {}
        self._offered = 0

    def offer(self, sequence: TokenSequence, group: int) -> None:
        """The next sequence, which comes from this group of files."""
        length = len(sequence.input_ids).bit_length()  # strata double in length
        stratum = self._strata.setdefault((group, length), _Stratum())
        stratum.targets += int(sequence.is_target.sum())
        stratum.sequences += 1
        entry = (self._offered, sequence)
        self._offered += 1
        if len(stratum.kept) < self._size:
            stratum.kept.append(entry)
        elif (slot := int(self._generator.integers(stratum.sequences))) < self._size:
            stratum.kept[slot] = entry

    def draw(self) -> list[Drawn]:
        """The sample, in the order of the source; all sequences if they are no more than `size`."""
        strata = [self._strata[key] for key in sorted(self._strata)]
        total = sum(stratum.targets for stratum in strata)
        counts = _allocate(self._size, [s.targets for s in strata], [len(s.kept) for s in strata])
        drawn: list[tuple[int, Drawn]] = []
        covered = sum(s.targets for s, count in zip(strata, counts, strict=True) if count)
        for stratum, count in zip(strata, counts, strict=True):
            chosen = self._generator.permutation(len(stratum.kept))[:count]
            taken = [stratum.kept[i] for i in chosen]
            targets = sum(int(sequence.is_target.sum()) for _, sequence in taken)
            weight = stratum.targets / targets * total / covered if taken else 0.0
            drawn += [(index, Drawn(sequence, weight)) for index, sequence in taken]
        return [entry for _, entry in sorted(drawn, key=lambda pair: pair[0])]


class FileGroups:
    """Which group of files a sequence comes from, by the records that went by just before."""

    def __init__(self, files: Sequence[str]) -> None:
        """`files` are the names that `Record.where` starts with, in the order of the source."""
        size = -(-len(files) // MOST_GROUPS) or 1
        self._groups = {name: index // size for index, name in enumerate(files)}
        self._recent: OrderedDict[str, int] = OrderedDict()
        self._last = 0

    def watch(self, records: Iterable[Record]) -> Iterator[Record]:
        """The same records."""
        for record in records:
            name = record.where.rsplit(" ", 2)[0]  # "data.jsonl line 12"
            self._last = self._groups.get(name, 0)
            self._recent[record.sample_id] = self._last
            if len(self._recent) > RECENT_RECORDS:
                self._recent.popitem(last=False)
            yield record

    def of(self, sample_id: str) -> int:
        """The group of a sequence, whose id is that of its record, or "<id>#<window>"."""
        found = self._recent.get(sample_id)
        if found is None:
            found = self._recent.get(sample_id.rpartition("#")[0], self._last)
        return found


def _allocate(size: int, shares: list[int], available: list[int]) -> list[int]:
    """How many to take of each stratum: by its share, at least one where that is possible."""
    if size >= sum(available):
        return list(available)
    order = sorted(range(len(shares)), key=lambda i: -shares[i])
    counts = [0] * len(shares)
    for i in order[:size]:
        counts[i] = 1
    ideal = [size * share / sum(shares) for share in shares]
    for _ in range(size - sum(counts)):
        open_ = [i for i in order if counts[i] < available[i]]
        counts[max(open_, key=lambda i: ideal[i] - counts[i])] += 1
    return counts
