"""Requests to stock servers of one teacher: each is looked at before it gets work.

An endpoint that was away is asked for its probe again, and one that is there from time to time: a
server can be started anew with another model behind the same name.
"""

import dataclasses
import json
from typing import Any

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.openai.answers import AnswerError
from decant.teacher_dump.engines.openai.api import Api, Form
from decant.teacher_dump.engines.openai.fingerprint import difference, fingerprint_of
from decant.teacher_dump.engines.openai.look import Looker
from decant.teacher_dump.engines.openai.probe import Probe, Refused, ServerCard
from decant.teacher_dump.engines.remote.client import Client, Endpoint
from decant.teacher_dump.engines.remote.texts import parsed, shown
from decant.teacher_dump.engines.seam import EngineError, Unavailable

QUOTA = "insufficient_quota"
"""What hosted APIs say with status 429 when waiting does not help."""

MAX_SCORE_BYTES = 1 << 30
"""Of an answer: a thousand entries for each of ten thousand tokens take about so many as text."""


class ServerClient(Client):
    """The servers of one teacher; made and used within a running event loop."""

    meets_again_after = 300.0

    def __init__(
        self, config: TeacherConfig, probe: Probe, *, fingerprint: str = "", k: int = 1
    ) -> None:
        """Nothing is asked yet; the teacher must have this fingerprint, if one is given.

        Every server must give `k` entries per token.
        """
        super().__init__(config, kind="server", headers={"Content-Type": "application/json"})
        self._probe, self._api, self._model = probe, config.api, config.model
        self._fingerprint, self._k = fingerprint, k
        self._way: Api | None = None
        self._card: ServerCard | None = None
        self._first = ""
        self._checked: set[str] = set()

    def base_url(self, url: str) -> str:
        """Without the `/v1` that such URLs often end with: not all paths are below it."""
        return url.rstrip("/").removesuffix("/v1")

    async def connect(self) -> tuple[Api, ServerCard]:
        """How the servers are asked, and what the first says of the teacher. Raises EngineError."""
        await self.greet()
        if self._card is None:
            await self.ask("GET", "/v1/models")
        assert self._card is not None and self._way is not None
        return self._way, self._card

    async def score(self, body: dict[str, Any]) -> Any:
        """The answer to a request of the teacher's API. Raises EngineError."""
        assert self._way is not None
        try:
            data = await self.ask(
                "POST", self._way.path, json.dumps(body).encode(), most=MAX_SCORE_BYTES
            )
        except Refused as error:
            if error.status in (404, 405) or error.status < 400:  # no more what it was
                raise Unavailable(str(error)) from error
            raise
        return _parsed(data, "a server")

    async def meet(self, endpoint: Endpoint) -> None:
        """Look at a server. Raises Unavailable if it is none, or of another teacher."""

        async def ask(method: str, path: str, body: dict[str, Any] | None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            answer = await self.attempt(endpoint, method, path, data, MAX_SCORE_BYTES)
            return _parsed(answer, endpoint.url)

        try:
            await self._look(Looker(ask, endpoint.url, self._probe), endpoint.url)
        except (AnswerError, Refused) as error:
            raise Unavailable(f"{endpoint.url}: {error}") from error

    async def _look(self, looker: Looker, url: str) -> None:
        known = self._card
        if known is None or url not in self._checked:
            api = self._api if known is None else known.api
            way, card = await looker.find(api, self._model or _name(known))
            await self._check_entries(looker, url, way, card)
            await looker.check(way, card)
        else:
            assert self._way is not None
            way, card = self._way, known
        card = dataclasses.replace(card, values=await looker.values(way, card.form))
        self._compare(url, card)
        self._checked.add(url)
        if self._card is None:
            self._way, self._card, self._first = way, card, url

    def refusal(self, url: str, status: int, text: str) -> EngineError:
        """Whether it ends the job is for whoever asked to say."""
        return Refused(f"{url} refuses a request (status {status}): {text}", status)

    def overload(self, url: str, text: str) -> None:
        """A quota that is used up does not come back by waiting."""
        if QUOTA in text:
            raise Unavailable(f"{url}: {text}")

    async def _check_entries(self, looker: Looker, url: str, way: Api, card: ServerCard) -> None:
        if self._k <= card.max_entries:
            return
        if card.limit:
            raise Unavailable(
                f"{url} gives at most {card.max_entries} entries per token, {self._k} are wanted: "
                f"lower truncation.k, or {card.limit.format(k=self._k)}"
            )
        if not await looker.gives(way, card.form, self._k):
            raise Unavailable(
                f"{url} does not give {self._k} entries per token: lower truncation.k, or "
                f"{way.raises_limit.format(k=self._k)}"
            )

    def _compare(self, url: str, card: ServerCard) -> None:
        """Raise Unavailable if this is not the teacher that is meant."""
        if self._fingerprint and (unlike := difference(self._fingerprint, card.fingerprint)):
            raise Unavailable(f"{url} offers another teacher ({card.name}) than before: {unlike}")
        known = self._card
        if known is None:
            return
        same_form = _asked(known.form) == _asked(card.form)
        unlike = difference(fingerprint_of(list(known.values)), card.fingerprint)
        if not same_form or unlike:
            raise Unavailable(
                f"{self._first} and {url} offer different teachers: "
                f"{unlike or 'they are asked in different ways'}"
            )


def _name(card: ServerCard | None) -> str:
    return "" if card is None else card.form.model


def _asked(form: Form) -> tuple[Any, ...]:
    return form.model, form.sends_text, form.names_ids, form.begins


def _parsed(data: bytes, where: str) -> Any:
    try:
        return parsed(data, finite=False)  # servers write -Infinity for what has no mass
    except ValueError as error:
        raise Refused(f"{where} answers with what is no JSON: {shown(error)}", 200) from error
