"""What a foreign dump holds: one pass that counts, plans, and refuses what no cache could say.

Knows nothing of how a cache is written.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from decant.schemas import ShardPlan
from decant.storage.cache.checks import EPSILON
from decant.storage.exchange.config import ImportConfig
from decant.storage.exchange.foreign import ForeignError, ForeignRecord

TAIL_RESOLUTION = 2.0**-23
"""Float32 log probs cannot say whether less mass than this is left."""
TOLERANCE = EPSILON / 2
"""How far probabilities may add up to anything but 1; a cache allows twice that after rounding."""
MISALIGNED = 0.2
"""So many more actual tokens found one token earlier or later mean that the lists are shifted."""
WORSE = 0.5
"""So many nats more per actual token one token earlier or later mean the same."""
JUDGED_TARGETS = 20
"""Fewer targets are too few to judge alignment, or whether a file is renormalised, by."""


@dataclass(slots=True)
class _Peak:
    """The largest value so far, and where it is."""

    value: float = -np.inf
    place: str = ""

    def see(self, values: NDArray, record: ForeignRecord) -> None:
        """Look at one value for each target of a record."""
        if len(values) and values.max() > self.value:
            target = int(values.argmax())
            self.value, self.place = float(values[target]), record.place(target)


@dataclass(slots=True)
class Survey:
    """What a whole dump holds: enough to refuse it, or to plan its cache."""

    config: ImportConfig
    vocab_size: int
    records: int = 0
    targets: int = 0
    found: int = 0
    """Targets whose actual token is among their entries."""
    neighbours: dict[int, int] = field(default_factory=lambda: {-1: 0, 1: 0})
    """Targets whose entries hold the token this far from the actual one."""
    nats: dict[int, float] = field(default_factory=lambda: {-1: 0.0, 0: 0.0, 1: 0.0})
    """Log probs of the tokens this far from the actual ones; at least the last entry's."""
    renormalised: int = 0
    """Targets whose log probs add up to 1."""
    unresolved: int = 0
    """Targets that leave less mass than can be told from log probs."""
    unknown: int = 0
    """Targets whose actual token is not."""
    first_unknown: str = ""
    floored: int = 0
    """Targets whose actual token's log prob is only an upper bound."""
    most: _Peak = field(default_factory=_Peak)
    """Entries of a target."""
    fewest: _Peak = field(default_factory=_Peak)
    """Entries of a target, negative."""
    top_value: _Peak = field(default_factory=_Peak)
    excess: _Peak = field(default_factory=_Peak)
    """Mass above 1, less what the rounding of the file's values can add."""
    scaled: int = 0
    """Targets whose probabilities add up to more than 1, or to less than what is left explains."""
    lost_mass: _Peak = field(default_factory=_Peak)
    """Mass that the entries leave."""
    unexplained: _Peak = field(default_factory=_Peak)
    """Mass that the ids left out cannot hold, being no more probable than the last entry."""
    skipped_records: int = 0
    """Records without a target."""
    longest: int = 0
    _shards: list[ShardPlan] = field(default_factory=list)
    _open: list[int] = field(default_factory=lambda: [0, 0, 0])
    _digest: Any = field(default_factory=xxhash.xxh3_128)

    def add(self, record: ForeignRecord) -> None:
        """Count one record in."""
        self.records += 1
        values, used = record.values, record.token_ids >= 0
        counts, each = used.sum(axis=1), np.arange(len(used))
        known = ~np.isnan(record.label_values)
        with np.errstate(all="ignore"):  # of logits, which are refused
            p = np.exp(values)
            mass = p.sum(axis=1)
            rounded = rounding_error(record, p)
            last = counts - 1
            added = record.token_ids[each, last] == record.labels  # may be less than the k-th
            last -= added & (counts > 1)
            unexplained = 1 - mass - (self.vocab_size - counts) * p[each, last] - rounded
        if record.log_tail is not None:
            unexplained = -rounded
        for peak, quantity in (
            (self.most, counts),
            (self.fewest, -counts),
            (self.top_value, values.max(axis=1, initial=-np.inf)),
            (self.excess, mass - 1 - rounded),
            (self.lost_mass, 1 - mass),
            (self.unexplained, unexplained),
        ):
            peak.see(quantity, record)
        if not known.all():
            self.first_unknown = self.first_unknown or record.place(int(np.argmin(known)))
            self.unknown += int((~known).sum())
        self.targets += len(known)
        self.found += int((record.token_ids == record.labels[:, None]).any(axis=1).sum())
        self.renormalised += int((np.abs(mass - 1) <= TOLERANCE).sum())
        self.scaled += int(((mass > 1 + TOLERANCE) | (unexplained + rounded > TOLERANCE)).sum())
        if record.floored is not None:
            self.floored += int(record.floored.sum())
        if record.log_tail is None:
            self.unresolved += int((1 - mass < TAIL_RESOLUTION).sum())
        self._align(record, values[each, counts - 1] if len(each) else mass)
        self._plan(record, len(known) if self.config.unknown_label != "skip" else int(known.sum()))

    def _align(self, record: ForeignRecord, last: NDArray[np.float64]) -> None:
        """Look at how well the lists fit the tokens one earlier, their own, and one later."""
        for step in self.nats:
            at = np.clip(record.positions + step, 0, len(record.input_ids) - 1)
            near = record.values_of(record.input_ids[at], np.full(len(at), np.nan))
            if step:
                self.neighbours[step] += int((~np.isnan(near)).sum())
            elif record.actual is not None:
                near = record.label_values
            self.nats[step] += float(np.fmax(near, last).sum())

    def _plan(self, record: ForeignRecord, targets: int) -> None:
        if not targets:
            self.skipped_records += 1
            return
        self.longest = max(self.longest, len(record.input_ids))
        counts = (1, len(record.input_ids), targets)
        self._open = [held + count for held, count in zip(self._open, counts, strict=True)]
        self._digest.update(record.input_ids.tobytes())
        self._digest.update(record.positions.tobytes())
        if self._open[2] >= self.config.shard_targets:
            self._close()

    def _close(self) -> None:
        sequences, tokens, targets = self._open
        self._shards.append(
            ShardPlan(
                shard=len(self._shards),
                first_sequence=sum(s.num_sequences for s in self._shards),
                num_sequences=sequences,
                num_tokens=tokens,
                num_targets=targets,
                input_xxh3_128=self._digest.hexdigest(),
            )
        )
        self._open, self._digest = [0, 0, 0], xxhash.xxh3_128()

    def plan(self) -> list[ShardPlan]:
        """The shards of the records that have targets."""
        if self._open[0]:
            self._close()
        return self._shards

    @property
    def k(self) -> int:
        """Entries that every target gets; at most, where lists vary."""
        if self.config.varying:
            return int(self.most.value)
        return self.config.k or self.fewest_entries

    @property
    def fewest_entries(self) -> int:
        """Of all targets."""
        return int(-self.fewest.value)

    def judge(self) -> None:
        """Raise ForeignError unless a truthful cache can be made of what was seen."""
        config, path = self.config, self.config.path
        if not self.targets:
            raise ForeignError(
                f"{path}: {self.records} records give no target: expected lists of entries for "
                "tokens that labels and attention_mask do not leave out"
            )
        self._judge_alignment()
        most, fewest = int(self.most.value), self.fewest_entries
        if config.k > fewest:
            raise ForeignError(
                f"{self.fewest.place}: {fewest} entries, fewer than --k {config.k}: give --k "
                f"{fewest} or less"
            )
        if not (config.k or config.varying) and most > fewest + 1:  # one more: the actual token
            raise ForeignError(
                f"{self.most.place}: {most} entries, but {self.fewest.place}: {fewest}; expected "
                f"as many for every target: give --k {fewest} to keep the most probable of each, "
                "--varying to keep each list as it is, or mend the dump"
            )
        if self.k > self.vocab_size:
            raise ForeignError(f"{path}: {self.k} entries of a vocabulary of {self.vocab_size}")
        if config.renormalised:
            self._judge_renormalised()
        else:
            self._judge_logprobs()
        if self.unknown and config.unknown_label == "refuse":
            raise ForeignError(
                f"{self.first_unknown}: the actual token is not among the entries, so its log prob "
                f"is unknown, as for {self.unknown} of {self.targets} targets: "
                "give --unknown-label bound to store an upper bound, or skip to leave them out"
            )
        if not self.plan():
            raise ForeignError(f"{path}: no target's actual token is among its entries")

    def _judge_alignment(self) -> None:
        if self.targets < JUDGED_TARGETS:
            return
        step, near = max(self.neighbours.items(), key=lambda item: item[1])
        best = max((-1, 1), key=lambda step: self.nats[step])
        means = {step: total / self.targets for step, total in self.nats.items()}
        if near - self.found > MISALIGNED * self.targets:
            found = (
                f"the entries hold {self.found / self.targets:.0%} of the actual tokens where this "
                f"format puts them, but {near / self.targets:.0%}"
            )
        elif not self.config.renormalised and means[best] - means[0] > WORSE:
            step = best
            found = (
                f"the actual tokens have {means[0]:.2f} nats on average where this format puts the "
                f"lists, but {means[best]:.2f}"
            )
        else:
            return
        raise ForeignError(
            f"{self.config.path}: {found} one token {'later' if step > 0 else 'earlier'}: the rows "
            f"are shifted; give --shift {self.config.shift + step}"
        )

    def _judge_logprobs(self) -> None:
        allowed = max(TOLERANCE, self.config.max_excess)
        mend = (
            f"--max-excess {max(self.excess.value, self.unexplained.value) * 1.06:.2g} to scale "
            f"such lists to 1 ({self.scaled} of {self.targets})"
        )
        if self.top_value.value > max(TOLERANCE, np.log1p(self.config.max_excess)):
            raise ForeignError(
                f"{self.top_value.place}: {self.top_value.value:g} is a logit, expected log probs "
                "over the vocabulary: give --renormalised to import its softmax over the kept "
                f"ids, or, if the values were fitted, {mend}"
            )
        if self.excess.value > allowed:
            raise ForeignError(
                f"{self.excess.place}: probabilities add up to {1 + self.excess.value:.6f}, "
                f"expected at most 1 within {allowed:g} and the rounding of the values: these are "
                f"no log probs over the vocabulary, or are known too roughly: give {mend}"
            )
        if self.unexplained.value > allowed:
            raise ForeignError(
                f"{self.unexplained.place}: {self.unexplained.value:.6f} of the mass is neither in "
                "the entries nor can be in the other ids, each no more probable than the last "
                f"entry: expected the most probable ids of a vocabulary of {self.vocab_size}; if "
                f"the values were fitted, give {mend}"
            )
        judged = self.targets >= JUDGED_TARGETS and self.fewest_entries < self.vocab_size
        judged = judged and self.config.file_format != "llamacpp"
        if judged and self.renormalised == self.targets:
            raise ForeignError(
                f"{self.config.path}: the entries of every target add up to 1: renormalised over "
                "the kept ids, as axolotl's prepared datasets are, so the mass of the rest is "
                "lost: import the dump it was made from, or give --renormalised"
            )

    def _judge_renormalised(self) -> None:
        if self.top_value.value <= TOLERANCE and self.lost_mass.value > TOLERANCE:
            raise ForeignError(
                f"{self.lost_mass.place}: probabilities add up to {1 - self.lost_mass.value:.6f}: "
                "these are log probs over the vocabulary; import them without --renormalised"
            )

    def warnings(self) -> Iterator[str]:
        """What a user of the cache should know."""
        if self.config.renormalised:
            yield (
                "renormalised: every tail is 0 and probabilities are too high by what was cut "
                "off; a student trained on this cache is overconfident"
            )
        if self.scaled and not self.config.renormalised:
            worst = max(self.excess.value, self.unexplained.value, 0)
            yield (
                f"{self.scaled} of {self.targets} targets have probabilities that miss 1, at worst "
                f"by {worst:.2g} beyond rounding; they are scaled to 1"
            )
        if self.floored:
            yield (
                f"{self.floored} of {self.targets} targets' actual tokens are at the floor of what "
                "the file can say: their label_logprob is an upper bound"
            )
        if self.unknown:
            what = {
                "bound": "hold an upper bound of label_logprob, so the teacher's cross-entropy is "
                "a lower bound",
                "skip": "are left out, so the teacher looks better on this data than it is",
            }[self.config.unknown_label]
            yield (
                f"{self.unknown} of {self.targets} targets without an entry of their "
                f"actual token {what}"
            )


def rounding_error(record: ForeignRecord, p: NDArray[np.float64]) -> NDArray[np.float64]:
    """[m] how far the rounding of values in the file moves the sum of probabilities p [m, W]."""
    finite = np.where(record.token_ids >= 0, record.values, 0)
    error: NDArray[np.float64] = record.rounding * (p * np.abs(finite)).sum(axis=1)
    return error
