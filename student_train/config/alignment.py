"""What happens where the student's tokenizer is not the cache's."""

from dataclasses import dataclass

from decant.student_train.config.paths import expand_home

MISMATCHES = ("refuse", "align")


def check_mismatch(value: str) -> None:
    """Raise ValueError unless this is an answer to another tokenizer."""
    if value not in MISMATCHES:
        raise ValueError(f"tokenizer_mismatch {value!r} is not one of {MISMATCHES}")


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class AlignConfig:
    """How a cache is aligned with a student of another tokenizer."""

    messages: str = ""
    """For a chat cache that does not hold its conversations: a file of them by sample id, as
    `decant messages --config dump.yaml --out FILE` writes it from the records."""
    max_left_out: float = 0.01
    """Stop if more than this share of the sequences cannot be aligned."""

    def __post_init__(self) -> None:
        expand_home(self, "messages")
        if not 0 <= self.max_left_out < 1:
            raise ValueError(f"align.max_left_out must lie in [0, 1), found {self.max_left_out}")
