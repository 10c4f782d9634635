"""Strict JSON for frozen dataclasses: every field present, none unknown, every type as declared.

A reader that guesses at a field it does not know trains on numbers it does not understand, so
there are no defaults on the way in. Numbers are finite and of 64 bits, depth is bounded.
"""

import dataclasses
import json
import math
import re
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")

MAX_DEPTH = 100
"""Levels of lists and objects in a JSON file of a cache."""
LARGEST = 2**53
"""Bound of every count, size and offset: what a double, and so any JSON reader, holds exactly."""
FRONT, BACK = 5000, 500
"""Characters of an error that quotes more: a path alone may have 4,096."""
HASH = re.compile(r"[0-9a-f]{32}")
"""An xxh3_128."""
NAME_PART = re.compile(r"(?!\.{1,2}$)[^/\\:*?\[\]\0]+")


class FormatError(ValueError):
    """A file of the cache is not what the format says: names the file, expected and actual."""

    def __init__(self, message: str) -> None:
        """What it quotes may be of any length: the middle of a long message is left out."""
        long = len(message) > FRONT + BACK
        super().__init__(f"{message[:FRONT]} ... {message[-BACK:]}" if long else message)


class UnfitError(FormatError):
    """There is no cache, or a sound one that is not fit for what is asked: nothing is damaged."""


def to_json(value: Any) -> Any:
    """Turn a (nested) dataclass into plain JSON values, one key per field."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def canonical(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, UTF-8. What hashes are over.

    Raises ValueError on a NaN or infinity, which JSON does not have.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def from_json(cls: type[T], data: Any, where: str) -> T:
    """Build dataclass `cls` from parsed JSON.

    Raises FormatError, naming `where`, on a missing field, an unknown field or a wrong type; a
    ValueError of the class's own checks is raised again with `where` in front.
    """
    if not isinstance(data, dict):
        raise FormatError(f"{where}: expected an object of {cls.__name__}, found {_kind(data)}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    missing = [name for name in names if name not in data]
    unknown = sorted(set(data) - set(names))
    if missing or unknown:
        parts = []
        if missing:
            parts.append(f"missing {', '.join(missing)}")
        if unknown:
            parts.append(f"unknown {', '.join(unknown)}")
        raise FormatError(f"{where}: fields of {cls.__name__}: {'; '.join(parts)}")
    values = {name: _value(hints[name], data[name], f"{where}: {name}") for name in names}
    try:
        return cls(**values)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def check_counts(value: Any, *names: str) -> None:
    """Raise ValueError, naming the field, unless these of a dataclass are counts up to LARGEST."""
    for name in names:
        if not 0 <= getattr(value, name) <= LARGEST:
            raise ValueError(f"{name} must lie in [0, 2^53], found {getattr(value, name)}")


def check_hash(name: str, text: str) -> None:
    """Raise ValueError, naming the field, unless it holds an xxh3_128."""
    if not HASH.fullmatch(text):
        raise ValueError(f"{name} must be 32 lower-case hex digits, found {text!r:.60}")


def check_inside(name: str, where: str) -> None:
    """Raise FormatError unless a file name from a cache stays inside the cache, on any store.

    It is relative, its parts are printable, none is `..`, and no part is a pattern or a URL.
    """
    parts = name.split("/")
    inside = all(NAME_PART.fullmatch(part) for part in parts)
    if not inside or not name.isprintable() or len(name) > 1000:
        raise FormatError(f"{where}: {name!r:.100} is no name of a file inside the cache")


def check_depth(value: Any, where: str) -> None:
    """Raise FormatError if JSON is nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise FormatError(f"{where}: nested deeper than {MAX_DEPTH} levels")


def _value(hint: Any, data: Any, where: str) -> Any:
    if hint is Any:
        return data
    origin = typing.get_origin(hint)
    if origin is types.UnionType:  # only `X | None` is used
        if data is None:
            return None
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        return _value(hint, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise FormatError(f"{where}: expected a list, found {_kind(data)}")
        item = typing.get_args(hint)[0]
        return tuple(_value(item, entry, f"{where}[{i}]") for i, entry in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise FormatError(f"{where}: expected an object, found {_kind(data)}")
        (_, item) = typing.get_args(hint)
        return {key: _value(item, entry, f"{where}.{key}") for key, entry in data.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), data, where)
    if type(data) is int and not -(2**63) <= data < 2**63:
        raise FormatError(f"{where}: expected a number of 64 bits, found one of {_digits(data)}")
    if hint is float and type(data) is int:
        return float(data)
    if type(data) is float and not math.isfinite(data):
        raise FormatError(f"{where}: expected a finite number, found {data}")
    if not isinstance(data, hint) or (isinstance(data, bool) and hint is not bool):
        raise FormatError(f"{where}: expected {hint.__name__}, found {_kind(data)}")
    return data


def _digits(number: int) -> str:
    return f"{number.bit_length()} bits"


def _kind(data: Any) -> str:
    if data is None:
        return "null"
    if isinstance(data, dict | list | bytes):  # these may be of any size
        return f"{type(data).__name__} of {len(data)}"
    if type(data) is int and abs(data) >= 2**63:
        return f"int of {_digits(data)}"
    return f"{type(data).__name__} {json.dumps(data)[:60]}"


def with_later(data: Any, fields: dict[str, Any], version: int, since: int, where: str) -> Any:
    """Loaded JSON of a format version with the fields that came `since`; they must be new to it."""
    if version >= since or not isinstance(data, dict):
        return data
    later = sorted(set(fields) & set(data))
    if later:
        raise FormatError(f"{where}: fields unknown in version {version}: {', '.join(later)}")
    return {**data, **fields}
