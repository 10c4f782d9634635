"""A chat template that says, of what it renders, which message each character comes from.

Between the nodes of the parsed template it puts marks: where an iteration over the messages begins
and ends, and where a {% generation %} block does. The marks are rendered along, read and taken out
again. Whether they changed what the template does is for the caller to check, against the text that
the template renders without them.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from decant.teacher_dump.inputs.offsets import Span

BEGIN, END = "\ufdd0", "\ufdd1"
"""Around a mark: characters that Unicode keeps out of texts."""
MARK = re.compile(f"{BEGIN}([^{END}]*){END}")
MARKER = "decant_marker"

BLOCK_BEGIN, BLOCK_END = f"{BEGIN}block{END}", f"{BEGIN}/block{END}"


@dataclass(frozen=True, slots=True)
class Marked:
    """A rendered text and where its characters come from."""

    text: str
    runs: list[tuple[int, Span]]
    """Message and characters, in the order of the text; what comes from no message is in none."""
    blocks: list[tuple[int | None, Span]]
    """The generation blocks, with the message each belongs to if that is known."""

    def runs_of(self, index: int) -> list[Span]:
        """The characters of one message that no other message inside it renders."""
        return [span for message, span in self.runs if message == index]


def render_marked(
    source: str, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> Marked | None:
    """What the template renders, with its origins; None if the messages hold marks themselves.

    Raises what the template raises. `variables` is all it gets besides the messages.
    """
    marker = _Marker(messages)
    rendered = _compiled(source).template.render(messages=messages, **{MARKER: marker}, **variables)
    return _read(rendered)


def has_blocks(source: str) -> bool:
    """Whether the template has {% generation %} blocks (comments may speak of them)."""
    return "generation" in source and _compiled(source).has_blocks


class _Marker:
    """What the template calls; at most one message is open per loop."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._indices = {id(message): index for index, message in enumerate(messages)}
        self._open: dict[int, int] = {}

    def begin(self, loop: int, item: Any) -> str:
        """Mark the start of an iteration over an item, if that is a message."""
        ended = self.end(loop)
        index = self._indices.get(id(item))
        if index is None:
            return ended
        self._open[loop] = index
        return f"{ended}{BEGIN}{loop}:{index}{END}"

    def assign(self, loop: int, item: Any) -> str:
        """Mark the same where an iteration over numbers looks its message up."""
        return "" if loop in self._open else self.begin(loop, item)

    def end(self, loop: int) -> str:
        """Mark the end of the iteration, if a message is open."""
        return "" if self._open.pop(loop, None) is None else f"{BEGIN}/{loop}{END}"


class _Marks(NodeTransformer):
    def __init__(self) -> None:
        self._loops: list[int] = []
        self._count = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self._count += 1
        loop = self._count
        self._loops.append(loop)
        self.generic_visit(node)
        self._loops.pop()
        name = node.target.name if isinstance(node.target, nodes.Name) else None
        if name is not None:
            node.body.insert(0, _call("begin", nodes.Const(loop), nodes.Name(name, "load")))
        node.body.append(_call("end", nodes.Const(loop)))
        return [node, _call("end", nodes.Const(loop))]  # after {% continue %} or {% break %}

    def visit_Assign(self, node: nodes.Assign) -> Any:
        if not self._loops or not isinstance(node.target, nodes.Name):
            return node
        looked_up = nodes.Name(node.target.name, "load")
        return [node, _call("assign", nodes.Const(self._loops[-1]), looked_up)]

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        loops, self._loops = self._loops, []
        self.generic_visit(node)
        self._loops = loops
        return node


class _Generation(Extension):
    """{% generation %}: what is inside, between marks."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [
            nodes.Output([nodes.TemplateData(BLOCK_BEGIN)], lineno=line),
            nodes.Scope(body, lineno=line),
            nodes.Output([nodes.TemplateData(BLOCK_END)], lineno=line),
        ]


def _call(method: str, *arguments: nodes.Expr) -> nodes.Output:
    marker = nodes.Getattr(nodes.Name(MARKER, "load"), method, "load")
    return nodes.Output([nodes.Call(marker, list(arguments), [], None, None)])


@dataclass(frozen=True, slots=True)
class _Compiled:
    template: Template
    has_blocks: bool


@lru_cache(maxsize=16)
def _compiled(source: str) -> _Compiled:
    """The template with its marks, in an environment like that of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    parsed = environment.parse(source)
    blocks = any(data.data == BLOCK_BEGIN for data in parsed.find_all(nodes.TemplateData))
    marked = _Marks().visit(parsed).set_lineno(1).set_environment(environment)
    return _Compiled(environment.from_string(marked), blocks)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _read(rendered: str) -> Marked | None:
    """Take the marks out. Each is a number of a loop with a message, or the end of either."""
    texts: list[str] = []
    runs: list[tuple[int, Span]] = []
    blocks: list[tuple[int | None, Span]] = []
    stack: list[tuple[str, int]] = []
    begun: list[tuple[int | None, int]] = []
    place = length = 0
    for match in (*MARK.finditer(rendered), None):
        text = rendered[place : match.start() if match else len(rendered)]
        if text and stack:
            message, start = stack[-1][1], length
            if runs and runs[-1][0] == message and runs[-1][1][1] == length:
                start = runs.pop()[1][0]
            runs.append((message, (start, length + len(text))))
        texts.append(text)
        length += len(text)
        if match is None:
            break
        place = match.end()
        mark = match[1]
        if mark == "block":
            begun.append((stack[-1][1] if stack else None, length))
        elif mark == "/block":
            owner, start = begun.pop()
            blocks.append((owner, (start, length)))
        elif mark.startswith("/"):
            if not stack or stack[-1][0] != mark[1:]:
                return None
            stack.pop()
        else:
            loop, _, index = mark.partition(":")
            stack.append((loop, int(index)))
    text = "".join(texts)
    return None if BEGIN in text or END in text else Marked(text, runs, blocks)
