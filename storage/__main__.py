"""`python -m storage inspect|head|diff|verify|export|import|migrate`: see `--help` of each."""

import argparse

from decant.storage.cache.command import (
    MIGRATE,
    VERIFY,
    migrate_arguments,
    run_migrate,
    run_verify,
    verify_arguments,
)
from decant.storage.cli import process as cli
from decant.storage.cli.process import Command
from decant.storage.exchange.command import (
    EXPORT,
    IMPORT,
    export_arguments,
    import_arguments,
    run_export,
    run_import,
)
from decant.storage.inspect.command import (
    DIFF,
    HEAD,
    INSPECT,
    diff_arguments,
    head_arguments,
    inspect_arguments,
    run_diff,
    run_head,
    run_inspect,
)

DESCRIPTION = """Look at caches of teacher distributions, and exchange them with other tools.

  python -m storage inspect caches/demo              size, retained mass, teacher quality
  python -m storage inspect caches/demo --json | jq .bytes_per_target
  python -m storage head caches/demo                 the first targets in context
  python -m storage diff caches/demo caches/other    two teachers, two k, two precisions
  python -m storage verify caches/demo && echo whole
  python -m storage verify s3://bucket/caches/demo   any fsspec URL works
  python -m storage export caches/demo exported      plain lists, as Parquet
  python -m storage import dump.parquet caches/new --format distillkit --teacher NAME ...

Nothing here changes a cache that exists; inspect keeps its figures beside it, in stats/.
--debug, anywhere, shows the traceback of an error.
"""


COMMANDS = {
    "inspect": Command(INSPECT, inspect_arguments, run_inspect),
    "head": Command(HEAD, head_arguments, run_head),
    "diff": Command(DIFF, diff_arguments, run_diff),
    "verify": Command(VERIFY, verify_arguments, run_verify),
    "export": Command(EXPORT, export_arguments, run_export),
    "import": Command(IMPORT, import_arguments, run_import),
    "migrate": Command(MIGRATE, migrate_arguments, run_migrate, goes_on=True),
}


def parser() -> argparse.ArgumentParser:
    """The command line of all subcommands."""
    root = argparse.ArgumentParser(
        prog="python -m storage",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = root.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.text.split("\n")[0],
            description=command.text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
    return root


def main(arguments: list[str]) -> int:
    """Parse and run; returns the exit code."""
    cli.interrupt_on_terminate()  # so that what was staged is removed
    options = parser().parse_args(arguments)
    command = COMMANDS[options.command]
    try:
        return command.run(options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(cli.GOES_ON if command.goes_on else cli.STARTS_OVER) from None


if __name__ == "__main__":
    cli.run(main)
