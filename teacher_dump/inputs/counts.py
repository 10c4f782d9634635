"""What became of the records: the tally of one pass, in one line, and what it warns of."""

from dataclasses import dataclass

WORTH_A_WARNING = 0.03
"""Share of the tokens that are cut, or of the records that are left out, above which it is said."""


@dataclass(slots=True)
class SequenceCounts:
    """Tally of one pass: `tokens - repeated_tokens + dropped_tokens` is all that records held."""

    records: int = 0
    sequences: int = 0
    tokens: int = 0
    """Of all sequences."""
    targets: int = 0
    """Those that are kept."""
    unselected_targets: int = 0
    """Scored, and context in the cache, as `target_share` says."""
    repeated_tokens: int = 0
    """Of `tokens`, the head that later windows repeat in front of theirs; never targets."""
    empty_records: int = 0
    """Left out, as `empty: drop` says."""
    unrenderable_records: int = 0
    """Left out, for the chat template cannot say what they mean; see `max_unrenderable`."""
    duplicate_records: int = 0
    """Of the same tokens and targets as an earlier one: kept or left out, as `duplicates` says."""
    truncated_records: int = 0
    split_records: int = 0
    records_without_targets: int = 0
    """Left out whole: after truncation nothing in them is a target."""
    windows_without_targets: int = 0
    """Left out of a split record of which other windows were kept."""
    dropped_tokens: int = 0
    """Cut off, alone in a last window, or of records and windows that were left out."""

    @property
    def held_tokens(self) -> int:
        """All that the records held, but those that were not even encoded."""
        return self.tokens - self.repeated_tokens + self.dropped_tokens

    @property
    def left_out_records(self) -> int:
        """Records of which nothing is scored; duplicates, which somebody asked to drop, aside."""
        return self.empty_records + self.unrenderable_records + self.records_without_targets


def summary(counts: SequenceCounts) -> str:
    """The tally as one line; what did not happen is not in it."""
    c = counts
    line = (
        f"{c.records:,} records give {c.sequences:,} sequences, {c.tokens:,} tokens, "
        f"{c.targets:,} targets"
    )
    happened = [
        (c.dropped_tokens, f"{c.dropped_tokens:,} tokens cut ({_share(c.dropped_tokens, c)})"),
        (
            c.unselected_targets,
            f"{c.unselected_targets:,} more are scored and become context, of lower entropy",
        ),
        (c.repeated_tokens, f"{c.repeated_tokens:,} tokens repeated at the start of windows"),
        (c.truncated_records, f"{c.truncated_records:,} records truncated"),
        (c.split_records, f"{c.split_records:,} split"),
        (c.records_without_targets, f"{c.records_without_targets:,} without targets"),
        (c.empty_records, f"{c.empty_records:,} empty"),
        (c.unrenderable_records, f"{c.unrenderable_records:,} that the template cannot render"),
        (c.duplicate_records, f"{c.duplicate_records:,} duplicates"),
    ]
    said = [text for count, text in happened if count]
    return f"{line}; {', '.join(said)}" if said else line


def warnings(counts: SequenceCounts, max_length: int) -> list[str]:
    """What the tally should not pass without a word."""
    found = []
    if counts.dropped_tokens > WORTH_A_WARNING * counts.held_tokens:
        where = (
            f"in windows or records without targets of sequences.max_length={max_length}: raise it"
        )
        if counts.truncated_records:
            where = f"beyond sequences.max_length={max_length}: raise it, or set overlong: split"
        found.append(f"{_share(counts.dropped_tokens, counts)} of the tokens are cut, {where}")
    if counts.left_out_records > WORTH_A_WARNING * counts.records:
        found.append(
            f"{counts.left_out_records:,} of {counts.records:,} records are left out whole: "
            f"{counts.records_without_targets:,} without targets, {counts.empty_records:,} empty, "
            f"{counts.unrenderable_records:,} that the chat template cannot render"
        )
    return found


def _share(tokens: int, counts: SequenceCounts) -> str:
    return f"{100 * tokens / max(counts.held_tokens, 1):.1f} %"
