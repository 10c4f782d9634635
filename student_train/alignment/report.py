"""What an alignment found: how chunks are made up, what of the teacher's mass has an event."""

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from decant.student_train.alignment.events import Events
from decant.student_train.alignment.pieces import Aligned

SHOWN = 3
"""Sequences that are shown of those left out."""


@dataclass(kw_only=True)
class Figures:
    """Sums over sequences; two of them can be added."""

    sequences: int = 0
    """All that were looked at."""
    left_out: int = 0
    """Those that could not be aligned."""
    targets: int = 0
    """The teacher's targets in all of them."""
    targets_in_chunks: int = 0
    """Those of them that lie in chunks."""
    tokens: int = 0
    """The student's tokens that lie in chunks: its targets."""
    chunk_bytes: int = 0
    """Bytes in chunks."""
    one_to_one: int = 0
    """Chunks of one token on either side."""
    one_to_many: int = 0
    """Chunks of one token of the teacher's, several of the student's."""
    many_to_one: int = 0
    """The other way round."""
    many_to_many: int = 0
    """Chunks of several tokens on either side."""
    kept_mass: float = 0.0
    """The probability that the teacher's kept ids hold at the last tokens of chunks, summed."""
    found_mass: float = 0.0
    """What of it has an event."""
    examples: list[str] = field(default_factory=list)
    """The first sequences that were left out, and why."""

    def __add__(self, other: "Figures") -> "Figures":
        sums = {
            f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)
        }
        return Figures(**{**sums, "examples": sums["examples"][:SHOWN]})

    @property
    def chunks(self) -> int:
        """All of them."""
        return self.one_to_one + self.one_to_many + self.many_to_one + self.many_to_many

    @property
    def left_out_share(self) -> float:
        """Of all sequences."""
        return self.left_out / max(self.sequences, 1)

    @staticmethod
    def of(both: Aligned, events: Events, targets: int) -> "Figures":
        """Those of aligned sequences, `targets` being the teacher's of all that were looked at."""
        chunks = both.chunks
        many_t, many_s = chunks.num_teacher > 1, chunks.num_student > 1
        text = both.student.ids[chunks.student_first]
        return Figures(
            targets=targets,
            targets_in_chunks=int(chunks.num_teacher.sum()),
            tokens=int(chunks.num_student.sum()),
            chunk_bytes=int((chunks.ends - chunks.starts)[text >= 0].sum()),
            one_to_one=int(np.sum(~many_t & ~many_s)),
            one_to_many=int(np.sum(~many_t & many_s)),
            many_to_one=int(np.sum(many_t & ~many_s)),
            many_to_many=int(np.sum(many_t & many_s)),
            kept_mass=float(events.kept_mass.sum()),
            found_mass=float(events.found_mass.sum()),
        )

    def lines(self) -> list[tuple[str, str]]:
        """For people, by name."""
        total = max(self.chunks, 1)
        shares = [
            f"{name} {count / total:.1%}"
            for name, count in (
                ("1:1", self.one_to_one),
                ("1:N", self.one_to_many),
                ("M:1", self.many_to_one),
                ("M:N", self.many_to_many),
            )
        ]
        rows = [
            ("chunks", f"{self.chunks:,}, teacher's tokens to student's: {', '.join(shares)}"),
            (
                "targets",
                f"{self.targets_in_chunks / max(self.targets, 1):.1%} of the teacher's "
                f"{self.targets:,} are in chunks, of {self.tokens:,} of the student's tokens",
            ),
        ]
        if self.kept_mass:
            share = self.found_mass / self.kept_mass
            rows.append(("kept mass", f"{share:.1%} of it has an event"))
        else:
            rows.append(("kept mass", "none: the likelihood of each chunk is compared"))
        rows.append(("left out", f"{self.left_out:,} of {self.sequences:,} sequences"))
        rows += [("", example) for example in self.examples]
        return rows
