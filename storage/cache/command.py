"""`verify`: what it takes and what it prints."""

from dataclasses import dataclass
from typing import Annotated

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Word


@dataclass(frozen=True, kw_only=True)
class CacheArguments:
    """A cache, and how its report is printed."""

    url: Annotated[str, Word("DIR")]
    """The cache: a directory or an fsspec URL."""
    json: bool = False
    """Print one JSON object."""


def run_verify(arguments: CacheArguments) -> int:
    """Verify a cache and print what is wrong; returns the exit code."""
    from decant.schemas import to_json
    from decant.storage.cache.integrity import verify
    from decant.storage.cli.terminal import escaped, json_text, progress_bar

    refuse_missing(arguments.url)
    with progress_bar("verify", "shards") as progress:
        report = verify(arguments.url, progress)
    problems = [escaped(" ".join(problem.split())) for problem in report.problems]
    if arguments.json:
        print(json_text({"ok": report.ok, **to_json(report), "problems": problems}))
    elif report.ok:
        print(
            f"{arguments.url} is whole: {report.targets} targets in {report.sequences} sequences, "
            f"{report.shards} shards, {report.bytes} bytes"
        )
    else:
        print("\n".join(problems))
    return process.DONE if report.ok else process.BAD_DATA


def refuse_missing(url: str) -> None:
    """Raise FileNotFoundError if there is nothing at this place."""
    from decant.storage.files.store import Store

    if not Store(url).exists(""):
        raise FileNotFoundError(f"{url}: no such directory")


VERIFY = Command(
    text="""
  decant verify caches/demo
  decant verify caches/demo --json | jq .problems

Exit code 0 only if the cache is complete and undamaged; 1 with one line per
problem if it is not; 2 if there is no such directory. To mend a damaged shard,
delete its file and run the dump again with the same config: it scores that
shard again and nothing else.
""",
    arguments=CacheArguments,
    run=run_verify,
    goes_on=False,
)
