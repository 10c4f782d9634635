"""What a chat API is asked, and what it answers: ids of what it generates, with their entries.

The ids are the API's own tokens, each brought to the one id of its bytes; nothing is tokenised
again. What cannot be brought to ids exactly is an answer with a problem, never a guess.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from decant.teacher_dump.engines.openai.answers import AnswerError
from decant.teacher_dump.engines.openai.token_ids import TokenIds

MOST_ENTRIES = 20
"""Per token: what the API's own definition allows."""
UNKNOWN = -9000.0
"""Log probs below stand for one that the API does not tell: it writes -9999."""
FRAMING_TOKENS = 4
"""Generated tokens that may go unlisted: they begin or end an answer."""
FINISHED = ("stop", "length")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatForm:
    """How a chat API is asked; found out once."""

    names_ids: bool
    """Whether it writes ids in place of tokens."""
    limit: str = "max_tokens"
    """Its name for the longest answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What one answer is asked of."""

    body: Mapping[str, Any]
    """`messages`, and `tools` and `chat_template_kwargs` where the record has them."""
    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0

    def request(self, form: ChatForm, model: str, entries: int) -> dict[str, Any]:
        """The body of the request, with so many entries per token."""
        body = {
            **self.body,
            "model": model,
            "logprobs": True,
            "top_logprobs": entries,
            "n": 1,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "seed": self.seed % 2**31,
            form.limit: self.max_new_tokens,
        }
        return body | {"return_tokens_as_token_ids": True} if form.names_ids else body


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer; what is a tuple is by generated token."""

    text: str
    """The message, as the API writes it."""
    finish_reason: str
    model: str
    """Which answered."""
    system_fingerprint: str = ""
    """Of what ran it; "" if the API does not say."""
    read_tokens: int = 0
    """Tokens of the prompt, as the API counts them; 0 if it does not."""
    problem: str = ""
    """Why it has no distributions; the tuples are empty then."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Of the generated tokens; below `UNKNOWN` where the API does not tell."""
    top_ids: tuple[tuple[int, ...], ...] = ()
    top_logprobs: tuple[tuple[float, ...], ...] = ()
    unnamed_mass: tuple[float, ...] = ()
    """Of the entries that no one id stands for."""
    num_unnamed: int = 0
    """How many such entries there are."""


def read_answer(answer: Any, form: ChatForm, ids: TokenIds) -> Answer:
    """What an API answered. Raises AnswerError if it is no chat completion."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise AnswerError("its answer has no choices[0].message")
    content = message.get("content")
    usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
    read = usage.get("prompt_tokens")
    found = Answer(
        text=content if isinstance(content, str) else str(message.get("refusal") or ""),
        finish_reason=str(choice.get("finish_reason")),
        model=str(answer.get("model") or ""),
        system_fingerprint=str(answer.get("system_fingerprint") or ""),
        read_tokens=read if type(read) is int else 0,
    )
    try:
        _refuse_no_answer(found, message)
        listed = _listed(choice)
        _refuse_hidden(usage, len(listed))
        return _checked(dataclasses.replace(found, **_tokens(listed, form, ids, found)), ids)
    except AnswerError as error:
        return dataclasses.replace(found, problem=str(error))


def refused(message: str) -> Answer:
    """In place of an answer that the API refuses to give."""
    return Answer(text="", finish_reason="refused", model="", problem=message)


def _refuse_no_answer(found: Answer, message: dict[str, Any]) -> None:
    """Raise AnswerError for what is no text of the model's, or one that something cut."""
    if message.get("refusal"):
        raise AnswerError(f"it refuses to answer: {message['refusal']!r:.80}")
    if message.get("tool_calls") or message.get("function_call"):
        raise AnswerError("it answers with a call of a tool, whose tokens are not told")
    if found.finish_reason not in FINISHED:
        raise AnswerError(f"its answer ended by {found.finish_reason}, not by stop or length")
    if not found.text:
        raise AnswerError("it answers nothing")


def _listed(choice: dict[str, Any]) -> list[dict[str, Any]]:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content:
        raise AnswerError("it gives no log probs of its answer (choices[0].logprobs)")
    if not all(isinstance(entry, dict) for entry in content):
        raise AnswerError("its logprobs.content holds what is no object")
    return content


def _refuse_hidden(usage: dict[str, Any], num_listed: int) -> None:
    """Raise AnswerError if tokens were generated that are not told, and so were read as well."""
    details = usage.get("completion_tokens_details")
    hidden = details.get("reasoning_tokens") if isinstance(details, dict) else 0
    generated = usage.get("completion_tokens")
    unlisted = generated - num_listed if type(generated) is int else 0
    if unlisted > FRAMING_TOKENS:
        what = "hidden reasoning" if hidden else "not told"
        raise AnswerError(
            f"it generated {generated} tokens and gives log probs of {num_listed}: the others, "
            f"{what}, are part of what it had read"
        )


def _tokens(
    listed: list[dict[str, Any]], form: ChatForm, ids: TokenIds, found: Answer
) -> dict[str, Any]:
    """The tuples of an answer. Raises AnswerError for a token that is no one id."""
    last = listed[-1]
    if found.finish_reason == "stop" and not form.names_ids and last.get("bytes") in (None, []):
        listed = listed[:-1]  # an end token that has no text
    if not listed:
        raise AnswerError("it answers nothing but an end token")
    token_ids, logprobs, masses, num_unnamed = [], [], [], 0
    tops: list[dict[int, float]] = []
    for place, entry in enumerate(listed):
        index = _id(entry, form, ids)
        if index is None:
            raise AnswerError(_unnamed(entry, place, form))
        token_ids.append(index)
        logprobs.append(_number(entry, f"the log prob of token {place}"))
        kept, mass, count = _top(entry.get("top_logprobs"), place, form, ids)
        tops.append(kept)
        masses.append(mass)
        num_unnamed += count
    return {
        "token_ids": tuple(token_ids),
        "logprobs": tuple(logprobs),
        "top_ids": tuple(tuple(top) for top in tops),
        "top_logprobs": tuple(tuple(top.values()) for top in tops),
        "unnamed_mass": tuple(masses),
        "num_unnamed": num_unnamed,
    }


def _top(
    top: Any, place: int, form: ChatForm, ids: TokenIds
) -> tuple[dict[int, float], float, int]:
    """The most probable tokens by id; the mass of those that no one id stands for; their number."""
    if not isinstance(top, list) or not top:
        raise AnswerError(f"it gives no top_logprobs for token {place}")
    kept: dict[int, float] = {}
    mass, num_unnamed = 0.0, 0
    for entry in top:
        value = _number(entry, f"a log prob of the most probable for token {place}")
        index = _id(entry, form, ids)
        if form.names_ids and index in kept:
            raise AnswerError(f"it gives id {index} twice for token {place}")
        if index is None or index in kept:
            mass += float(np.exp(min(value, 0.0)))
            num_unnamed += 1
        elif value > UNKNOWN:
            kept[index] = value
    return kept, mass, num_unnamed


def _id(entry: dict[str, Any], form: ChatForm, ids: TokenIds) -> int | None:
    if form.names_ids:
        return ids.named(entry.get("token"))
    data = entry.get("bytes")
    if not isinstance(data, list) or not all(type(b) is int and 0 <= b < 256 for b in data):
        return None
    return ids.id_of(bytes(data))


def _unnamed(entry: dict[str, Any], place: int, form: ChatForm) -> str:
    token = entry.get("token")
    if not form.names_ids and not isinstance(entry.get("bytes"), list):
        return (
            f"it gives no bytes of token {place}, {token!r:.40}, and a text alone does not say "
            "which token it is"
        )
    return (
        f"it generated {token!r:.40} as token {place}, which is no id of teacher.tokenizer, or "
        "several: the tokenizer is another one, or the API does not write the token's own bytes"
    )


def _checked(found: Answer, ids: TokenIds) -> Answer:
    """Raise AnswerError unless the tokens say what the message says."""
    said = ids.text_of(found.token_ids)
    if found.text.strip().rstrip("\ufffd") not in said:
        raise AnswerError(
            f"it lists the tokens of {said!r:.60}, and its message is {found.text!r:.60}"
        )
    return found


def _number(entry: Any, what: str) -> float:
    """The log prob of an entry. Raises AnswerError."""
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
        raise AnswerError(f"it gives {value!r} as {what}")
    return float(value)
