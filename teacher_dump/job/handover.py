"""The queue between the scoring and the writing thread."""

import threading
from collections import deque
from collections.abc import Iterator

from decant.schemas import ScoredSequence
from decant.teacher_dump.job.isolate import Rejection

Result = ScoredSequence | Rejection


BYTES_WAITING = 256 << 20
"""Scored sequences of a shard that may wait for its writing thread, in bytes; one always may."""


class _Abandoned(Exception):
    """Scoring broke off, so the shard is not to be committed."""


class _Waiting:
    """A queue from the scoring thread to the writing one, bounded by bytes."""

    def __init__(self) -> None:
        self._items: deque[tuple[Result, int]] = deque()
        self._bytes = 0
        self._state = "open"  # or: finished, abandoned, refused
        self._changed = threading.Condition()

    def put(self, item: Result, size: int) -> bool:
        """Append, once there is room; False if the reader is gone."""
        with self._changed:
            while self._items and self._bytes + size > BYTES_WAITING and self._state == "open":
                self._changed.wait()
            self._items.append((item, size))
            self._bytes += size
            self._changed.notify()
            return self._state == "open"

    def finish(self) -> None:
        """Nothing comes any more."""
        self._end("finished")

    def abandon(self) -> None:
        """The reader shall give up, whatever is left."""
        self._end("abandoned")

    def refuse(self) -> None:
        """The reader is gone."""
        self._end("refused")

    def _end(self, state: str) -> None:
        with self._changed:
            if self._state != "abandoned":
                self._state = state
            self._changed.notify()

    def __iter__(self) -> Iterator[Result]:
        while True:
            with self._changed:
                while not self._items and self._state == "open":
                    self._changed.wait()
                if self._state == "abandoned":
                    raise _Abandoned
                if not self._items:
                    return
                item, size = self._items.popleft()
                self._bytes -= size
                self._changed.notify()
            yield item
