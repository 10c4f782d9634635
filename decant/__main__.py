"""The command `decant`, also as `python -m decant`."""

from decant.search_path import leave_out_working_directory

DESCRIPTION = """Distil language models from files. A teacher scores your text once; students are
trained from the files as often as you like.

  decant examples examples             configurations to begin with
  decant plan     --config dump.yaml   what it will cost, from a scored sample
  decant dump     --config dump.yaml   the teacher's distributions into a cache
  decant inspect  caches/mine          what the cache holds
  decant train    --config train.yaml  a student from the cache"""


def command(arguments: list[str]) -> int:
    """Run the command that the arguments name; returns the exit code."""
    from decant.commands import ALL
    from decant.storage.cli.commands import dispatch

    if arguments == ["--version"]:
        import decant

        print(f"decant {decant.__version__}")
        return 0
    return dispatch("decant", DESCRIPTION, ALL, arguments)


def main() -> None:
    """Run the process's arguments and exit with the command's code."""
    leave_out_working_directory()
    from decant.storage.cli import process

    process.run(command)


if __name__ == "__main__":
    main()
