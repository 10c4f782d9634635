"""Write `docs/cli.md` from the commands themselves: `python docs/generate_cli.py`.

A test compares the file with what this gives, so the page cannot differ from `--help`.
"""

import html
from collections.abc import Iterator
from pathlib import Path

from decant.commands import ALL
from decant.storage.cli.arguments import flag
from decant.storage.cli.commands import Command, Entry
from decant.storage.cli.options import REQUIRED, Group, Option, groups

PAGE = Path(__file__).with_name("cli.md")
MODULES = {"score a teacher": "teacher_dump", "look at a cache": "storage"}
"""What the commands of a section are called as `python -m`, with their names."""
INTRODUCTION = """# Commands

`decant COMMAND --help` prints what is here. `decant` works in any folder, also in one that has a
`storage/` or a `schemas.py` of its own; `python -m decant` is the same.

Options of a **configuration** are keys of a YAML file, `truncation: {k: 32}`; on the command line,
`--truncation.k 32`, they win over it. A dash may stand for an underscore, a list may be given as
several words (`--temperatures 1 2`). Every command with a configuration also has

| option | meaning |
| --- | --- |
| `--config FILE` | YAML with any of its keys; may be given again: what comes later wins |
| `--GROUP FILE` | the keys of one group from a file of their own: `--loss loss.yaml` |
| `--print_config` | print the resulting YAML and stop |
| `--print_config=comments` | with the meaning of every key: a good start for a file |
| `--print_config=skip_default` | without the keys that have their default |

and every command

| option | meaning |
| --- | --- |
| `--help` | its options; `decant --help` lists the commands |
| `--debug` | show the traceback of an error |

Exit codes: 0 done; 1 the data is bad (`verify`, `audit`); 2 you must change something, one line on
stderr says what; 130 interrupted, nothing lost.
"""


def page() -> str:
    """The text of `cli.md`."""
    parts = [INTRODUCTION, *_contents()]
    for title, entries in ALL:
        for entry in entries:
            parts += [f"## decant {entry.name}", *_command(entry, title)]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _contents() -> Iterator[str]:
    rows = [
        f"| [`decant {entry.name}`](#decant-{entry.name}) | {entry.line} |"
        for _, entries in ALL
        for entry in entries
    ]
    yield "\n".join(["| command | |", "| --- | --- |", *rows])


def _command(entry: Entry, title: str) -> Iterator[str]:
    command = entry.load()
    yield entry.line
    yield f"```text\n{command.text.strip(chr(10))}\n```"
    if module := _module(entry, title):
        yield f"Also `python -m {module}`."
    if command.config is None:
        assert command.arguments
        (group,) = groups(command.arguments)
        yield _table([(flag(option), option) for option in group.options])
        return
    yield from _config(entry, command)


def _config(entry: Entry, command: Command) -> Iterator[str]:
    assert command.config
    if command.arguments:
        own, *others = groups(command.arguments)
        yield "Of this run alone:"
        yield _table([(flag(option), option) for option in own.options])
    else:
        others = []
    if entry.name in ("plan", "messages"):
        yield "Configuration: that of [`decant dump`](#decant-dump)."
        return
    for group in [*groups(command.config), *others]:
        if group.options:
            yield _heading(group)
            yield _table([(option.key, option) for option in group.options])


def _heading(group: Group) -> str:
    return f"**{group.key}**: {_escaped(group.text)}" if group.key else "Configuration:"


def _module(entry: Entry, title: str) -> str:
    if entry.name == "train":
        return "student_train"
    name = "run" if entry.name == "dump" else entry.name
    return f"{MODULES[title]} {name}" if title in MODULES else ""


def _table(rows: list[tuple[str, Option]]) -> str:
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for name, option in rows:
        default = "required" if option.default is REQUIRED else option.default_text
        shown = f"`{default}`" if default not in ("", "required") else default
        lines.append(f"| `{name}` | {shown} | {_escaped(option.text)} |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page())
