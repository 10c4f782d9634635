"""What is wrong with a configuration that was refused: where, what was found, what was meant.

Looks at the command line first and then at the files, in the order in which they were given, so
that a mistake is blamed on the place where it was made.
"""

import dataclasses
import difflib
import itertools
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from decant.storage.cli.options import Option, expected, options

CONFIG = "--config"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`: did you mean ...?` for a word that is close to a known one, else an empty text."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    last = word.rpartition(".")[2]
    if not close:  # `lr` for `optimizer.lr`, `optimizer.kind` for `loss.kind`
        close = [name for name in names if name.rpartition(".")[2] == last][:1]
    if not close:
        lasts = {name.rpartition(".")[2]: name for name in reversed(names)}
        close = [lasts[one] for one in difflib.get_close_matches(last, lasts, n=1, cutoff=0.75)]
    return f": did you mean {close[0]}?" if close else ""


def diagnose(arguments: Sequence[str], configs: Sequence[type]) -> str:
    """One line about the first mistake of a command line and its files; "" if none is found."""
    return next(
        itertools.chain(_on_the_line(arguments, configs), _in_files(arguments, configs)), ""
    )


def config_files(arguments: Sequence[str]) -> list[str]:
    """The values of `--config`."""
    return [
        after if word == CONFIG else word.partition("=")[2]
        for word, after in itertools.pairwise([*arguments, ""])
        if word.split("=")[0] == CONFIG
    ]


def _on_the_line(arguments: Sequence[str], configs: Sequence[type]) -> Iterator[str]:
    known = options(*configs)
    groups = {key.rpartition(".")[0] for key in known} - {""}
    i = 0
    while i < len(arguments):
        word, i = arguments[i], i + 1
        if not word.startswith("--"):
            yield f"{word!r} is not an option: options start with --"
            continue
        name, has_value, value = word[2:].partition("=")
        if not has_value and i < len(arguments) and not arguments[i].startswith("--"):
            value, has_value, i = arguments[i], "=", i + 1
        name = name.rstrip("+")
        if name in ("config", "print_config", "help"):
            if name == "config" and not has_value:
                yield "--config needs a value: the name of a YAML file"
            continue
        if name in known:
            if not has_value:
                yield f"--{name} needs a value: {expected(known[name].kind)}"
            yield from _in_value(f"--{name}", value, known[name], added=word.rstrip("=")[-1] == "+")
        elif name in groups:
            one = next(key for key in known if key.startswith(f"{name}."))
            if not (value.lstrip().startswith("{") or Path(value).is_file()):
                yield (
                    f"--{name} {value}: expected a YAML file with keys of {name}, or one of its "
                    f"options, such as --{one}"
                )
        elif not any(name.startswith(f"{key}.") for key in known):
            meant = did_you_mean(name, known)
            yield f"--{name} is not an option{meant.replace('mean ', 'mean --')}"


def _in_value(place: str, value: str, option: Option, *, added: bool) -> Iterator[str]:
    """What is wrong with one option's value on the command line."""
    if option.kind is str or added:
        return
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        yield f"{place} {value}: expected {expected(option.kind)}"
        return
    if node is not None:
        for _, problem in _problems(node, option.kind, ""):
            yield f"{place} {value}: {problem.removeprefix(f'{value}: ')}"


def _in_files(arguments: Sequence[str], configs: Sequence[type]) -> Iterator[str]:
    for name in config_files(arguments):
        text, shown = name, CONFIG
        if Path(name).is_file():
            try:
                text, shown = Path(name).read_text(encoding="utf-8"), name
            except UnicodeDecodeError as error:
                yield f"{name} is not a text in UTF-8: {error}"
                continue
        elif not name.lstrip().startswith("{"):
            is_folder = Path(name).is_dir()
            yield f"{name}: {'a directory' if is_folder else 'no such file'}, expected a YAML file"
            continue
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{shown} line {mark.line + 1}" if mark else shown
            yield f"{place} is not YAML: {getattr(error, 'problem', None) or 'unreadable'}"
            continue
        if root is None:
            continue
        for line, problem in _of_root(root, configs):
            yield f"{shown} line {line + 1}: {problem}"


def _of_root(root: yaml.Node, configs: Sequence[type]) -> Iterator[tuple[int, str]]:
    kinds = {name: kind for config in configs for name, kind in _kinds(config).items()}
    yield from _keys(root, kinds, "", options(*configs))


def _problems(
    node: yaml.Node, kind: Any, path: str, *, is_whole: bool = False
) -> Iterator[tuple[int, str]]:
    """Line and text of what is wrong with a value of a kind; `path` is its key.

    A mapping that `is_whole` must have all keys that have no default: no other file adds any.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from _problems(node, inner[0], path)
        return
    if node.tag == "tag:yaml.org,2002:null":
        return
    if origin in (Union, types.UnionType):
        wanted = [one for one in inner if one is not types.NoneType]
        is_map = isinstance(node, yaml.MappingNode)
        fitting = [one for one in wanted if _is_mapping(one) == is_map]
        if not fitting:
            yield _wrong(node, kind, path)
        elif len(fitting) == 1:
            yield from _problems(node, fitting[0], path, is_whole=True)
        return
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        if isinstance(node, yaml.ScalarNode) and Path(node.value).is_file():
            return  # the group in a file of its own
        known = options(kind)
        yield from _keys(node, _kinds(kind), path, known)
        if isinstance(node, yaml.MappingNode) and is_whole:
            given = {key.value for key, _ in node.value}
            for field in dataclasses.fields(kind):
                no_default = field.default is field.default_factory is dataclasses.MISSING
                if no_default and field.name not in given:
                    yield node.start_mark.line, f"{path or 'this'} has no {field.name}"
        return
    if origin in (list, tuple):
        if not isinstance(node, yaml.SequenceNode):
            yield _wrong(node, kind, path)
            return
        for place, item in enumerate(node.value):
            yield from _problems(item, inner[0], f"{path}[{place}]", is_whole=True)
    elif origin is dict:
        if not isinstance(node, yaml.MappingNode):
            yield _wrong(node, kind, path)
    elif not _is_scalar(node, kind):
        yield _wrong(node, kind, path)


def _keys(
    node: yaml.Node, kinds: dict[str, Any], path: str, known: dict[str, Option]
) -> Iterator[tuple[int, str]]:
    if not isinstance(node, yaml.MappingNode):
        example = f", such as {{{next(iter(kinds))}: ...}}"
        yield node.start_mark.line, _found(node, path) + "expected keys with values" + example
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            yield key.start_mark.line, "expected the name of a key, found a list or more keys"
            continue
        if key.value == "<<":  # YAML's own: the keys of another mapping
            continue
        its_path = f"{path}.{key.value}".lstrip(".")
        if key.value in kinds:
            yield from _problems(value, kinds[key.value], its_path)
        else:
            inside = [f"{path}.{name}".lstrip(".") for name in (*kinds, *known)]
            yield key.start_mark.line, f"{its_path} is not a key{did_you_mean(its_path, inside)}"


def _kinds(config: type) -> dict[str, Any]:
    kinds = get_type_hints(config, include_extras=True)
    return {field.name: kinds[field.name] for field in dataclasses.fields(config)}


def _is_mapping(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or get_origin(kind) is dict


def _is_scalar(node: yaml.Node, kind: Any) -> bool:
    """Whether a node is a scalar of the kind."""
    if kind is Any:
        return True
    if not isinstance(node, yaml.ScalarNode):
        return False
    if get_origin(kind) is Literal:
        return node.value in map(str, get_args(kind))
    tag = node.tag.rpartition(":")[2]
    if kind is float:
        try:
            float(node.value.replace("_", ""))
        except ValueError:
            return tag in ("int", "float")
        return True
    return tag == {int: "int", bool: "bool", str: "str"}.get(kind, tag)


def _wrong(node: yaml.Node, kind: Any, path: str) -> tuple[int, str]:
    wanted = expected(kind)
    if kind is str and isinstance(node, yaml.ScalarNode):
        wanted += f", in quotes: '{node.value}'"
    return node.start_mark.line, f"{_found(node, path)}expected {wanted}"


def _found(node: yaml.Node, path: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        what = "keys with values" if isinstance(node, yaml.MappingNode) else "a list"
        return f"{path} is {what}: " if path else f"found {what}: "
    return f"{path} is {node.value}: " if path else f"{node.value}: "
