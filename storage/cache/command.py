"""`verify` and `migrate`: their arguments and what they print."""

import argparse

from decant.schemas import to_json
from decant.storage.cache.integrity import verify
from decant.storage.cli import process as cli
from decant.storage.cli.terminal import json_text, progress_bar
from decant.storage.files.store import Store

VERIFY = """Is a cache whole? Every byte is hashed, every row group decoded, every value checked.

  python -m storage verify caches/demo
  python -m storage verify caches/demo --json | jq .problems

Exit code 0 only if the cache is complete and undamaged; 1 with one line per problem if it is not;
2 if there is no such directory. To mend a damaged shard, delete its file and run the dump again
with the same config: it scores that shard again and nothing else.
"""


MIGRATE = """Make an older cache again in the present version of the format.

  python -m storage migrate caches/old caches/new

The shards are the same, byte for byte (hard links within one file system); records and manifest
are written new, and OLD is only read. Older caches need not be migrated: they are read for ever.
Run it again to complete what was interrupted. Exit code 0, or 2 with one line of why not.
"""


def verify_arguments(command: argparse.ArgumentParser) -> None:
    """Give the parser the arguments of `verify`."""
    command.add_argument("url", metavar="DIR", help="the cache: a directory or an fsspec URL")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def run_verify(options: argparse.Namespace) -> int:
    """Verify a cache and print what is wrong; returns the exit code."""
    refuse_missing(options.url)
    with progress_bar("verify", "shards") as progress:
        report = verify(options.url, progress)
    problems = [" ".join(problem.split()) for problem in report.problems]
    if options.json:
        print(json_text({"ok": report.ok, **to_json(report), "problems": problems}))
    elif report.ok:
        print(
            f"{options.url} is whole: {report.targets} targets in {report.sequences} sequences, "
            f"{report.shards} shards, {report.bytes} bytes"
        )
    else:
        print("\n".join(problems))
    return cli.DONE if report.ok else cli.BAD_DATA


def migrate_arguments(command: argparse.ArgumentParser) -> None:
    """Give the parser the arguments of `migrate`."""
    command.add_argument("url", metavar="OLD", help="the cache: a directory or an fsspec URL")
    command.add_argument("out", metavar="NEW", help="a directory or URL that holds nothing yet")


def run_migrate(options: argparse.Namespace) -> int:
    """Migrate a cache; returns the exit code."""
    from decant.storage.cache.migration import migrate

    refuse_missing(options.url)
    with progress_bar("migrate", "shards") as progress:
        manifest = migrate(options.url, options.out, progress)
    assert manifest.totals is not None
    print(
        f"{options.out}: format version {manifest.format_version}, {manifest.totals.targets} "
        f"targets in {manifest.num_shards} shards"
    )
    return cli.DONE


def refuse_missing(url: str) -> None:
    """Raise FileNotFoundError if there is nothing at this place."""
    if not Store(url).exists(""):
        raise FileNotFoundError(f"{url}: no such directory")
