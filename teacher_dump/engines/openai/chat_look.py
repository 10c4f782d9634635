"""Look at a chat API before it is paid: how it is asked, how much it tells, who answers.

Three short requests: one token to find the form, a line with all entries that it gives, and one
more where sampling is not plain, to see whether log probs are of the model or of what is sampled.
Knows no endpoints: `ask` sends one request.
"""

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from decant.teacher_dump.engines.openai.answers import AnswerError
from decant.teacher_dump.engines.openai.chat_answers import (
    MOST_ENTRIES,
    Answer,
    Asked,
    ChatForm,
    read_answer,
)
from decant.teacher_dump.engines.openai.look import NO_TAIL
from decant.teacher_dump.engines.openai.probe import Refused
from decant.teacher_dump.engines.openai.token_ids import TokenIds
from decant.teacher_dump.engines.remote.client import Lost
from decant.teacher_dump.engines.seam import Unavailable

log = logging.getLogger(__name__)

QUESTION = "Write one line of nonsense verse about a ferry, eleven violins and the number 7."
PROBE_TOKENS = 16
LEAST_NAMED = 0.75
"""Share of the probe's entries that must have an id: else the tokenizer is another one."""

FORMS = (
    ChatForm(names_ids=True),
    ChatForm(names_ids=False),
    ChatForm(names_ids=False, limit="max_completion_tokens"),
)
"""To try, best first."""

Ask = Callable[[dict[str, Any]], Awaitable[Any]]
"""The body of a request; the answer's JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatCard:
    """What was found out about a chat API and who answers there."""

    model: str
    """Its name, as it is asked for."""
    answers_as: str
    """The name in its answers, which often says the version."""
    system_fingerprint: str
    form: ChatForm
    max_entries: int

    @property
    def name(self) -> str:
        """What a manifest calls the teacher."""
        as_other = self.answers_as not in ("", self.model)
        return f"{self.model} ({self.answers_as})" if as_other else self.model

    @property
    def fingerprint(self) -> str:
        """All by which the teacher is known: no API says more."""
        return f"chat:{self.model}:{self.answers_as}"


async def look(
    ask: Ask, url: str, model: str, ids: TokenIds, body: dict[str, Any], plain: Asked
) -> ChatCard:
    """What is behind a URL; `plain` says how answers are sampled, `body` what goes with each.

    Raises Unavailable, naming what is wrong.
    """
    probe = Asked(
        body={**body, "messages": [{"role": "user", "content": QUESTION}]},
        max_new_tokens=PROBE_TOKENS,
        seed=1,
    )
    form = await _form(ask, url, model, dataclasses.replace(probe, max_new_tokens=1))
    if not form.names_ids and not ids.keeps_spaces:
        raise Unavailable(
            f"{url} names tokens by their bytes, and teacher.tokenizer writes a lone token without "
            "the space before it, so that ids cannot be told: such a teacher needs a server that "
            "names ids (vLLM), or one that scores prompts (teacher.api: auto)"
        )
    answer, entries = await _most(ask, url, model, probe, form, ids)
    _check(url, answer, ids)
    if (plain.temperature, plain.top_p) != (1.0, 1.0):
        drawn = dataclasses.replace(probe, temperature=plain.temperature, top_p=plain.top_p)
        request = drawn.request(form, model, entries)
        other = read_answer(await _asked(ask, url, request), form, ids)
        _check_unscaled(url, answer, other, plain)
    return ChatCard(
        model=model,
        answers_as=answer.model,
        system_fingerprint=answer.system_fingerprint,
        form=form,
        max_entries=entries,
    )


async def _form(ask: Ask, url: str, model: str, probe: Asked) -> ChatForm:
    """The first form that is taken, and answered in kind."""
    problems = []
    lost: Lost | None = None
    for form in FORMS:
        try:
            answer = await ask(probe.request(form, model, 1))
        except Lost as error:  # some fail at what they do not know
            if not error.is_there:
                raise
            lost = error
            continue
        except Refused as error:
            if error.status == 404:
                raise Unavailable(f"{url} has no chat completions of {model}: {error}") from error
            problems.append(str(error))
            continue
        if form.names_ids and not _names_ids(answer):
            form = ChatForm(names_ids=False)
        return form
    if lost is not None:
        raise lost
    raise Unavailable(
        f"{url} refuses a chat completion with log probs: " + "; ".join(dict.fromkeys(problems))
    )


def _names_ids(answer: Any) -> bool:
    try:
        token = answer["choices"][0]["logprobs"]["content"][0]["token"]
    except (KeyError, IndexError, TypeError):
        return False
    return isinstance(token, str) and token.startswith("token_id:")


async def _most(
    ask: Ask, url: str, model: str, probe: Asked, form: ChatForm, ids: TokenIds
) -> tuple[Answer, int]:
    """The answer with as many entries as the API gives, and how many those are."""
    low, high = 1, MOST_ENTRIES
    found: Any = None
    wanted = high
    while low <= high:
        try:
            found = await ask(probe.request(form, model, wanted))
            low = wanted + 1
        except Refused as error:
            if wanted == 1:
                raise Unavailable(f"{url}: {error}") from error
            high = wanted - 1
        wanted = (low + high + 1) // 2
    try:
        answer = read_answer(found, form, ids)
    except AnswerError as error:
        raise Unavailable(f"{url}: {error}") from error
    if answer.problem:
        raise Unavailable(f"{url}, asked for a line of verse: {answer.problem}")
    listed = found["choices"][0]["logprobs"]["content"]  # an API may cut without a word
    return answer, min(low - 1, max(len(entry["top_logprobs"]) for entry in listed))


async def _asked(ask: Ask, url: str, request: dict[str, Any]) -> Any:
    try:
        return await ask(request)
    except Refused as error:
        raise Unavailable(f"{url} refuses source.generate's settings: {error}") from error


def _check(url: str, answer: Answer, ids: TokenIds) -> None:
    """Raise Unavailable for entries of another tokenizer, or that hold all mass by themselves."""
    named = sum(len(top) for top in answer.top_ids)
    if named < LEAST_NAMED * (named + answer.num_unnamed):
        raise Unavailable(
            f"{url} has another tokenizer than teacher.tokenizer: {answer.num_unnamed} of "
            f"{named + answer.num_unnamed} entries of its top_logprobs have no id there"
        )
    left = [
        1 - np.exp(top).sum() - mass
        for top, mass in zip(answer.top_logprobs, answer.unnamed_mass, strict=True)
    ]
    if max(map(len, answer.top_ids)) < ids.vocab_size and max(left) < NO_TAIL:
        raise Unavailable(
            f"{url} renormalises: its probabilities sum to 1 over the {len(answer.top_ids[0])} "
            "entries that it gives, so that nothing is known of all others"
        )


def _check_unscaled(url: str, plain: Answer, drawn: Answer, sampling: Asked) -> None:
    """Raise Unavailable if log probs change with how tokens are drawn.

    Those of the first token have the same context in both answers. What a temperature T divides has
    gaps between entries that are 1/T as wide; what is cut by top_p has entries of no probability.
    """
    if drawn.problem:
        raise Unavailable(f"{url}, asked for a line of verse: {drawn.problem}")
    one, other = (dict(zip(a.top_ids[0], a.top_logprobs[0], strict=True)) for a in (plain, drawn))
    shared = sorted(one.keys() & other.keys(), key=lambda index: -one[index])
    gaps, drawn_gaps = (np.ptp([row[i] for i in shared]) if shared else 0 for row in (one, other))
    cut = len(shared) < len(one) / 2
    ratio = drawn_gaps / gaps if gaps > 0 else 1.0
    scale = 1 / sampling.temperature if sampling.temperature else np.inf
    scaled = scale != 1 and np.log(max(ratio, 1e-6)) / np.log(min(scale, 4.0)) > 0.5
    if cut or scaled:
        raise Unavailable(
            f"{url} gives log probs of what it samples, not of the model: at temperature "
            f"{sampling.temperature:g} and top_p {sampling.top_p:g} they are others than at 1: set "
            "source.generate.temperature and top_p to 1"
        )
