"""The completions API with `echo` and `logprobs`, as many servers have it.

Tokens come as texts there, unless the server names ids in their place. With a server that takes ids
the texts must fit the ids that were sent; with one that takes text alone, each text must stand for
one id and no other, and be the one that was meant.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.teacher_dump.engines.openai.answers import AnswerError, TokenEntries
from decant.teacher_dump.engines.openai.api import Form, member
from decant.teacher_dump.engines.openai.token_texts import TokenTexts
from decant.teacher_dump.engines.seam import Prompt, Response, Sampling


class CompletionsApi:
    """`/v1/completions` with nothing beyond the API that gave it its name."""

    name = "completions"
    path = "/v1/completions"
    raises_limit = "raise the server's own limit of logprobs, if it has an option for it"
    most_entries = 64

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def forms(self, model: str, begins: tuple[int, ...]) -> list[Form]:
        """Ids; else text, behind what the server puts first by itself, or behind nothing."""
        behind = [Form(model=model, sends_text=True, begins=begins)] if begins else []
        return [
            Form(model=model, names_ids=True),
            Form(model=model),
            *behind,
            Form(model=model, sends_text=True),
        ]

    def request(self, form: Form, ids: NDArray[np.int32], k: int) -> dict[str, Any]:
        """One token is sampled: 0 means without end to some servers."""
        prompt: Any = ids.tolist()
        if form.sends_text:
            begins = len(form.begins)
            if tuple(prompt[:begins]) != form.begins:
                raise AnswerError(
                    f"the server puts id {form.begins[0]} before every text, and this sequence "
                    f"begins with {prompt[0]}: set sequences.add_bos"
                )
            prompt = self._texts.text_of(prompt[begins:])
            if prompt is None:
                raise AnswerError(
                    "the server takes text alone, and this sequence ends within a character"
                )
        body = {
            "model": form.model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": k,
        }
        return body | {"return_tokens_as_token_ids": True} if form.names_ids else body

    def rows(self, form: Form, answer: Any, ids: NDArray[np.int32]) -> list[TokenEntries | None]:
        """Of each token its text, its log prob, and log probs by text of the most probable."""
        given = member(answer, "choices", 0, "logprobs")
        tokens, actual, top = (
            member(given, name) for name in ("tokens", "token_logprobs", "top_logprobs")
        )
        if not all(isinstance(part, list) for part in (tokens, actual, top)):
            raise AnswerError("its answer has no log probs of the prompt: it knows no echo")
        self._check_count(form, answer, ids)
        missing = len(form.begins) if form.begins and not self._lists(tokens, ids) else 0
        wanted = len(ids) - missing
        if min(len(tokens), len(actual), len(top)) < wanted:
            raise AnswerError(
                f"it gives log probs of {min(len(tokens), len(actual), len(top))} of {len(ids)} "
                "tokens: it leaves some out, or cuts the prompt"
            )
        rows: list[TokenEntries | None] = [None] * missing
        for place in range(wanted):
            index = int(ids[missing + place])
            self._check_text(form, tokens[place], index, missing + place)
            if top[place] is None:
                rows.append(None)
                continue
            if not isinstance(top[place], dict):
                raise AnswerError("its top_logprobs are no objects by token")
            pairs = [(self._id_or_text(text), value) for text, value in top[place].items()]
            rows.append(TokenEntries(token_id=index, logprob=actual[place], top=pairs))
        return rows[1:]

    def texts(self, answer: Any) -> list[str] | None:
        """They are compared token by token already."""
        return None

    def sample_request(self, form: Form, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """Not by this way."""
        raise AnswerError(
            "a completions API gives texts of what it samples, not ids: source.generate needs "
            "vLLM's or SGLang's server (teacher.api: vllm or sglang)"
        )

    def sampled(self, answer: Any, sampling: Sampling) -> Response:
        """Not by this way."""
        raise NotImplementedError

    def _lists(self, tokens: list[Any], ids: NDArray[np.int32]) -> bool:
        """Whether the tokens that the server puts first are among those it lists."""
        return (
            bool(tokens)
            and isinstance(tokens[0], str)
            and self._texts.fits(tokens[0], int(ids[0]))
            and not (len(ids) > 1 and self._texts.fits(tokens[0], int(ids[1])))
        )

    def _check_count(self, form: Form, answer: Any, ids: NDArray[np.int32]) -> None:
        """Raise AnswerError if the server says that it read another number of tokens."""
        usage = answer.get("usage") if isinstance(answer, dict) else None
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if type(count) is not int and form.begins:
            raise AnswerError(
                f"it does not say how many tokens it read, so that nobody knows whether it put id "
                f"{form.begins[0]} before the text"
            )
        if type(count) is not int or count == len(ids):
            return
        way = "adds tokens, such as special ones" if count > len(ids) else "leaves some out"
        hint = ", or its tokenizer is another one" if form.sends_text else ""
        raise AnswerError(f"it read {count} tokens of {len(ids)} sent: the server {way}{hint}")

    def _check_text(self, form: Form, text: Any, index: int, place: int) -> None:
        if not isinstance(text, str):
            raise AnswerError(f"it gives {text!r} as the text of token {place}")
        if not self._texts.fits(text, index):
            raise AnswerError(
                f"it read token {place} as {text!r}, sent was id {index}: its tokenizer is another "
                "one, or cuts this text otherwise"
            )
        if form.sends_text and self._texts.id_of(text) != index:
            raise AnswerError(
                f"it read token {place} as {text!r}, which is the text of several ids: the server "
                "takes text alone, so that it cannot be told which it read"
            )

    def _id_or_text(self, text: str) -> int | str:
        index = self._texts.id_of(text)
        return text if index is None else index
