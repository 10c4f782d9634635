"""The first targets of a sequence as a table: what came before, what came, what was expected."""

import functools
import os

import numpy as np

from decant.schemas import ScoredSequence
from decant.storage.cache.reader import CacheReader
from decant.storage.cli.terminal import WIDTH, clip, fit, width
from decant.storage.inspect.examples import (
    Target,
    context_shown,
    entries_shown,
    read_tokenizer,
    shown,
    target,
    with_texts,
)
from decant.storage.inspect.marked import BEGIN, END, marked


def head(
    url: str | os.PathLike[str],
    *,
    sequence: int | None = None,
    sample: str | None = None,
    targets: int = 10,
    entries: int = 8,
) -> tuple[Target, ...]:
    """The first targets of one sequence: that of a plan index, or the first of a sample id.

    Without either, of the first sequence that has targets. Reads the row group of the sequence; a
    sample id is looked for from the start. Raises ValueError if there is no such sequence or the
    teacher rejected it, FormatError if the cache is absent or damaged.
    """
    reader, index, scored = _sequence(url, sequence, sample)
    for rejected in reader.rejected:
        if rejected.sequence == index:
            raise ValueError(
                f"{url}: sequence {index} (sample {scored.sample_id!r}) has no targets, as the "
                f"teacher rejected it: {rejected.reason}"
            )
    found = [target(scored, i, index, entries) for i in range(min(targets, scored.num_targets))]
    tokenizer = read_tokenizer(reader)
    return tuple(with_texts(found, tokenizer) if tokenizer else found)


def marked_sequence(
    url: str | os.PathLike[str], *, sequence: int | None = None, sample: str | None = None
) -> str | None:
    """The text of the sequence that `head` shows, its targets between marks; None without texts.

    Raises as `head`.
    """
    reader, _, scored = _sequence(url, sequence, sample)
    tokenizer = read_tokenizer(reader)
    if tokenizer is None:
        return None
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    return marked(scored.input_ids, scored.is_target, decode)


def _sequence(
    url: str | os.PathLike[str], sequence: int | None, sample: str | None
) -> tuple[CacheReader, int, ScoredSequence]:
    """The sequence that is asked for, and its index in the plan."""
    reader = CacheReader(url, allow_incomplete=True)
    index = _of_sample(reader, sample) if sample is not None else sequence
    groups = reader.row_groups()
    if not len(groups):
        raise ValueError(f"{url} holds no sequence yet")
    if index is None:
        index = _first(reader)
    at = int(np.searchsorted(groups.first_sequence, index, side="right")) - 1
    inside = index - int(groups.first_sequence[max(at, 0)])
    if at < 0 or inside >= groups.sequences[at]:
        raise ValueError(
            f"{url} holds no sequence {index}: it has {len(reader)} of the "
            f"{reader.manifest.num_sequences} planned"
        )
    return reader, index, reader.read(groups[at])[inside]


def _first(reader: CacheReader) -> int:
    """Plan index of the first sequence with targets; of the first at all if none has any."""
    groups = reader.row_groups()
    group = groups[int(np.argmax(groups.targets > 0))]
    stored = reader.read_stored(group)
    return int(stored.sequence[np.argmax(np.diff(stored.target_starts) > 0)])


def _of_sample(reader: CacheReader, sample: str) -> int:
    for group in reader.row_groups():
        stored = reader.read_stored(group)
        if sample in stored.sample_ids:
            return int(stored.sequence[stored.sample_ids.index(sample)])
    raise ValueError(f"{reader.url} holds no sequence of the sample {sample!r}")


def head_text(targets: tuple[Target, ...], text: str | None = None) -> str:
    """A row per target, at most 100 columns wide, after the `text` with its targets marked."""
    if not targets:
        return "no targets"
    first = targets[0]
    entries = "the teacher's top entries"
    note = "p: of the token; rank: among the kept entries; tail: mass that is not kept"
    if first.tail_mass is None and first.entries:
        entries = "the most often drawn ids"
        note = "p: of the token, exact; after the drawn ids: their share of the draws"
    elif first.tail_mass is None:
        entries, note = "", "p: of the token, exact; no entries are kept"
    head = f"{'pos.':>6} {'context':<26} {'token':<12} {'p':>7} {'rank':>4} {'tail':>7}  {entries}"
    lines = [
        clip(f"sequence {first.sequence}, sample {first.sample_id!r}: its first targets"),
        head.rstrip(),
    ]
    lines += [_line(found).rstrip() for found in targets]
    said = [] if text is None else [f"its text, targets between {BEGIN} and {END}:", text, ""]
    return "\n".join([lines[0], *said, *lines[1:], note])


def _line(found: Target) -> str:
    rank = "-" if found.rank is None else str(found.rank)
    tail = "-" if found.tail_mass is None else f"{found.tail_mass:.4f}"
    start = (
        f"{found.position:>6} {fit(context_shown(found), 26, right=True)} "
        f"{fit(shown(found.token, found.token_id), 12)} {found.probability:>7.4f} {rank:>4} "
        f"{tail:>7}  "
    )
    return start + entries_shown(found, WIDTH - width(start), digits=3)
