"""Configurations from YAML files and the command line, as instances of their dataclasses."""

import argparse
import contextlib
import dataclasses
import io
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from decant.storage.cli.diagnosis import diagnose
from decant.storage.cli.options import Option, groups, options

PRINT = "--print_config"
COMMENTS = "comments"
SWITCHES = ("true", "false", "yes", "no")


def parse_config(configs: Sequence[type], arguments: Sequence[str]) -> list[Any]:
    """One instance of each dataclass; they share the top level of the YAML.

    Raises ValueError, in one line that names the option or the file, its line and key.
    """
    spelled = spell(arguments, options(*configs))
    parser = _parser(configs)
    try:
        values = parser.parse_args(spelled)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(diagnose(spelled, configs) or _missing(str(error))) from error
    try:
        values = parser.instantiate(values)
    except TypeError as error:  # a group of keys that has a single value
        raise ValueError(diagnose(spelled, configs) or str(error)) from error
    return [
        config(**{field.name: values[field.name] for field in dataclasses.fields(config)})
        for config in configs
    ]


def wants_printing(arguments: Sequence[str]) -> bool:
    """Whether the configuration is to be printed."""
    return any(word.split("=")[0] == PRINT for word in arguments)


def printed_config(configs: Sequence[type], arguments: Sequence[str]) -> str:
    """The YAML that a command line and its files come to; `--print_config=comments` explains it.

    Raises ValueError as `parse_config` does; what is required may be missing.
    """
    flags = {
        flag
        for word in arguments
        if word.split("=")[0] == PRINT
        for flag in word.partition("=")[2].split(",")
    }
    rest = ",".join(sorted(flags - {COMMENTS, ""}))
    spelled = spell([w for w in arguments if w.split("=")[0] != PRINT], options(*configs))
    written = io.StringIO()
    try:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(written):
            _parser(configs).parse_args([*spelled, f"{PRINT}={rest}" if rest else PRINT])
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(diagnose(spelled, configs) or _missing(str(error))) from error
    text = written.getvalue()
    return commented(text, configs) if COMMENTS in flags else text


def commented(text: str, configs: Sequence[type]) -> str:
    """Printed YAML with the text of each key in front of it."""
    known = options(*configs)
    texts = {group.key: group.text for group in groups(*configs)}
    lines: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        key = re.match(r"( *)(\w+):", line)
        if key:
            depth = len(key[1]) // 2
            path[depth:] = [key[2]]
            name = ".".join(path)
            if name in known or name in texts:
                said = known[name].text if name in known else texts[name]
                lines += [""] * (name in texts and bool(lines))
                lines += [f"{key[1]}# {part}" for part in _wrapped(said, 96 - len(key[1]))]
        lines.append(line)
    return "\n".join(lines) + "\n"


def spell(arguments: Sequence[str], known: dict[str, Option]) -> list[str]:
    """The command line as jsonargparse reads it.

    A dash in a name stands for the underscore of the key; a bare switch is true; several words
    after an option that is a list are its items.
    """
    spelled: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word[2:].partition("=")
        key = name if name in known else name.replace("-", "_")
        if not word.startswith("--") or key not in known:
            spelled.append(word)
            continue
        kind = known[key].kind
        if equals:
            spelled.append(f"--{key}={value}")
        elif kind is bool:
            given = words.pop(0) if words and words[0].lower() in SWITCHES else "true"
            spelled.append(f"--{key}={given}")
        elif get_origin(kind) in (list, tuple) and get_args(kind)[0] in (str, int, float):
            items = list(_until_option(words))
            del words[: len(items)]
            spelled += [f"--{key}", *_listed(items, get_args(kind)[0])]
        else:
            spelled.append(f"--{key}")
            if words and not words[0].startswith("--"):
                spelled.append(words.pop(0))
    return spelled


def _until_option(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if word.startswith("--"):
            return
        yield word


def _listed(items: Sequence[str], kind: type) -> list[str]:
    """The words of a list as one word."""
    if not items or (len(items) == 1 and items[0].lstrip().startswith("[")):
        return list(items)
    return ["[" + ", ".join(json.dumps(item) if kind is str else item for item in items) + "]"]


def _parser(configs: Sequence[type]) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    for config in configs:
        parser.add_class_arguments(config)
    return parser


def _missing(message: str) -> str:
    """A message on one line; in our words where a required key is missing."""
    text = " ".join(message.split())
    found = re.match(r"the following arguments are required: (.*)", text)
    if not found:
        return text
    names = found[1].split(", ")
    named = " and ".join(names)
    ways = " ".join(f"--{name} ..." for name in names)
    return f"{named} {'is' if len(names) == 1 else 'are'} missing: set in the YAML, or as {ways}"


def _wrapped(text: str, columns: int) -> list[str]:
    return textwrap.wrap(text, columns, break_long_words=False, break_on_hyphens=False)
