"""A chat template that says, of what it renders, which message each character comes from.

Between the nodes of the parsed template it puts marks: where an iteration over the messages begins
and ends, and where a {% generation %} block does. The marks are rendered along, read and taken out
again. A template that keeps what it renders (in a macro, in a variable) may look at marks in it, so
then the caller compares with the text that it renders without them.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
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
    is_sure: bool
    """No mark was where the template may have looked at it."""

    def runs_of(self, index: int) -> list[Span]:
        """The characters of one message that no other message inside it renders."""
        return [span for message, span in self.runs if message == index]


def render_marked(
    source: str, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> Marked | None:
    """What the template renders, with its origins; None if the messages themselves hold marks.

    Raises what the template raises. `variables` is all it gets besides the messages.
    """
    marker = _Marker(messages)
    rendered = _compiled(source).template.render(messages=messages, **{MARKER: marker}, **variables)
    if marker.is_sure and len(MARK.findall(rendered)) != marker.count:
        return None
    return _read(rendered, marker.is_sure)


def has_blocks(source: str) -> bool:
    """Whether the template has {% generation %} blocks (comments may speak of them)."""
    return "generation" in source and _compiled(source).has_blocks


class _Marker:
    """What the template calls; at most one message is open per loop."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._indices = {id(message): index for index, message in enumerate(messages)}
        self._open: dict[int, int] = {}
        self.is_sure = True
        self.count = 0

    def begin(self, is_kept: bool, loop: int, item: Any) -> str:
        """Mark the start of an iteration over an item, if that is a message."""
        ended = self.end(is_kept, loop)
        index = self._indices.get(id(item))
        if index is None:
            return ended
        self._open[loop] = index
        return ended + self._mark(is_kept, f"{loop}:{index}")

    def assign(self, is_kept: bool, loop: int, item: Any) -> str:
        """Mark the same where an iteration over numbers looks its message up."""
        return "" if loop in self._open else self.begin(is_kept, loop, item)

    def end(self, is_kept: bool, loop: int) -> str:
        """Mark the end of the iteration, if a message is open."""
        return "" if self._open.pop(loop, None) is None else self._mark(is_kept, f"/{loop}")

    def block(self, is_kept: bool, mark: str) -> str:
        """Mark the edge of a generation block."""
        return self._mark(is_kept, mark)

    def _mark(self, is_kept: bool, mark: str) -> str:
        self.is_sure &= not is_kept
        self.count += 1
        return f"{BEGIN}{mark}{END}"


class _Marks(NodeTransformer):
    """Puts the marks; knows whether what a node renders is kept first."""

    def __init__(self) -> None:
        self._loops: list[int] = []
        self._count = 0
        self._is_kept = False

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self._count += 1
        loop = nodes.Const(self._count)
        self._loops.append(self._count)
        self.generic_visit(node)
        self._loops.pop()
        if isinstance(node.target, nodes.Name):
            node.body.insert(0, self._call("begin", loop, nodes.Name(node.target.name, "load")))
        node.body.append(self._call("end", loop))
        return [node, self._call("end", loop)]  # after {% continue %} or {% break %}

    def visit_Assign(self, node: nodes.Assign) -> Any:
        if not self._loops or not isinstance(node.target, nodes.Name):
            return node
        looked_up = nodes.Name(node.target.name, "load")
        return [node, self._call("assign", nodes.Const(self._loops[-1]), looked_up)]

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        edge = node.nodes[0] if len(node.nodes) == 1 else None
        if isinstance(edge, nodes.TemplateData) and edge.data in (BLOCK_BEGIN, BLOCK_END):
            return self._call("block", nodes.Const(edge.data[1:-1]))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        loops, self._loops = self._loops, []
        self._visit_kept(node)
        self._loops = loops
        return node

    def _visit_kept(self, node: nodes.Node) -> nodes.Node:
        was_kept, self._is_kept = self._is_kept, True
        self.generic_visit(node)
        self._is_kept = was_kept
        return node

    visit_AssignBlock = visit_FilterBlock = visit_CallBlock = _visit_kept

    def _call(self, method: str, *arguments: nodes.Expr) -> nodes.Output:
        given = [nodes.Const(self._is_kept), *arguments]
        marker = nodes.Name(MARKER, "load")  # as a filter: a call would pass the sandbox's checks
        return nodes.Output([nodes.Filter(marker, f"{MARKER}_{method}", given, [], None, None)])


class _Generation(Extension):
    """{% generation %}: what is inside, between marks."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [
            nodes.Output([nodes.TemplateData(BLOCK_BEGIN)], lineno=line),
            nodes.Scope(body, lineno=line),
            nodes.Output([nodes.TemplateData(BLOCK_END)], lineno=line),
        ]


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
    for method in (_Marker.begin, _Marker.assign, _Marker.end, _Marker.block):
        environment.filters[f"{MARKER}_{method.__name__}"] = method
    parsed = environment.parse(source)
    blocks = any(data.data == BLOCK_BEGIN for data in parsed.find_all(nodes.TemplateData))
    marked = _Marks().visit(parsed).set_lineno(1).set_environment(environment)
    return _Compiled(environment.from_string(marked), blocks)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _read(rendered: str, is_sure: bool) -> Marked | None:
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
    return None if BEGIN in text or END in text else Marked(text, runs, blocks, is_sure)
