"""Words and options of a command that has no configuration file, as an instance of a dataclass."""

import argparse
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml

from decant.storage.cli.diagnosis import did_you_mean
from decant.storage.cli.options import REQUIRED, Option, options, without_none


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's message."""
        raise ValueError(message)


def parse_arguments(kind: type, arguments: Sequence[str]) -> Any:
    """An instance of the dataclass. Raises ValueError, in one line that names the option."""
    parser = _Parser(add_help=False)
    known = {flag(option): option for option in options(kind).values()}
    for option in known.values():
        _add(parser, option)
    values, unknown = parser.parse_known_args(list(arguments))
    for word in unknown:
        name = word.split("=")[0]
        if name.startswith("-"):
            raise ValueError(f"{name} is not an option{did_you_mean(name, known)}")
        raise ValueError(f"{word!r} is one word too many")
    given = vars(values)
    return kind(**{option.field: _value(option, given[option.key]) for option in known.values()})


def _value(option: Option, given: Any) -> Any:
    """What a field gets: of an option that may be given several times, all that was given."""
    if not _is_several(option):
        return given
    return tuple(given) if given is not None else option.default


def _is_several(option: Option) -> bool:
    return get_origin(without_none(option.kind)) in (list, tuple)


def flag(option: Option) -> str:
    """How an option is called on the command line: `--max-batch-tokens`, or `DIR`."""
    return option.word.shown if option.word else "--" + option.key.replace("_", "-")


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    about: dict[str, Any] = {"default": None if option.default is REQUIRED else option.default}
    kind = without_none(option.kind)
    if kind is bool:
        about["action"] = "store_true"
    elif get_origin(kind) is Literal:
        about["choices"] = get_args(kind)
    elif kind in (int, float):
        about["type"] = kind
    elif get_origin(kind) is dict:
        about["type"] = _mapping
    if option.word:
        several: dict[str, Any] = {"nargs": "+"} if _is_several(option) else {}
        parser.add_argument(option.key, metavar=option.word.shown, **several)
        return
    if _is_several(option):
        about |= {"action": "append", "default": None}
        item = get_args(kind)[0]
        about |= {"type": item} if item in (int, float) else {}
    if kind is not bool:
        about["required"] = option.default is REQUIRED
    parser.add_argument(flag(option), dest=option.key, **about)


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text}: expected keys with values, {{key: value, ...}}")
    return {str(key): given for key, given in value.items()}
