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
from decant.storage.exchange.foreign import FORMATS, ForeignError, ForeignRecord

TAIL_RESOLUTION = 2.0**-23
"""Float32 log probs cannot say whether less mass than this is left."""
UNKNOWN_LABEL = ("refuse", "bound", "skip")
TOLERANCE = EPSILON / 2
"""How far probabilities may add up to anything but 1; a cache allows twice that after rounding."""
MISALIGNED = 0.2
"""So many more actual tokens found one token earlier or later mean that the lists are shifted."""
JUDGED_TARGETS = 20
"""Fewer targets are too few to judge alignment, or whether a file is renormalised, by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """What to import and how."""

    path: str
    """A .parquet, .jsonl or .arrow file, a directory of them, or a saved Hugging Face dataset."""
    file_format: str
    """distillkit | axolotl."""
    teacher: str
    """Whose distributions these are; goes into the manifest."""
    tokenizer: str = ""
    """Directory of the tokenizer of the ids; empty if there is none at hand."""
    vocab_size: int = 0
    """V: rows of the teacher's output layer; 0 = one more than the tokenizer's largest id."""
    k: int = 0
    """Entries to keep per target; 0 = all that every target has."""
    renormalised: bool = False
    """The values are logits, or log probs that add up to 1 over the kept ids."""
    unknown_label: str = "refuse"
    """refuse | bound | skip targets whose actual token is not among the entries."""
    shift: int = 0
    """Move every list by so many tokens from where the format puts it."""
    logprobs_field: str = "logprobs"
    """axolotl: the column of log probs, its `logprobs_field`."""
    precision: str = "f32"
    """f32 | f16 | compact."""
    shard_targets: int = 2_000_000
    """Targets per shard, at least."""

    def __post_init__(self) -> None:
        if self.file_format not in FORMATS:
            raise ValueError(f"format {self.file_format!r} is not one of {FORMATS}")
        if self.unknown_label not in UNKNOWN_LABEL:
            raise ValueError(f"unknown label {self.unknown_label!r} is not one of {UNKNOWN_LABEL}")
        if not (self.tokenizer or self.vocab_size):
            raise ValueError("give --tokenizer, or --vocab-size if there is none at hand")
        if self.file_format != "axolotl" and self.logprobs_field != "logprobs":
            raise ValueError(f"--logprobs-field has no effect with --format {self.file_format}")
        for name in ("k", "vocab_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.shard_targets < 1:
            raise ValueError(f"shard_targets is {self.shard_targets}: expected at least 1")


@dataclass(slots=True)
class _Peak:
    """The largest value so far, and where it stands."""

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
    renormalised: int = 0
    """Targets whose log probs add up to 1."""
    unresolved: int = 0
    """Targets that leave less mass than can be told from log probs."""
    unknown: int = 0
    """Targets whose actual token is not."""
    first_unknown: str = ""
    most: _Peak = field(default_factory=_Peak)
    """Entries of a target."""
    fewest: _Peak = field(default_factory=_Peak)
    """Entries of a target, negative."""
    top_value: _Peak = field(default_factory=_Peak)
    top_mass: _Peak = field(default_factory=_Peak)
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
        known = (record.token_ids == record.labels[:, None]).any(axis=1)
        with np.errstate(all="ignore"):  # of logits, which are refused
            p = np.exp(values)
            mass = p.sum(axis=1)
            last = counts - 1
            added = record.token_ids[each, last] == record.labels  # may be less than the k-th
            last -= added & (counts > 1)
            unexplained = 1 - mass - (self.vocab_size - counts) * p[each, last]
        for peak, quantity in (
            (self.most, counts),
            (self.fewest, -counts),
            (self.top_value, values.max(axis=1, initial=-np.inf)),
            (self.top_mass, mass),
            (self.lost_mass, 1 - mass),
            (self.unexplained, unexplained),
        ):
            peak.see(quantity, record)
        if not known.all():
            self.first_unknown = self.first_unknown or record.place(int(np.argmin(known)))
            self.unknown += int((~known).sum())
        self.targets += len(known)
        self.found += int(known.sum())
        self.renormalised += int((np.abs(mass - 1) <= TOLERANCE).sum())
        self.unresolved += int((1 - mass < TAIL_RESOLUTION).sum())
        for step in self.neighbours:
            at = np.clip(record.positions + step, 0, len(record.input_ids) - 1)
            near = (record.token_ids == record.input_ids[at][:, None]).any(axis=1)
            self.neighbours[step] += int(near.sum())
        self._plan(record, len(known) if self.config.unknown_label != "skip" else int(known.sum()))

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
        """Entries that every target gets."""
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
        if not config.k and most > fewest + 1:  # one more: the actual token
            raise ForeignError(
                f"{self.most.place}: {most} entries, but {self.fewest.place}: {fewest}; expected "
                f"as many for every target: give --k {fewest} to keep the most probable of each, "
                "or mend the dump"
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
        step, near = max(self.neighbours.items(), key=lambda item: item[1])
        if self.targets < JUDGED_TARGETS or near - self.found <= MISALIGNED * self.targets:
            return
        raise ForeignError(
            f"{self.config.path}: the entries hold {self.found / self.targets:.0%} of the actual "
            f"tokens where this format puts them, but {near / self.targets:.0%} one token "
            f"{'later' if step > 0 else 'earlier'}: give --shift {self.config.shift + step}"
        )

    def _judge_logprobs(self) -> None:
        if self.top_value.value > TOLERANCE:
            raise ForeignError(
                f"{self.top_value.place}: {self.top_value.value:g} is a logit, expected log probs "
                "over the vocabulary: give --renormalised to import its softmax over the kept ids"
            )
        if self.top_mass.value > 1 + TOLERANCE:
            raise ForeignError(
                f"{self.top_mass.place}: probabilities add up to {self.top_mass.value:.6f}, "
                f"expected at most 1 within {TOLERANCE:g}: these are no log probs over the "
                "vocabulary, or rounded below float32"
            )
        if self.unexplained.value > TOLERANCE:
            raise ForeignError(
                f"{self.unexplained.place}: {self.unexplained.value:.6f} of the mass is neither in "
                "the entries nor can be in the other ids, each no more probable than the last "
                f"entry: expected the most probable ids of a vocabulary of {self.vocab_size}"
            )
        judged = self.targets >= JUDGED_TARGETS and self.fewest_entries < self.vocab_size
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
