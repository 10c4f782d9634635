"""`subset`, `merge`, `dedupe` and `migrate`: what they take and what they print."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from decant.storage.cache.command import refuse_missing
from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Named, Shown, Word

if TYPE_CHECKING:
    from decant.storage.edit.derived import Blueprint


@dataclass(frozen=True, kw_only=True)
class EditArguments:
    """How a cache is made of others, and how that is said."""

    dry_run: bool = False
    """Say what would be kept, in how many bytes, and write nothing."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True, kw_only=True)
class SubsetArguments(EditArguments):
    """Which sequences of which cache, and where to."""

    url: Annotated[str, Word("CACHE")]
    """The cache: a directory or an fsspec URL."""
    out: Annotated[str, Word("NEW")]
    """A directory that does not exist yet, or a URL that holds nothing."""
    where: Annotated[str, Shown("CONDITION")] = ""
    """Sequences whose figures satisfy this, such as "mean_entropy < 3 and length >= 64"."""
    sample_ids: Annotated[tuple[str, ...], Named("id"), Shown("ID")] = ()
    """Sequences of this sample id; may be given several times."""
    ids: Annotated[str, Shown("FILE")] = ""
    """Sequences of the sample ids in this file: one a line, JSON strings in .jsonl, a list in
    .json."""
    share: float = 1.0
    """Of the sequences that are left then, this share, chosen at random."""
    seed: int = 0
    """Of the random choice."""
    invert: bool = False
    """All the other sequences instead."""
    shard_targets: int = 0
    """Targets per shard, at least; 0 = as many as the largest shard of CACHE has."""

    def __post_init__(self) -> None:
        if self.shard_targets < 0:
            raise ValueError(f"--shard-targets {self.shard_targets} must be at least 0")


@dataclass(frozen=True, kw_only=True)
class MergeArguments(EditArguments):
    """Which caches, and where to."""

    urls: Annotated[tuple[str, ...], Word("CACHE...")]
    """Two caches or more: directories or fsspec URLs."""
    out: Annotated[str, Word("NEW")]
    """A directory that does not exist yet, or a URL that holds nothing."""
    on_duplicate: Literal["refuse", "keep-first", "keep-all"] = "refuse"
    """What becomes of sequences whose sample id a cache before has."""


@dataclass(frozen=True, kw_only=True)
class DedupeArguments(EditArguments):
    """Which cache, and where to."""

    url: Annotated[str, Word("CACHE")]
    """The cache: a directory or an fsspec URL."""
    out: Annotated[str, Word("NEW")]
    """A directory that does not exist yet, or a URL that holds nothing."""


@dataclass(frozen=True, kw_only=True)
class MigrateArguments:
    """What to migrate, how, and where to."""

    url: Annotated[str, Word("OLD")]
    """The cache: a directory or an fsspec URL."""
    out: Annotated[str, Word("NEW")]
    """A directory or URL that holds nothing yet."""
    rewrite: bool = False
    """Write the shards anew in the present form: every value as it is, in fewer bytes, readable by
    every reader of Parquet."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""


def run_subset(arguments: SubsetArguments) -> int:
    """Make a cache of some sequences of another; returns the exit code."""
    from decant.storage.cache.reader import CacheReader
    from decant.storage.cli.terminal import progress_bar
    from decant.storage.edit.subset import Choice, read_ids, subset

    ids = arguments.sample_ids + (read_ids(arguments.ids) if arguments.ids else ())
    choice = Choice(
        ids=ids,
        where=arguments.where,
        share=arguments.share,
        seed=arguments.seed,
        invert=arguments.invert,
    )
    refuse_missing(arguments.url)
    cache = CacheReader(arguments.url)
    with progress_bar("look", "row groups") as progress:
        blueprint, known = subset(cache, choice, progress, arguments.shard_targets)
    of = {"of_sequences": len(known), "of_targets": int(known.targets.sum())}
    return _made(arguments, arguments.out, blueprint, of)


def run_merge(arguments: MergeArguments) -> int:
    """Make one cache of several; returns the exit code."""
    from decant.storage.cache.reader import CacheReader
    from decant.storage.cli.terminal import progress_bar
    from decant.storage.edit.merge import merge

    for url in arguments.urls:
        refuse_missing(url)
    caches = [CacheReader(url) for url in arguments.urls]
    with progress_bar("look", "row groups") as progress:
        blueprint, duplicates = merge(caches, arguments.on_duplicate, progress)
    of = {
        "of_sequences": sum(len(cache) for cache in caches),
        "of_targets": sum(cache.manifest.num_targets for cache in caches),
        "duplicate_ids": duplicates.sequences,
        "duplicate_ids_of_other_tokens": duplicates.other_tokens,
    }
    return _made(arguments, arguments.out, blueprint, of)


def run_dedupe(arguments: DedupeArguments) -> int:
    """Make a cache without repeated sequences; returns the exit code."""
    from decant.storage.cache.reader import CacheReader
    from decant.storage.cli.terminal import progress_bar
    from decant.storage.edit.subset import dedupe

    refuse_missing(arguments.url)
    cache = CacheReader(arguments.url)
    with progress_bar("look", "row groups") as progress:
        blueprint, stands = dedupe(cache, progress)
    copies = [int(i) for i, first in enumerate(stands) if i != first]
    examples = [
        {"sample_id": cache[i].sample_id, "same_as": cache[int(stands[i])].sample_id}
        for i in copies[:20]
    ]
    of = {
        "of_sequences": len(stands),
        "of_targets": cache.manifest.num_targets,
        "duplicates": len(copies),
        "first_duplicates": examples,
    }
    return _made(arguments, arguments.out, blueprint, of)


def run_migrate(arguments: MigrateArguments) -> int:
    """Migrate a cache; returns the exit code."""
    from decant.storage.cache.migration import migrate, refuse_present
    from decant.storage.cache.reader import CacheReader
    from decant.storage.cli.terminal import megabytes, progress_bar
    from decant.storage.edit.derived import make
    from decant.storage.edit.rewrite import rewrite

    refuse_missing(arguments.url)
    cache = CacheReader(arguments.url)
    blueprint = rewrite(cache) if arguments.rewrite else None
    before = cache.index.totals()
    if not blueprint:
        refuse_present(cache)
    if arguments.dry_run:
        written = len(blueprint.shards) - blueprint.links if blueprint else 0
        print(
            f"{arguments.out}: {before.targets} targets in {before.shards} shards, "
            f"{megabytes(before.bytes)} now; {written} of them to be written anew, the others to "
            "be linked or copied\nnothing was written"
        )
        return process.DONE
    with progress_bar("migrate", "shards") as progress:
        if blueprint:
            manifest = make(arguments.out, blueprint, progress)
        else:
            manifest = migrate(arguments.url, arguments.out, progress)
    assert manifest.totals is not None
    print(
        f"{arguments.out}: format version {manifest.format_version}, {manifest.totals.targets} "
        f"targets in {manifest.num_shards} shards, {megabytes(manifest.totals.bytes)}"
        + (f" (before {megabytes(before.bytes)})" if blueprint else "")
    )
    return process.DONE


def _made(arguments: EditArguments, out: str, blueprint: "Blueprint", of: dict[str, Any]) -> int:
    """Make the cache, unless it is a dry run, and say what it holds; returns the exit code."""
    from decant.storage.cli.terminal import escaped, json_text, megabytes, progress_bar
    from decant.storage.edit.derived import make

    found: dict[str, Any] = {
        "out": out,
        "dry_run": arguments.dry_run,
        "sequences": blueprint.sequences,
        "targets": blueprint.targets,
        **of,
        "shards": len(blueprint.shards),
        "linked_shards": blueprint.links,
        "bytes": blueprint.linked_bytes + blueprint.written_bytes,
        "linked_bytes": blueprint.linked_bytes,
    }
    if not arguments.dry_run:
        with progress_bar("write", "shards") as progress:
            manifest = make(out, blueprint, progress)
        assert manifest.totals is not None
        found |= {"cache_id": manifest.cache_id, "bytes": manifest.totals.bytes}
    if arguments.json:
        print(json_text(found))
        return process.DONE
    about = "about " if arguments.dry_run else ""
    print(
        f"{out}: {found['sequences']:,} of {of['of_sequences']:,} sequences, "
        f"{found['targets']:,} of {of['of_targets']:,} targets in {found['shards']:,} shards, "
        f"{about}{megabytes(found['bytes'])}"
    )
    if blueprint.links:
        print(
            f"{blueprint.links:,} shards, {megabytes(blueprint.linked_bytes)}, are files of the "
            "caches it is made of (hard links within one file system)"
        )
    for entry in of.get("first_duplicates", [])[:5]:
        print(f"  {escaped(entry['sample_id'])} repeats {escaped(entry['same_as'])}")
    if of.get("duplicate_ids"):
        print(
            f"{of['duplicate_ids']:,} sequences have a sample id of a cache before, "
            f"{of['duplicate_ids_of_other_tokens']:,} of them with other tokens"
        )
    if arguments.dry_run:
        print("nothing was written")
    return process.DONE


STAGED = """
Nothing has the name NEW before all of it is there and verified; the same
command completes what was interrupted. CACHE is only read, and what exists is
never overwritten. Exit code 0, 1 where CACHE is damaged, or 2 with one line of
why not."""
SUBSET = Command(
    text=f"""
  decant subset caches/mine caches/part --where "mean_entropy < 3"
  decant subset caches/mine caches/part --ids ids.txt
  decant subset caches/mine caches/rest --ids ids.txt --invert
  decant subset caches/mine caches/tenth --share 0.1 --seed 1 --dry-run

The rows are those of CACHE, bit for bit, in its order. Of several choices all
must hold, --share being of what the others leave.

A condition compares figures of a sequence with numbers: < <= > >= == !=, and,
or, not, + - * /, parentheses, as in "mean_entropy < 3 and length >= 64". The
figures: length, targets, sequence (its index); cross_entropy, perplexity,
min_logprob of the actual tokens; mean_entropy, max_entropy; retained_mass,
min_retained_mass, num_kept, top1_probability, top1_agreement. A sequence that
lacks one of them, as one without targets does, is left out.
{STAGED}
""",
    arguments=SubsetArguments,
    common=("where", "id", "ids", "share", "seed", "invert"),
    run=run_subset,
)
MERGE = Command(
    text=f"""
  decant merge caches/a caches/b caches/both
  decant merge caches/a caches/b caches/both --on-duplicate keep-first
  decant merge caches/a caches/b caches/both --dry-run

The sequences of the caches in turn, bit for bit. Teacher (its fingerprint and
dtype), tokenizer, truncation, temperatures and precision must be the same; what
differs is named. The shards of the first cache stay the files that they are.

--on-duplicate refuse       a sample id that a cache before has is an error
--on-duplicate keep-first   such sequences are left out
--on-duplicate keep-all     they are kept
{STAGED}
""",
    arguments=MergeArguments,
    common=("on_duplicate",),
    run=run_merge,
)
DEDUPE = Command(
    text=f"""
  decant dedupe caches/mine caches/once
  decant dedupe caches/mine caches/once --dry-run --json

Of sequences with the same token ids the first that the teacher could score
stays, bit for bit; the first copies are named.
{STAGED}
""",
    arguments=DedupeArguments,
    run=run_dedupe,
)
MIGRATE = Command(
    text="""
  decant migrate caches/old caches/new
  decant migrate caches/old caches/new --rewrite

The shards are the same, byte for byte (hard links within one file system);
records and manifest are written new, and OLD is only read. Older caches need
not be migrated: every version of the format is read.

With --rewrite the shards are written anew as dumps write them today: the same
values, bit for bit, compact codes included, in fewer bytes, and DuckDB, Polars
and every other reader of Parquet opens them. What is written is compared with
OLD, and NEW has its name when it is verified.

Run it again to complete what was interrupted. Exit code 0, or 2 with one line
of why not.
""",
    arguments=MigrateArguments,
    common=("rewrite",),
    run=run_migrate,
)
