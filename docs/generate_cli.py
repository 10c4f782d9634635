"""Write `docs/cli.md` from the command lines' own parsers: `python docs/generate_cli.py`.

A test compares the file with what this gives, so the page cannot differ from `--help`.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import decant.storage.__main__
import decant.student_train.__main__
import decant.teacher_dump.__main__

PAGE = Path(__file__).with_name("cli.md")
COLUMNS = 100
INTRODUCTION = """# Commands

What `--help` prints. Every key of a configuration can stand in the YAML file or on the command
line, where it wins: `--truncation.k 32`. `--print_config` prints the resolved YAML.

All commands exit with 0 when they are done, 1 if the data is bad (`verify`, `audit`), 2 if you must
change something (one line on stderr says what; `--debug` anywhere adds the traceback), and 130
if they were interrupted.
"""


def parsers() -> Iterator[argparse.ArgumentParser]:
    """The parser of every command, in the order of use."""
    yield from _subparsers(decant.teacher_dump.__main__.parser())
    yield decant.student_train.__main__.parser()
    yield from _subparsers(decant.storage.__main__.parser())


def _subparsers(root: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    (action,) = [a for a in root._actions if isinstance(a.choices, dict)]
    assert isinstance(action.choices, dict)
    yield from action.choices.values()


def page() -> str:
    """The text of `cli.md`."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(COLUMNS)  # argparse asks for the terminal's width
    try:
        sections = [
            f"## `{p.prog}`\n\n```text\n{p.format_help().strip()}\n```\n" for p in parsers()
        ]
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    lines = "\n".join([INTRODUCTION, *sections]).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
