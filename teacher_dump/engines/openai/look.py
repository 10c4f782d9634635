"""Look at a stock server before it is believed: how it is asked, how much it gives, who it is.

A probe is a short fixed text. What the server says of it must be of our tokens, lie in their rows,
and be probabilities over the whole vocabulary; the log probs of its tokens are the teacher's
fingerprint. Knows no endpoints: `ask` sends one request to the server that is looked at.
"""

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.teacher_dump.engines.openai.answers import (
    AnswerError,
    NotFinite,
    TokenEntries,
    top_entries,
)
from decant.teacher_dump.engines.openai.api import Api, Form, member
from decant.teacher_dump.engines.openai.probe import Probe, Refused, ServerCard
from decant.teacher_dump.engines.remote.client import Lost
from decant.teacher_dump.engines.seam import Unavailable

log = logging.getLogger(__name__)

FITTING_SHARE = 0.9
"""Of the probe's tokens whose text must be the tokenizer's: servers write some otherwise."""
SAME_NATS = 0.3
"""How far two answers for the same place may lie apart."""
RENORMALISED_NATS = 0.02
"""By how much the best log prob may change with the number of entries asked for, in the median."""
NO_TAIL = 1e-5
"""If nowhere more than this is left, the entries have been renormalised."""

Ask = Callable[[str, str, dict[str, Any] | None], Awaitable[Any]]
"""Method, path and body of a request; the answer's JSON."""


class Looker:
    """Looks at one server."""

    def __init__(self, ask: Ask, url: str, probe: Probe) -> None:
        """Nothing is asked yet."""
        self._ask, self._url, self._probe = ask, url, probe

    async def find(self, api: str, model: str) -> tuple[Api, ServerCard]:
        """How the server is asked and what it is. Raises Unavailable, naming what is wrong."""
        named, entry = await self._served(model)
        way, form = await self._way(api, named)
        card = ServerCard(
            api=way.name,
            form=form,
            root=str(entry.get("root") or ""),
            version=await self._version(way.name),
            max_length=_max_length(entry),
            max_entries=0,
            limit="",
            values=(),
        )
        most, limit = await self._limit(way, form)
        return way, dataclasses.replace(card, max_entries=most, limit=limit)

    async def check(self, way: Api, card: ServerCard) -> None:
        """Raise Unavailable unless rows, tokens and probabilities are what they must be."""
        form, k = card.form, min(card.max_entries, 32)
        await self._check_tokenizer(way, form)
        await self._check_rows(way, form, min(k, 8))
        await self._check_masses(way, form, k)

    async def values(self, way: Api, form: Form) -> tuple[float, ...]:
        """The log probs of the probe's tokens."""
        rows = await self._rows(way, form, self._probe.ids(form), 1)
        return tuple(float(value) for value in _labels(rows, self._probe.vocab_size))

    async def gives(self, way: Api, form: Form, k: int) -> bool:
        """Whether it gives so many entries per token."""
        return await self._count(way, form, k) >= k

    async def _served(self, model: str) -> tuple[str, dict[str, Any]]:
        """The model's name at the server, and what the server lists of it."""
        try:
            listed = await self._ask("GET", "/v1/models", None)
            entries = [e for e in member(listed, "data") if isinstance(e, dict)]
        except (AnswerError, Refused, TypeError):
            entries = []
        names = [str(entry.get("id")) for entry in entries]
        if model and model not in names and names:
            raise Unavailable(
                f"{self._url} serves {', '.join(names)}; teacher.model is {model}: name one of them"
            )
        if not model and len(names) > 1:
            raise Unavailable(
                f"{self._url} serves {', '.join(names)}: set teacher.model to one of them"
            )
        name = model or (names[0] if names else "")
        return name, entries[names.index(name)] if name in names else {}

    async def _way(self, api: str, model: str) -> tuple[Api, Form]:
        """The first way of asking that the server answers as it should."""
        problems, lost, answers = [], None, False
        for way in self._probe.apis(api):
            for form in way.forms(model, self._probe.begins):
                try:
                    await self.values(way, form)
                    return way, form
                except Lost as error:
                    if not error.is_there:
                        raise
                    lost = error
                    problems.append(f"{_described(way, form)}: {error}")
                except (AnswerError, Refused) as error:
                    answers = answers or isinstance(error, AnswerError)
                    problems.append(f"{_described(way, form)}: {error}")
        if lost is not None and not answers:  # a server that fails may do better later
            raise lost
        hint = "" if api == "auto" else f" (teacher.api: {api})"
        raise Unavailable(
            f"{self._url} does not give log probs of a prompt's tokens{hint}. "
            + "; ".join(dict.fromkeys(problems))
        )

    async def _limit(self, way: Api, form: Form) -> tuple[int, str]:
        """The most entries per token that it gives, and what would raise them."""
        low, high = 1, min(way.most_entries, self._probe.vocab_size)
        count = await self._count(way, form, high)
        if count >= high:
            return high, ""
        if count:  # it cuts without a word
            return count, way.raises_limit
        high -= 1
        while low < high:
            middle = (low + high + 1) // 2
            if await self.gives(way, form, middle):
                low = middle
            else:
                high = middle - 1
        return low, way.raises_limit

    async def _count(self, way: Api, form: Form, k: int) -> int:
        """Entries of a token if so many are asked for; 0 if that is refused."""
        try:
            rows = await self._rows(way, form, self._probe.ids(form), k)
        except Refused:
            return 0
        count = max(len(entries.top) for entries in rows if entries is not None)
        # Where texts name tokens, several of one text are one entry: no limit, but refused later.
        return k if way.name == "completions" and 2 * count >= k else min(count, k)

    async def _version(self, api: str) -> str:
        path = {"vllm": "/version", "sglang": "/server_info"}.get(api)
        if path is None:
            return ""
        try:
            return str(member(await self._ask("GET", path, None), "version"))
        except (AnswerError, Refused, Lost):
            return ""

    async def _check_tokenizer(self, way: Api, form: Form) -> None:
        """Compare ids with the server's own tokenizer, or texts where it has no such path."""
        if way.name == "completions":  # texts are compared wherever they come
            return
        body = {"prompt": self._probe.text, "add_special_tokens": False}
        if form.model:
            body["model"] = form.model
        ours = self._probe.encoded()
        try:
            theirs = member(await self._ask("POST", "/tokenize", body), "tokens")
        except (AnswerError, Refused):
            return await self._check_texts(way, form)
        if not isinstance(theirs, list):
            return await self._check_texts(way, form)
        if theirs != ours:
            at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), -1)
            raise Unavailable(
                f"{self._url} has another tokenizer than teacher.tokenizer: of {self._probe.text!r}"
                f" it makes {len(theirs)} tokens, here are {len(ours)}; they differ from token {at}"
                f" on ({theirs[at : at + 3]} there, {ours[at : at + 3]} here)"
            )
        return None

    async def _check_texts(self, way: Api, form: Form) -> None:
        ids = self._probe.ids(form)
        answer = await self._ask("POST", way.path, way.request(form, ids, 1))
        texts = way.texts(answer)
        if texts is None or len(texts) != len(ids) - 1:
            log.warning(
                "%s says nothing by which teacher.tokenizer can be verified: no /tokenize, and no "
                "texts of tokens",
                self._url,
            )
            return
        fits = [self._probe.texts.fits(t, int(i)) for t, i in zip(texts, ids[1:], strict=True)]
        if np.mean(fits) < FITTING_SHARE:
            at = fits.index(False)
            raise Unavailable(
                f"{self._url} has another tokenizer than teacher.tokenizer: id {ids[1 + at]} is "
                f"{texts[at]!r} there"
            )

    async def _check_rows(self, way: Api, form: Form, k: int) -> None:
        """What is said of a token depends on those before it, and not on the token itself."""
        swaps = [await self._last(way, form, ids, k) for ids in self._probe.swaps(form)]
        if not swaps or not all(swaps):
            log.warning("%s: no probe tells whether its rows are shifted", self._url)
            return
        one, other, after_one, after_other = swaps
        if _apart(one, other) > SAME_NATS:
            raise Unavailable(
                f"{self._url} says of a token what it should say of the next: its rows are shifted "
                "by one (llama-cpp-python's are, for models without a beginning token)"
            )
        if _apart(after_one, after_other) == 0:
            raise Unavailable(
                f"{self._url} says of a token what does not depend on the one before: its rows are "
                "shifted by one"
            )

    async def _check_masses(self, way: Api, form: Form, k: int) -> None:
        """The log probs are over the whole vocabulary, however many are asked for."""
        if k == 1:
            return
        ids = self._probe.ids(form)
        few, many = [
            [_values(entries) for entries in (await self._rows(way, form, ids, number))[1:]]
            for number in (1, k)
        ]
        moved = np.median([abs(a[0] - b[0]) for a, b in zip(few, many, strict=True)])
        left = max(1 - np.exp(row).sum() for row in many)
        if moved > RENORMALISED_NATS or (k < self._probe.vocab_size and left < NO_TAIL):
            raise Unavailable(
                f"{self._url} renormalises: its probabilities sum to 1 over the {k} entries asked "
                "for, so that nothing is known of all others"
            )

    async def _last(self, way: Api, form: Form, ids: NDArray[np.int32], k: int) -> dict[int, float]:
        """The most probable in place of the last token; those without an id are left out."""
        entries = (await self._rows(way, form, ids, k))[-1]
        if entries is None:
            return {}
        last_kept = _values(entries)[:k][-1]  # behind it comes the actual token alone
        return {
            index: value
            for index, value in entries.top
            if not isinstance(index, str) and value >= last_kept
        }

    async def _rows(
        self, way: Api, form: Form, ids: NDArray[np.int32], k: int
    ) -> list[TokenEntries | None]:
        answer = await self._ask("POST", way.path, way.request(form, ids, k))
        return way.rows(form, answer, ids)


def _labels(rows: list[TokenEntries | None], vocab_size: int) -> NDArray[np.float32]:
    """The log probs of the actual tokens; of token 1 a server may say nothing."""
    wanted = np.arange(len(rows)) > 0
    return top_entries(rows, wanted, 0, vocab_size).label_logprob[1:]


def _values(entries: TokenEntries | None) -> NDArray[np.float64]:
    """The log probs of the most probable ones, the best first."""
    values = [] if entries is None else [value for _, value in entries.top]
    if not values or not all(isinstance(value, float | int) for value in values):
        raise NotFinite("it gives no numbers for the most probable tokens")
    return -np.sort(-np.array(values, np.float64))


def _described(way: Api, form: Form) -> str:
    if way.name != "completions":
        return way.name
    return f"completions of {'text' if form.sends_text else 'ids'}"


def _max_length(entry: dict[str, Any]) -> int:
    """Of sequences: one token is sampled behind them."""
    length = entry.get("max_model_len")
    return max(0, length - 1) if type(length) is int else 0


def _apart(one: dict[int, float], other: dict[int, float]) -> float:
    """How far two rows are apart on what they share, in nats; infinite if that is too little."""
    shared = one.keys() & other.keys()
    if 2 * len(shared) < len(one):
        return float("inf")
    return max(abs(one[index] - other[index]) for index in shared)
