"""What a terminal can show: widths, escaped text, sizes, progress, JSON."""

import json
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr of a terminal while the block runs; gives `progress(done, total)`."""
    with tqdm(desc=name, unit=f" {unit}", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield progress


def json_text(value: object) -> str:
    """A value as the JSON that `--json` prints. Raises ValueError for NaN and infinities."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in text)


def escaped(text: str) -> str:
    """Text on one line: line breaks and what a terminal would obey are escaped as in Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escaped_lines(text: str) -> str:
    """The same with its line breaks as they are."""
    return "\n".join(escaped(line) for line in text.split("\n"))


def _json_escape(c: str) -> str:
    return json.dumps(c)[1:-1]


def width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(_columns(c) for c in text)


def fit(text: str, columns: int, *, right: bool = False) -> str:
    """Exactly this many columns of a text: its start, or its end if `right`, then spaces.

    What a terminal would obey is escaped.
    """
    text = escaped(text)
    total = width(text)
    if total <= columns:
        return text + " " * (columns - total)
    kept, left = [], columns - 1
    for c in reversed(text) if right else text:
        left -= _columns(c)
        if left < 0:
            break
        kept.append(c)
    cut = "…" + "".join(reversed(kept)) if right else "".join(kept) + "…"
    return cut + " " * (columns - width(cut))


def _columns(c: str) -> int:
    if unicodedata.combining(c):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


WIDTH = 100


def megabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def clip(text: str, columns: int = WIDTH) -> str:
    """At most this many columns of a text, on one line, escaped."""
    return fit(" ".join(text.split()), columns).rstrip()
