"""`python -m teacher_dump run|plan|audit|rescore|serve|...`: the commands of a teacher."""

import dataclasses

from decant.search_path import leave_out_working_directory

DESCRIPTION = """Score a text source with a teacher once, into a cache that students train from.
The same commands are `decant dump`, `decant plan`, ...

  decant plan --config dump.yaml     what it will cost, from a scored sample
  decant dump --config dump.yaml     the job; run it again to resume
  decant serve --config serve.yaml   the teacher as a service for dumps elsewhere
  decant audit caches/mine --teacher path/or/hub-id"""


def main(arguments: list[str]) -> int:
    """Run the command that the arguments name; returns the exit code."""
    from decant.commands import TEACHER
    from decant.storage.cli.commands import dispatch

    named = [
        dataclasses.replace(entry, name="run") if entry.name == "dump" else entry
        for entry in TEACHER
    ]
    return dispatch("python -m teacher_dump", DESCRIPTION, [("commands", named)], arguments)


if __name__ == "__main__":
    leave_out_working_directory()
    from decant.storage.cli import process

    process.run(main)
