"""Requests to teacher services that `decant serve` offers: each shows its card."""

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.http.messages import (
    TEACHER_PATH,
    MessageError,
    TeacherCard,
    differing,
)
from decant.teacher_dump.engines.remote.client import Client, Endpoint
from decant.teacher_dump.engines.seam import EngineError, Unavailable


class TeacherClient(Client):
    """The services of one teacher; made and used within a running event loop."""

    def __init__(self, config: TeacherConfig, fingerprint: str = "", max_length: int = 0) -> None:
        """Nothing is asked yet; the teacher must have this fingerprint, if one is given.

        Every service must score sequences of `max_length` tokens.
        """
        super().__init__(config, kind="teacher service")
        self._dtype, self._fingerprint = config.dtype, fingerprint
        self._max_length = max_length
        self._card: TeacherCard | None = None

    async def connect(self) -> TeacherCard:
        """The card of the teacher, which all services that answer now must share.

        Waits for the first one. Raises EngineError.
        """
        await self.greet()
        if self._card is None:
            await self.ask("GET", TEACHER_PATH)
        assert self._card is not None
        return self._card

    async def meet(self, endpoint: Endpoint) -> None:
        """Check the endpoint's card. Raises Unavailable if it offers another teacher."""
        data = await self.attempt(endpoint, "GET", TEACHER_PATH)
        try:
            card = TeacherCard.from_bytes(data, endpoint.url)
        except MessageError as error:
            raise Unavailable(str(error)) from error
        found, dtype = card.teacher.fingerprint, card.teacher.dtype
        if self._fingerprint and found != self._fingerprint:
            raise Unavailable(
                f"{endpoint.url} offers teacher {card.teacher.name} with fingerprint {found}, "
                f"expected {self._fingerprint}"
            )
        if self._dtype not in ("auto", dtype.partition("+")[0]):
            raise Unavailable(
                f"{endpoint.url} computes with dtype {dtype}, teacher.dtype is {self._dtype}: "
                "leave it at auto, or serve the teacher with it"
            )
        if card.max_length < self._max_length:
            raise Unavailable(
                f"{endpoint.url} scores at most {card.max_length} tokens, sequences have up to "
                f"{self._max_length}: lower sequences.max_length, or serve with a larger max_length"
            )
        if self._card is None:
            self._card = card
            self._first = endpoint.url
        elif unlike := differing(self._card, card):
            raise Unavailable(
                f"{self._first} and {endpoint.url} offer different teachers: {'; '.join(unlike)}"
            )

    def refusal(self, url: str, status: int, text: str) -> EngineError:
        """What is no service has no such path; a service says what it does not like."""
        if status in (404, 405) or 300 <= status < 400:
            return Unavailable(f"{url} is not a teacher service (status {status}: {text})")
        return EngineError(f"{url} refuses a request (status {status}): {text}")
