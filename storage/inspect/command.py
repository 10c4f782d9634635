"""`inspect`, `head` and `diff`: their arguments and what they print."""

import argparse
from pathlib import Path

from decant.schemas import to_json
from decant.storage.cache.command import refuse_missing, verify_arguments
from decant.storage.cli import process as cli
from decant.storage.cli.terminal import json_text, progress_bar
from decant.storage.files.store import Store

INSPECT = """What a cache holds and how good it is, from one pass over all of it.

  python -m storage inspect caches/demo
  python -m storage inspect caches/demo --html demo.html       one page that opens from disk
  python -m storage inspect caches/demo --json > demo.json
  python -m storage inspect caches/large --sample 0.05         a twentieth of it: estimates
  python -m storage inspect caches/large --sample 20 --seed 1  20 row groups

Works while a dump is still running: then it reports the shards committed so far and says so.
The figures of a complete cache in a directory are kept in its stats/ and shown at once the next
time; they count only as long as the cache is the same. The keys of --json are listed in
docs/format.md. Exit code 0, or 2 if there is no readable cache.
"""


HEAD = """The first targets of a sequence: context, actual token, the teacher's top entries, tail.

  python -m storage head caches/demo
  python -m storage head caches/demo --sequence 17 --targets 30
  python -m storage head caches/demo --sample doc-000123

Texts come from the tokenizer in the cache; without one, ids are shown as #123. The table is as wide
as a terminal of 100 columns; --json has every entry that --entries asks for. Exit code 0, or 2 with
one line of why not.
"""


DIFF = """How far apart two caches of the same sequences are: two teachers, two k, two precisions.

  python -m storage diff caches/teacher-a caches/teacher-b
  python -m storage diff caches/f32 caches/compact --json | jq .temperatures[0].kl_ab.mean

Both must be complete and hold the same tokens in the same order. KL is over the ids that both keep
and one bucket for all others, so it is at most the KL over the vocabulary. Exit code 0 however much
they differ, or 2 with one line of why they cannot be compared.
"""


def inspect_arguments(command: argparse.ArgumentParser) -> None:
    """Give the parser the arguments of `inspect`."""
    verify_arguments(command)
    command.add_argument("--html", metavar="FILE", help="write one self-contained page as well")
    command.add_argument(
        "--sample",
        type=_sample,
        metavar="FRACTION_OR_N",
        help="look at this share of the row groups, or this many, chosen at random",
    )
    command.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")


def _sample(text: str) -> float:
    value = float(text)
    if not 0 < value < 1 and not (value >= 1 and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is neither between 0 and 1 nor a whole number")
    return value


def run_inspect(options: argparse.Namespace) -> int:
    """Inspect a cache and print the report; returns the exit code."""
    from decant.storage.inspect.collect import inspect
    from decant.storage.inspect.text import report_text

    refuse_missing(options.url)
    if options.seed and options.sample is None:
        raise ValueError("--seed has no effect without --sample")
    with progress_bar("inspect", "row groups") as progress:
        report = inspect(options.url, progress, sample=options.sample, seed=options.seed, keep=True)
    if options.html:
        from decant.storage.inspect.html import report_html

        file = Path(options.html)
        Store(file.parent).publish(file.name, report_html(report).encode())
    print(json_text(to_json(report)) if options.json else report_text(report))
    return cli.DONE


def head_arguments(command: argparse.ArgumentParser) -> None:
    """Give the parser the arguments of `head`."""
    verify_arguments(command)
    which = command.add_mutually_exclusive_group()
    which.add_argument("--sequence", type=int, metavar="N", help="by its index in the plan")
    which.add_argument("--sample", metavar="ID", help="the first sequence of this sample id")
    command.add_argument("--targets", type=int, default=10, metavar="M", help="default: 10")
    command.add_argument("--entries", type=int, default=8, metavar="M", help="default: 8")


def run_head(options: argparse.Namespace) -> int:
    """Print targets in context; returns the exit code."""
    from decant.storage.inspect.head import head, head_text

    refuse_missing(options.url)
    targets = head(
        options.url,
        sequence=options.sequence,
        sample=options.sample,
        targets=options.targets,
        entries=options.entries,
    )
    print(json_text(to_json(targets)) if options.json else head_text(targets))
    return cli.DONE


def diff_arguments(command: argparse.ArgumentParser) -> None:
    """Give the parser the arguments of `diff`."""
    command.add_argument("url_a", metavar="A", help="a cache: a directory or an fsspec URL")
    command.add_argument("url_b", metavar="B", help="another cache of the same sequences")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def run_diff(options: argparse.Namespace) -> int:
    """Compare two caches and print how they differ; returns the exit code."""
    from decant.storage.inspect.diff import diff
    from decant.storage.inspect.diff_text import diff_text

    refuse_missing(options.url_a)
    refuse_missing(options.url_b)
    with progress_bar("diff", "sequences") as progress:
        found = diff(options.url_a, options.url_b, progress)
    print(json_text(to_json(found)) if options.json else diff_text(found))
    return cli.DONE
