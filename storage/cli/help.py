"""Help pages: what a command is for, examples, then its options by group, the common ones first."""

import shutil
import textwrap
from collections.abc import Iterable, Sequence

from decant.storage.cli.arguments import flag
from decant.storage.cli.options import REQUIRED, Option, groups

GLUE = "\N{NO-BREAK SPACE}"
"""Stands for a space at which no line is broken."""
SIDE_BY_SIDE = 26
"""Names up to this width have their text beside them, longer ones below them."""
ALWAYS = (
    ("--help, -h", "Show this page."),
    ("--debug", "Show the traceback of an error."),
)
OF_CONFIGS = (
    ("--config FILE", "YAML with any of the keys of this page; what comes later wins."),
    (
        "--print_config",
        "Print the resulting YAML and stop; --print_config=comments explains every key, "
        "=skip_default leaves out what is not set.",
    ),
)


def columns() -> int:
    """The width of a help page."""
    return max(40, min(100, shutil.get_terminal_size().columns))


def arguments_page(name: str, text: str, arguments: type, common: Sequence[str]) -> str:
    """The page of a command with words and options."""
    (group,) = groups(arguments)
    words = [option for option in group.options if option.word]
    named = [option for option in group.options if not option.word]
    named.sort(key=lambda option: (*common, option.key).index(option.key))
    required = [option for option in named if option.default is REQUIRED]
    usage = [flag(option) for option in words]
    usage += [f"{flag(option)} {option.value}" for option in required]
    parts = [_usage(name, [*usage, "[options]"]), text.strip("\n")]
    if words:
        parts.append(_section("arguments:", [(flag(option), option.text) for option in words]))
    if required:
        parts.append(_section("required:", [(f"{flag(o)} {o.value}", o.text) for o in required]))
    others = [option for option in named if option not in required]
    parts.append(_section("options:", [*(_row(o, flag(o)) for o in others), *ALWAYS]))
    return "\n\n".join(parts) + "\n"


def config_page(
    name: str, text: str, config: type, arguments: type | None, common: Sequence[str]
) -> str:
    """The page of a command with a configuration."""
    parts = [_usage(name, ["[--config FILE]", "[--KEY VALUE ...]"]), text.strip("\n")]
    found = groups(config)
    every = {option.key: option for group in found for option in group.options}
    parts.append(_section("the most used:", [_row(every[key], f"--{key}") for key in common]))
    of_command = groups(arguments) if arguments else []
    if of_command:
        rows = [_row(option, flag(option)) for option in of_command[0].options]
        parts.append(_section("about this run alone:", rows))
    parts.append(_section("always:", [*OF_CONFIGS, *ALWAYS]))
    for group in [*found, *of_command[1:]]:
        rows = [_row(o, f"--{o.key}") for o in group.options if o.key not in common]
        title = f"{group.key}: {group.text.rstrip('.')}" if group.key else "general:"
        if rows:
            parts.append(_section(title, rows))
    return "\n\n".join(parts) + "\n"


def list_page(
    program: str, text: str, sections: Iterable[tuple[str, Sequence[tuple[str, str]]]]
) -> str:
    """The page that lists the commands of a program."""
    parts = [_usage(program, ["COMMAND", "[options]"]), text.strip("\n")]
    parts += [_section(f"{title}:", rows) for title, rows in sections]
    parts.append(f"`{program} COMMAND --help` explains one.")
    return "\n\n".join(parts) + "\n"


def _row(option: Option, name: str) -> tuple[str, str]:
    """Name with its value, and text with its default."""
    shown = name if option.kind is bool and option.default is False else f"{name} {option.value}"
    text = option.text
    if option.default is REQUIRED:
        text += " Required."
    elif option.default_text and not (option.kind is bool and option.default is False):
        text += f" Default:{GLUE}{option.default_text.replace(' ', GLUE)}."
    return shown, text


def _usage(name: str, words: Sequence[str]) -> str:
    return "\n".join(
        textwrap.wrap(
            f"usage: {name} {' '.join(words)}",
            columns() - 1,
            subsequent_indent=" " * 7,
            break_on_hyphens=False,
        )
    )


def _section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title over names and texts, side by side where all names are short."""
    lines = _wrap(title, "")
    room = max(len(name) for name, _ in rows)
    for name, text in rows:
        if room <= SIDE_BY_SIDE:
            lines += _wrap(text, f"  {name:<{room}}  ", " " * (room + 4))
        else:
            lines += [f"  {name}", *_wrap(text, " " * 6)]
    return "\n".join(lines)


def _wrap(text: str, first: str, others: str | None = None) -> list[str]:
    lines = textwrap.wrap(
        text,
        columns() - 1,
        initial_indent=first,
        subsequent_indent=first if others is None else others,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [line.replace(GLUE, " ") for line in lines] or [first.rstrip()]
