"""What a dataclass offers to a command line: each field with its kind, default and text.

The text of a field is the docstring below it. Help, tables of the documentation, comments in a
printed configuration and suggestions after a typing error all come from here.
"""

import ast
import dataclasses
import inspect
import json
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

REQUIRED = object()
"""The default of an option that has none."""


@dataclass(frozen=True, slots=True)
class Word:
    """Annotates a field that is given by its place on the command line, not by its name.

    If it is a list, by all places up to those of the words that follow it.
    """

    shown: str
    """How help calls it."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Annotates a field whose value help calls so, and not after its type."""

    as_: str


@dataclass(frozen=True, slots=True)
class Named:
    """Annotates a field that has another name on the command line."""

    name: str


@dataclass(frozen=True, slots=True)
class Hidden:
    """Annotates a field that is not for the command line."""


@dataclass(frozen=True, slots=True)
class Option:
    """One field."""

    key: str
    """With the keys of the groups that it is in: optimizer.lr."""
    field: str
    """The field's own name."""
    kind: Any
    """Its type."""
    default: Any
    """REQUIRED if there is none."""
    text: str
    notes: tuple[Any, ...] = ()
    """`Word`, `Shown` and `Named`."""

    @property
    def word(self) -> Word | None:
        """How it is called if it is given by its place."""
        return next((note for note in self.notes if isinstance(note, Word)), None)

    @property
    def value(self) -> str:
        """What stands for its value in help: N, X, TEXT, or the values themselves."""
        for note in self.notes:
            if isinstance(note, Shown):
                return note.as_
        return _value(self.kind)

    @property
    def default_text(self) -> str:
        """Its default as one would type it; "" for none, and for an empty text."""
        if self.default is REQUIRED or self.default in (None, "", [], {}, ()):
            return ""
        if isinstance(self.default, str):
            return self.default
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return json.dumps(self.default)


@dataclass(frozen=True, slots=True)
class Group:
    """Fields that stand together: those of one dataclass."""

    key: str
    """The key that they are below; "" at the top."""
    text: str
    """What the group is for."""
    options: tuple[Option, ...]


def groups(*configs: type) -> list[Group]:
    """The fields of dataclasses at one level, then of the dataclasses in them, each in order."""
    top: list[Option] = []
    below: list[Group] = []
    for config in configs:
        found = list(_groups(config, "", ""))
        top += found[0].options
        below += found[1:]
    return [Group("", "", tuple(top)), *below]


def options(*configs: type) -> dict[str, Option]:
    """All options by their key."""
    return {option.key: option for group in groups(*configs) for option in group.options}


def _groups(config: type, key: str, text: str) -> Iterator[Group]:
    texts, kinds = field_texts(config), get_type_hints(config, include_extras=True)
    plain: list[Option] = []
    below: list[Group] = []
    for field in dataclasses.fields(config):
        kind, *notes = (
            get_args(kinds[field.name])
            if get_origin(kinds[field.name]) is Annotated
            else (kinds[field.name],)
        )
        name = next((note.name for note in notes if isinstance(note, Named)), field.name)
        path, its_text = f"{key}.{name}".lstrip("."), texts.get(field.name, "")
        if any(isinstance(note, Hidden) for note in notes):
            continue
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            below += _groups(kind, path, its_text)
        else:
            plain.append(Option(path, field.name, kind, _default(field), its_text, tuple(notes)))
    yield Group(key, text, tuple(plain))
    yield from below


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED


def field_texts(config: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of those it is made from, on one line."""
    texts: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(said))),
                ):
                    texts[name] = " ".join(said.split())
    return texts


def _value(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin in (Union, types.UnionType):
        shown = [_value(one) for one in inner if one is not types.NoneType]
        return "|".join(dict.fromkeys(shown))
    names: Mapping[Any, str] = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
    if kind in names:
        return names[kind]
    if origin in (list, tuple, Sequence):
        return "[...]"
    return "{...}"


def without_none(kind: Any) -> Any:
    """`int` for `int | None`."""
    if get_origin(kind) in (Union, types.UnionType):
        inner = [one for one in get_args(kind) if one is not types.NoneType]
        return inner[0] if len(inner) == 1 else kind
    return kind


def expected(kind: Any) -> str:
    """A kind of value in words, for messages."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(expected(one) for one in inner if one is not types.NoneType)
    if origin in (list, tuple, Sequence):
        return "a list, [a, b, ...]"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "keys with values, {key: value, ...}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, "another value")
