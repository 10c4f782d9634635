"""`python -m storage inspect|verify|export|subset|merge|...`: the commands of a cache."""

from decant.search_path import leave_out_working_directory

DESCRIPTION = """Look at caches of teacher distributions, and exchange them with other tools.
The same commands are `decant inspect`, `decant head`, ...

  decant inspect caches/demo              size, retained mass, teacher quality
  decant inspect caches/demo --json | jq .bytes_per_target
  decant verify caches/demo && echo whole
  decant verify s3://bucket/caches/demo   any fsspec URL works

Nothing here changes a cache that exists; inspect keeps its figures beside it,
in stats/."""


def main(arguments: list[str]) -> int:
    """Run the command that the arguments name; returns the exit code."""
    from decant.commands import CACHE, EDIT
    from decant.storage.cli.commands import dispatch

    table = [("commands", CACHE), ("make a cache of others", EDIT)]
    return dispatch("python -m storage", DESCRIPTION, table, arguments)


if __name__ == "__main__":
    leave_out_working_directory()
    from decant.storage.cli import process

    process.run(main)
