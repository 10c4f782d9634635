"""`inspect`, `head` and `diff`: what they take and what they print."""

import dataclasses
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from decant.storage.cache.command import CacheArguments, refuse_missing
from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Shown, Word
from decant.storage.inspect.budget import Budget


@dataclass(frozen=True, kw_only=True)
class InspectArguments(CacheArguments):
    """What to look at, and how to say it."""

    html: Annotated[str, Shown("FILE")] = ""
    """Write one self-contained page as well."""
    sample: Annotated[str, Shown("SHARE_OR_N")] = ""
    """Look at this share of the row groups, or at this many, chosen at random."""
    seed: int = 0
    """Of the choice."""
    max_bytes: Annotated[str, Shown("BYTES")] = ""
    """Say which k fits this: bytes per target, or with a unit (20GB) of the whole cache."""
    max_nats: Annotated[float | None, Shown("NATS")] = None
    """Say which k costs at most this much forward KL per target."""

    def __post_init__(self) -> None:
        self.sample_size()
        self.budget()
        if self.seed and not self.sample:
            raise ValueError("--seed has no effect without --sample")

    def budget(self) -> Budget:
        """What a target may take and lose; false where nothing is said."""
        return Budget(max_bytes=self.max_bytes, max_nats=self.max_nats)

    def sample_size(self) -> float | None:
        """The share, or the number, of row groups to look at; None for all."""
        if not self.sample:
            return None
        try:
            value = float(self.sample)
        except ValueError:
            value = 0.0
        if 0 < value < 1 or (value >= 1 and self.sample.isdigit()):
            return value
        raise ValueError(
            f"--sample {self.sample} is neither a share between 0 and 1 nor a whole number"
        )


@dataclass(frozen=True, kw_only=True)
class HeadArguments(CacheArguments):
    """Which targets to show, and how much of each."""

    sequence: Annotated[int | None, Shown("N")] = None
    """The sequence with this index in the plan; without it the first."""
    sample: Annotated[str | None, Shown("ID")] = None
    """The first sequence of this sample id."""
    targets: int = 10
    """How many targets."""
    entries: int = 8
    """How many of the teacher's entries for each."""

    def __post_init__(self) -> None:
        if self.sequence is not None and self.sample is not None:
            raise ValueError("--sequence and --sample exclude each other: give one")


@dataclass(frozen=True, kw_only=True)
class DiffArguments:
    """Two caches."""

    url_a: Annotated[str, Word("A")]
    """A cache: a directory or an fsspec URL."""
    url_b: Annotated[str, Word("B")]
    """Another cache of the same sequences."""
    json: bool = False
    """Print one JSON object."""


def _refuse_labels(url: str) -> None:
    """Raise ValueError for a cache that has no k to choose."""
    from decant.storage import CacheReader

    truncation = CacheReader(url, allow_incomplete=True).manifest.truncation
    if not truncation.rule.has_entries:
        raise ValueError(
            f"{url} holds {truncation.text()}: --max-bytes and --max-nats choose how many entries "
            "to keep, of a cache that has some; dump or rescore it with --method topk, or ask "
            "`decant plan` for a source"
        )


def run_inspect(arguments: InspectArguments) -> int:
    """Inspect a cache and print the report; returns the exit code."""
    from decant.schemas import to_json
    from decant.storage.cli.terminal import WIDTH, json_text, progress_bar
    from decant.storage.files.durable import staged_file
    from decant.storage.inspect.collect import inspect
    from decant.storage.inspect.curve import chosen_k
    from decant.storage.inspect.curve_text import NO_CURVE
    from decant.storage.inspect.text import report_text

    refuse_missing(arguments.url)
    if arguments.budget():
        _refuse_labels(arguments.url)
    with progress_bar("inspect", "row groups") as progress:
        report = inspect(
            arguments.url,
            progress,
            sample=arguments.sample_size(),
            seed=arguments.seed,
            keep=True,
        )
    said, budget = [], arguments.budget()
    if budget:
        choice = chosen_k(report, budget)
        text = f"Budget: {NO_CURVE if choice is None else choice.text}"
        said = textwrap.wrap(text, WIDTH, subsequent_indent="  ")
        report = dataclasses.replace(report, recommended_k=choice.k if choice else None)
    if arguments.html:
        from decant.storage.inspect.html import report_html

        file = Path(arguments.html)
        with staged_file(file) as temporary:
            temporary.write_text(report_html(report), encoding="utf-8")
    if arguments.json:
        print(json_text(to_json(report)))
    else:
        print("\n".join([report_text(report), *said]))
    return process.DONE


def run_head(arguments: HeadArguments) -> int:
    """Print targets in context; returns the exit code."""
    from decant.schemas import to_json
    from decant.storage.cli.terminal import json_text
    from decant.storage.inspect.head import head, head_text, marked_sequence

    refuse_missing(arguments.url)
    targets = head(
        arguments.url,
        sequence=arguments.sequence,
        sample=arguments.sample,
        targets=arguments.targets,
        entries=arguments.entries,
    )
    if arguments.json:
        print(json_text(to_json(targets)))
        return process.DONE
    text = marked_sequence(arguments.url, sequence=arguments.sequence, sample=arguments.sample)
    print(head_text(targets, text))
    return process.DONE


def run_diff(arguments: DiffArguments) -> int:
    """Compare two caches and print how they differ; returns the exit code."""
    from decant.schemas import to_json
    from decant.storage.cli.terminal import json_text, progress_bar
    from decant.storage.inspect.diff import diff
    from decant.storage.inspect.diff_text import diff_text

    refuse_missing(arguments.url_a)
    refuse_missing(arguments.url_b)
    with progress_bar("diff", "sequences") as progress:
        found = diff(arguments.url_a, arguments.url_b, progress)
    print(json_text(to_json(found)) if arguments.json else diff_text(found))
    return process.DONE


INSPECT = Command(
    text="""
  decant inspect caches/demo
  decant inspect caches/demo --html demo.html     one page that opens from disk
  decant inspect caches/demo --json > demo.json
  decant inspect caches/large --sample 0.05       a twentieth of it: estimates
  decant inspect caches/large --sample 20         20 row groups
  decant inspect caches/demo --max-nats 0.5       which k costs at most that?
  decant inspect caches/demo --max-bytes 60       which k fits 60 bytes?

Reads the cache once. While a dump is still running it reports the shards
committed so far and says so. The figures of a complete cache in a directory are
kept in its stats/ and shown at once the next time; they count only as long as
the cache is the same. docs/format.md lists the keys of --json. Exit code 0; 1
if the cache is damaged; 2 if there is none.
""",
    arguments=InspectArguments,
    run=run_inspect,
    goes_on=False,
)
HEAD = Command(
    text="""
  decant head caches/demo
  decant head caches/demo --sequence 17 --targets 30
  decant head caches/demo --sample doc-000123

Shows the first targets of a sequence: context, actual token, the teacher's top
entries, tail. Texts come from the tokenizer in the cache; without one, ids are
shown as #123. --json has every entry that --entries asks for. Exit code 0, or 2
with one line of why not.
""",
    arguments=HeadArguments,
    run=run_head,
    goes_on=False,
)
DIFF = Command(
    text="""
  decant diff caches/teacher-a caches/teacher-b
  decant diff caches/f32 caches/compact --json | jq .temperatures[0].kl_ab.mean

Two teachers, two k, two precisions. Both caches must be complete and hold the
same tokens in the same order. KL is over the ids that both keep and one bucket
for all others, so it is at most the KL over the vocabulary. Exit code 0 however
much they differ, or 2 with one line of why they cannot be compared.
""",
    arguments=DiffArguments,
    run=run_diff,
    goes_on=False,
)
