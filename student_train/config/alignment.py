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

    source: str = ""
    """The records that a chat cache was dumped from (.jsonl, .jsonl.gz, .jsonl.zst or .parquet, or
    a pattern of several files), for a cache that does not hold its messages: they are found again
    by sample id."""
    id_field: str = "id"
    """The field of those records that holds the sample id, as in the dump's source.id_field."""
    max_left_out: float = 0.01
    """Stop if more than this share of the sequences cannot be aligned."""

    def __post_init__(self) -> None:
        expand_home(self, "source")
        if not 0 <= self.max_left_out < 1:
            raise ValueError(f"align.max_left_out must lie in [0, 1), found {self.max_left_out}")
