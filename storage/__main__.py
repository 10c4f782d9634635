"""`python -m storage inspect|verify DIR [--json]`."""

import argparse
import json
from collections.abc import Callable

from tqdm import tqdm

from schemas import to_json
from storage import cli
from storage.files import Store
from storage.verify import verify

DESCRIPTION = """Look at a cache of teacher distributions; nothing here writes to it.

  python -m storage inspect caches/demo              size, retained mass, teacher quality
  python -m storage inspect caches/demo --json | jq .bytes_per_target
  python -m storage verify caches/demo && echo whole
  python -m storage verify s3://bucket/caches/demo   any fsspec URL works

--debug, anywhere, shows the traceback of an error.
"""
INSPECT = """What a cache holds and how good it is, from one pass over all of it.

  python -m storage inspect caches/demo
  python -m storage inspect caches/demo --json > demo.json

Works while a dump is still running: then it reports the shards committed so far and says so.
The keys of --json are listed in docs/format.md. Exit code 0, or 2 if there is no readable cache.
"""
VERIFY = """Is a cache whole? Every byte is hashed, every row group decoded, every value checked.

  python -m storage verify caches/demo
  python -m storage verify caches/demo --json | jq .problems

Exit code 0 only if the cache is complete and undamaged; 1 with one line per problem if it is not;
2 if there is no such directory. To mend a damaged shard, delete its file and run the dump again
with the same config: it scores that shard again and nothing else.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of both subcommands."""
    root = argparse.ArgumentParser(
        prog="python -m storage",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="inspect|verify")
    for name, text in (("inspect", INSPECT), ("verify", VERIFY)):
        command = commands.add_parser(
            name,
            help=text.split("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("url", metavar="DIR", help="the cache: a directory or an fsspec URL")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return root


def main(arguments: list[str]) -> int:
    """Parse and run; returns the exit code."""
    options = parser().parse_args(arguments)
    if not Store(options.url).exists(""):
        raise FileNotFoundError(f"{options.url}: no such directory")
    return (_inspect if options.command == "inspect" else _verify)(options.url, options.json)


def _inspect(url: str, as_json: bool) -> int:
    from storage.inspect import inspect, report_text

    with tqdm(desc="inspect", unit=" row groups", disable=None, leave=False) as bar:
        report = inspect(url, _to(bar))
    print(_json(to_json(report)) if as_json else report_text(report))
    return cli.DONE


def _verify(url: str, as_json: bool) -> int:
    with tqdm(desc="verify", unit=" shards", disable=None, leave=False) as bar:
        report = verify(url, _to(bar))
    problems = [" ".join(problem.split()) for problem in report.problems]
    if as_json:
        print(_json({"ok": report.ok, **to_json(report), "problems": problems}))
    elif report.ok:
        print(
            f"{url} is whole: {report.targets} targets in {report.sequences} sequences, "
            f"{report.shards} shards, {report.bytes} bytes"
        )
    else:
        print("\n".join(problems))
    return cli.DONE if report.ok else cli.BAD_DATA


def _to(bar: tqdm) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return progress


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


if __name__ == "__main__":
    cli.run(main)
