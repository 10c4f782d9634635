"""Room for a bounded amount of something: under pressure what has been there longest gives way.

A slow client costs nothing while there is room for all; when there is none, others come first.
Everything runs in one asyncio event loop.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


class Full(Exception):
    """There is no room, and nothing that gives way."""


@dataclass(slots=True, eq=False)
class Place:
    """What something takes of a room."""

    size: int
    leave: Callable[[], None]
    """Makes it give way."""
    yields_at: float
    """From when on it does so under pressure; infinity: never."""

    def yields_after(self, seconds: float) -> None:
        """It does so from now on in so many seconds."""
        self.yields_at = time.monotonic() + seconds


class Room:
    """At most `size` of something at a time."""

    def __init__(self, size: int) -> None:
        """It is empty."""
        self._size = size
        self._places: dict[Place, None] = {}  # in the order of their coming
        self._taken = 0

    def enter(self, size: int, leave: Callable[[], None], after: float) -> Place:
        """A place; under pressure it is told to `leave` once it is `after` seconds old.

        A single thing larger than the room has it for itself. Raises Full.
        """
        now = time.monotonic()
        missing = self._taken + size - self._size
        going = []
        for place in self._places:
            if missing <= 0:
                break
            if place.yields_at <= now:
                going.append(place)
                missing -= place.size
        if missing > 0 and len(going) < len(self._places):
            raise Full
        for place in going:
            self.free(place)
            place.leave()
        place = Place(size, leave, now + after)
        self._places[place] = None
        self._taken += size
        return place

    def free(self, place: Place) -> None:
        """Give a place up; doing it again does no harm."""
        if self._places.pop(place, self) is not self:
            self._taken -= place.size

    @contextlib.contextmanager
    def holding(self, size: int, leave: Callable[[], None], after: float) -> Iterator[Place]:
        """A place as long as this is held; see `enter`."""
        place = self.enter(size, leave, after)
        try:
            yield place
        finally:
            self.free(place)
