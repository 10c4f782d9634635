"""Commands, the tables that list them, and what happens between a command line and a command.

A room's `command.py` holds its commands; a table names them, so that one is imported when it is
used and no other. Every command line of the product goes through `dispatch` or `perform`.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from decant.storage.cli import help, process
from decant.storage.cli.arguments import parse_arguments
from decant.storage.cli.config import parse_config, printed_config, wants_printing
from decant.storage.cli.diagnosis import did_you_mean
from decant.storage.cli.machine import refuse_little_memory, refuse_names

HELP = ("-h", "--help")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command: its help, what it takes, what it does."""

    text: str
    """Its help page below the first line, which the table has: examples first."""
    run: Callable[..., int]
    """Gets an instance of `config`, if there is one, then one of `arguments`; gives the exit
    code."""
    arguments: type | None = None
    """Dataclass of what is given on the command line."""
    config: type | None = None
    """Dataclass of the keys of a YAML file, each also an option."""
    common: tuple[str, ...] = ()
    """The options that help shows first."""
    goes_on: bool = True
    """Whether an interrupted run is continued by the next."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a table of commands."""

    name: str
    line: str
    """What it does, in one line."""
    place: str
    """Where the `Command` is, module:NAME; imported when it is used."""

    def load(self) -> Command:
        """Import the command."""
        module, _, name = self.place.partition(":")
        command: Command = getattr(importlib.import_module(module), name)
        return command


Table = Sequence[tuple[str, Sequence[Entry]]]
"""Entries in sections with a title."""


def dispatch(program: str, text: str, table: Table, arguments: Sequence[str]) -> int:
    """Run the command that the first argument names; returns the exit code.

    Raises ValueError if there is no such command, or its arguments are wrong.
    """
    entries = {entry.name: entry for _, section in table for entry in section}
    word, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if word == "help":
        word, rest = (rest[0], ["--help"]) if rest else ("--help", [])
    if not word or word in HELP:
        rows = [(title, [(e.name, e.line) for e in section]) for title, section in table]
        print(help.list_page(program, text, rows), end="")
        return process.DONE if word else process.USER_ERROR
    if word not in entries:
        meant = did_you_mean(word, entries) or f": the commands are {', '.join(entries)}"
        raise ValueError(f"{word!r} is not a command of {program}{meant}")
    return perform(f"{program} {word}", entries[word], rest)


def perform(name: str, entry: Entry, arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code. `name` is how it is called in its help."""
    process.interrupt_on_terminate()
    command = entry.load()
    if any(word in HELP for word in arguments):
        print(page(name, entry, command), end="")
        return process.DONE
    refuse_names([*arguments, os.getcwd()])
    kinds = [kind for kind in (command.config, command.arguments) if kind]
    if command.config and wants_printing(arguments):
        print(printed_config(kinds, arguments), end="")
        return process.DONE
    try:
        values: list[Any]
        if command.config:
            values = parse_config(kinds, arguments)
        else:
            values = [parse_arguments(kind, arguments) for kind in kinds]
    except ValueError as error:
        raise ValueError(f"{error} (`{name} --help` lists the options)") from error
    refuse_little_memory()
    try:
        return command.run(*values)
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            raise
        going_on = process.GOES_ON if command.goes_on else process.STARTS_OVER
        raise KeyboardInterrupt(going_on) from None


def page(name: str, entry: Entry, command: Command) -> str:
    """The help page of a command."""
    text = f"{entry.line}\n\n" + command.text.strip("\n")
    if command.config:
        return help.config_page(name, text, command.config, command.arguments, command.common)
    assert command.arguments
    return help.arguments_page(name, text, command.arguments, command.common)
