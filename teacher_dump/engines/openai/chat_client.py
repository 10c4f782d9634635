"""Answers of a chat API: several in flight, each handed on as soon as it is there.

What an API refuses for one prompt is that prompt's problem; keys, quotas and another model behind
the same name end the job.
"""

import concurrent.futures
import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.openai.answers import AnswerError
from decant.teacher_dump.engines.openai.chat_answers import Answer, Asked, read_answer, refused
from decant.teacher_dump.engines.openai.chat_look import ChatCard, look
from decant.teacher_dump.engines.openai.client import MAX_SCORE_BYTES, QUOTA
from decant.teacher_dump.engines.openai.probe import Refused
from decant.teacher_dump.engines.openai.token_ids import TokenIds
from decant.teacher_dump.engines.remote.client import Client, Endpoint
from decant.teacher_dump.engines.remote.loop import EventLoop
from decant.teacher_dump.engines.seam import EngineError, Unavailable

log = logging.getLogger(__name__)

PATH = "/v1/chat/completions"
OF_ONE_PROMPT = (400, 413, 422)
"""Statuses with which a prompt is refused, too long or against a provider's rules."""


class ChatClient(Client):
    """The endpoints of one chat API; made and used within a running event loop."""

    def __init__(
        self, config: TeacherConfig, ids: TokenIds, body: dict[str, Any], plain: Asked
    ) -> None:
        """Nothing is asked yet; `plain` and `body` as in `chat_look.look`."""
        super().__init__(config, kind="chat API", headers={"Content-Type": "application/json"})
        self._model, self._ids, self._body, self._plain = config.model, ids, body, plain
        self.card: ChatCard | None = None
        self._first = ""
        self._seen: set[str] = set()

    def base_url(self, url: str) -> str:
        """Without the `/v1` that such URLs often end with."""
        return url.rstrip("/").removesuffix("/v1")

    async def connect(self) -> ChatCard:
        """What the first endpoint is. Raises EngineError."""
        await self.greet()
        if self.card is None:  # none was there
            with contextlib.suppress(Refused):  # some have no list of models
                await self.ask("GET", "/v1/models")
        assert self.card is not None
        return self.card

    async def answer(self, asked: Asked) -> Answer:
        """The answer to one prompt. Raises EngineError."""
        assert self.card is not None
        body = asked.request(self.card.form, self.card.model, self.card.max_entries)
        try:
            data = await self.ask("POST", PATH, json.dumps(body).encode(), most=MAX_SCORE_BYTES)
        except Refused as error:
            if error.status not in OF_ONE_PROMPT:
                raise Unavailable(str(error)) from error
            return refused(str(error))
        try:
            found = read_answer(_parsed(data), self.card.form, self._ids)
        except AnswerError as error:
            raise EngineError(f"a chat API: {error}") from error
        if found.model != self.card.answers_as:
            raise Unavailable(
                f"{self.card.model} answers as {found.model or 'nobody'} now, and as "
                f"{self.card.answers_as or 'nobody'} before: it is another teacher; name the "
                "version in teacher.model"
            )
        if found.system_fingerprint not in self._seen:
            self._seen.add(found.system_fingerprint)
            log.info(
                "%s answers with system_fingerprint %s",
                self.card.name,
                found.system_fingerprint or "unsaid",
            )
        return found

    async def meet(self, endpoint: Endpoint) -> None:
        """Look at an endpoint. Raises Unavailable if it is of no use, or of another teacher."""

        async def ask(body: dict[str, Any]) -> Any:
            data = await self.attempt(
                endpoint, "POST", PATH, json.dumps(body).encode(), MAX_SCORE_BYTES
            )
            return _parsed(data)

        if endpoint.met_at:  # it is paid by the token, and every answer names its model
            return
        try:
            card = await look(ask, endpoint.url, self._model, self._ids, self._body, self._plain)
        except (AnswerError, Refused) as error:
            raise Unavailable(f"{endpoint.url}: {error}") from error
        if self.card is None:
            self.card, self._first = card, endpoint.url
        elif (card.answers_as, card.form) != (self.card.answers_as, self.card.form) or (
            card.max_entries < self.card.max_entries
        ):
            raise Unavailable(
                f"{self._first} and {endpoint.url} offer different teachers: "
                f"{self.card.name} and {card.name}, {self.card.max_entries} and "
                f"{card.max_entries} entries per token"
            )

    def refusal(self, url: str, status: int, text: str) -> EngineError:
        """Whether it ends the job is for whoever asked to say."""
        return Refused(f"{url} refuses a request (status {status}): {text}", status)

    def overload(self, url: str, text: str) -> None:
        """A quota that is used up does not come back by waiting."""
        if QUOTA in text:
            raise Unavailable(f"{url}: {text}")


class ChatTeacher:
    """A teacher behind a chat API that has been looked at."""

    def __init__(
        self,
        config: TeacherConfig,
        tokenizer: Any,
        vocab_size: int,
        *,
        body: dict[str, Any] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        """Connect. Raises EngineError if the API is of no use."""
        self._loop = EventLoop()
        self._num_ahead = config.requests * len(config.endpoints)
        plain = Asked(body={}, max_new_tokens=1, seed=0, temperature=temperature, top_p=top_p)
        try:
            ids = TokenIds(tokenizer, vocab_size)
            self._client = self._loop.call(_open(config, ids, body or {}, plain))
            self.card = self._loop.call(self._client.connect())
        except BaseException:
            self.close()
            raise

    def answers(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Answer]]:
        """The answer to each, with its place, in the order in which they come.

        Raises EngineError when all that was asked for has been handed on.
        """
        waiting = iter(enumerate(asked))
        flying: dict[Future[Answer], int] = {}
        error: EngineError | None = None
        try:
            while True:
                while error is None and len(flying) < self._num_ahead:
                    if (following := next(waiting, None)) is None:
                        break
                    flying[self._loop.start(self._client.answer(following[1]))] = following[0]
                if not flying:
                    break
                done, _ = concurrent.futures.wait(
                    flying, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    place = flying.pop(future)
                    try:
                        found = future.result()
                    except EngineError as raised:
                        error = error or raised
                        continue
                    yield place, found
        finally:
            for future in flying:
                future.cancel()
        if error is not None:
            raise error

    def close(self) -> None:
        """Drop all connections; calling it again does no harm."""
        if hasattr(self, "_client") and self._loop.is_running:
            self._loop.call(self._client.close())
        self._loop.close()


def describe_chat(config: TeacherConfig, tokenizer: Any, vocab_size: int) -> ChatCard:
    """What an API says of its teacher. Raises EngineError."""
    teacher = ChatTeacher(config, tokenizer, vocab_size)
    teacher.close()
    return teacher.card


async def _open(
    config: TeacherConfig, ids: TokenIds, body: dict[str, Any], plain: Asked
) -> ChatClient:
    return ChatClient(config, ids, body, plain)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise AnswerError(f"its answer is no JSON: {error}") from error
