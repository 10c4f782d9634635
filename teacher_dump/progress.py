"""How far something long has come: a bar on a terminal, elsewhere a line in the log each minute.

While a bar is drawn, the log's lines appear above it.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
"""Between two lines where there is no terminal."""
PAUSE_SECONDS = 1.0
"""So long without news, and what comes next is a burst: a window of batches that is done at once.
In the middle of one the rate says nothing: what is done has yet to be counted."""


class Progress:
    """What is done so far."""

    def __init__(
        self, what: str, unit: str, total: int | None, initial: int, bar: tqdm | None, every: float
    ) -> None:
        """See `progress`."""
        self.done = self._initial = initial
        self._what, self._unit, self._total, self._bar = what, unit, total, bar
        self._every, self._note = every, ""
        self._start = self._said = self._burst = self._last = time.monotonic()

    def add(self, number: int) -> None:
        """So much more is done."""
        self.to(self.done + number)

    def to(self, done: int, total: int | None = None) -> None:
        """So much is done, of a total that may only be known now."""
        self._total = self._total if total is None else total
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.update(done - self.done)
            self.done = done
            return
        now, pause = time.monotonic(), min(PAUSE_SECONDS, self._every)
        due = now - self._said >= self._every
        if 0 < pause < now - self._last:
            if due and self.done > self._initial:
                self._say(self._last)  # of the burst before, at its end
            self._burst, due = now, False
        self.done, self._last = done, now
        if due and now - self._burst >= pause:
            self._say(now)

    def note(self, text: str) -> None:
        """Something to say beside the numbers, from now on."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def _say(self, at: float) -> None:
        """Log what was done at a time."""
        self._said = time.monotonic()
        log.info("%s", self._line(at))

    def _line(self, at: float) -> str:
        rate = (self.done - self._initial) / max(1e-9, at - self._start)
        text = f"{self._what}: {self.done:,}"
        if self._total:
            text += f" of {self._total:,} {self._unit} ({self.done / self._total:.0%})"
        else:
            text += f" {self._unit}"
        text += f", {rate:,.0f} {self._unit}/s" if rate >= 10 else f", {rate:.2g} {self._unit}/s"
        if self._total and rate:
            text += f", {duration((self._total - self.done) / rate)} left"
        return f"{text}; {self._note}" if self._note else text


@contextlib.contextmanager
def progress(
    what: str,
    unit: str,
    *,
    total: int | None = None,
    initial: int = 0,
    keep: bool = True,
    every: float = EVERY_SECONDS,
) -> Iterator[Progress]:
    """Show how far `what` has come, in `unit`; the finished bar stays unless told not to `keep` it.

    Without a terminal, a line is logged `every` so many seconds, when something is done.
    """
    if not sys.stderr.isatty():
        yield Progress(what, unit, total, initial, None, every)
        return
    with (
        tqdm(
            desc=what,
            total=total,
            initial=initial,
            unit=f" {unit}",
            unit_scale=True,
            leave=keep,
        ) as bar,
        _logged_above(),
    ):
        yield Progress(what, unit, total, initial, bar, every)


def duration(seconds: float) -> str:
    """A length of time for a person."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} s"


class _Above:
    """A stream whose text appears above the bars."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self._stream, end="")

    def flush(self) -> None:
        self._stream.flush()


@contextlib.contextmanager
def _logged_above() -> Iterator[None]:
    """What the log writes to the terminal appears above the bars."""
    changed = []
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in (
            sys.stderr,
            sys.stdout,
        ):
            changed.append((handler, handler.setStream(_Above(handler.stream))))
    try:
        yield
    finally:
        for handler, stream in changed:
            handler.setStream(stream)
