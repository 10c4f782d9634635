"""Where a round's files are, all names in one place."""

from dataclasses import dataclass
from pathlib import Path

LINES = "rounds.jsonl"
CHECKPOINTS = "checkpoints"  # of a training, by its own name
PLOT = "rounds.png"
STUDENT = "student"
"""A link to the student of the last finished round."""


@dataclass(frozen=True, slots=True)
class Places:
    """Of one round below the output."""

    output: Path
    number: int
    """From 1."""

    @property
    def folder(self) -> Path:
        """All of the round."""
        return self.output / f"round-{self.number:03}"

    @property
    def dump_config(self) -> Path:
        """What the dump is given."""
        return self.folder / "dump.yaml"

    @property
    def cache(self) -> Path:
        """What the dump gives."""
        return self.folder / "cache"

    @property
    def train_config(self) -> Path:
        """What the training is given."""
        return self.folder / "train.yaml"

    @property
    def training(self) -> Path:
        """The output of the training."""
        return self.folder / "training"

    @property
    def student(self) -> Path:
        """The student of the round."""
        return self.training / "student"

    @property
    def removable(self) -> tuple[Path, ...]:
        """What an older round may lose."""
        return (self.cache, self.student, self.training / "student-quantised")
