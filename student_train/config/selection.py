"""Which of a cache's targets a step is taken on."""

from collections.abc import Iterable
from dataclasses import dataclass

from decant.schemas.selection import num_selected

BY_TEACHER = "teacher_entropy"
BY_STUDENT = ("student_entropy", "loss")
"""What takes the student's logits of all targets."""


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class SelectionConfig:
    """The targets that are trained on: a share of each microbatch, the highest by some measure."""

    by: str = ""
    """teacher_entropy: the teacher's over the stored entries and the rest as one; student_entropy:
    the student's at that step; loss: what is minimised, per target; "": all targets."""
    share: float = 0.2
    """Share of the targets of each microbatch and process, at least one."""

    def __post_init__(self) -> None:
        known = (BY_TEACHER, *BY_STUDENT)
        if self.by and self.by not in known:
            raise ValueError(f"selection.by {self.by!r} is not one of {known}")
        if not 0 < self.share <= 1:
            raise ValueError(f"selection.share must lie in (0, 1], found {self.share}")
        if self.by and self.share == 1:
            raise ValueError(f"selection.by {self.by} has no effect with share: 1: leave it out")
        default = SelectionConfig.__dataclass_fields__["share"].default
        if not self.by and self.share != default:
            raise ValueError(f"selection.share has no effect without by: give one of {known}")

    def kept(self, num_targets: int) -> int:
        """How many of the targets of a microbatch are trained on."""
        return num_selected(num_targets, self.share) if self.by else num_targets

    def kept_of(self, microbatches: Iterable[int]) -> int:
        """The same of microbatches of so many targets each."""
        return sum(map(self.kept, microbatches))
