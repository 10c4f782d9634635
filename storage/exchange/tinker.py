"""Tinker's sample responses, a JSON object per line, with the request's `prompt` beside them.

`topk_prompt_logprobs[j]` is about token j of the prompt; `topk_logprobs[j]` of a sampled sequence
about its token j. `prompt_logprobs` has the actual tokens' own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.storage.exchange.columns import json_files, json_lines, token_list
from decant.storage.exchange.config import ImportConfig
from decant.storage.exchange.foreign import ForeignError, ForeignRecord, make_record, rows_of

MASKED = -99999.0
"""The value of places that hold nothing."""

Entries = list[list[tuple[Any, Any]] | None]


def read(config: ImportConfig, vocab_size: int) -> Iterator[ForeignRecord]:
    """A record for each prompt, or for each sequence that was sampled with its top k.

    Only the first of several holds the prompt's own targets. Raises ForeignError.
    """
    number = 0
    for file in json_files(config.path):
        for where, line in json_lines(file):
            answer = line.get("response")
            answer = {**line, **answer} if isinstance(answer, Mapping) else line
            prompt = _prompt(where, line)
            lists: Entries = [None] * len(prompt)
            if answer.get("topk_prompt_logprobs"):
                lists = _lists(where, "topk_prompt_logprobs", answer["topk_prompt_logprobs"])
                _same(where, "topk_prompt_logprobs", len(lists), len(prompt))
            own = _own(where, "prompt_logprobs", answer.get("prompt_logprobs"), len(prompt))
            sampled = [
                s for s in answer.get("sequences") or () if s.get("topk_logprobs") is not None
            ]
            if not sampled and not any(lists):
                raise ForeignError(
                    f"{where}: neither topk_prompt_logprobs nor topk_logprobs of a sequence, found "
                    f"{', '.join(sorted(answer))}: ask for topk_prompt_logprobs=K"
                )
            if sampled:
                _refuse_tempered(where, answer)
            for i, sequence in enumerate(sampled or [{}]):
                here = where if len(sampled) < 2 else f"{where} sequence {i}"
                answered = token_list(here, "tokens", sequence.get("tokens", []))
                more = _lists(here, "topk_logprobs", sequence.get("topk_logprobs") or [])
                _same(here, "topk_logprobs", len(more), len(answered))
                theirs = _own(here, "logprobs", sequence.get("logprobs"), len(answered))
                every = [*(lists if i == 0 else [None] * len(prompt)), *more]
                yield make_record(
                    here,
                    str(line.get("sample_id", number)),
                    np.concatenate([prompt, answered]),
                    config.shift,
                    *rows_of(here, every),
                    vocab_size,
                    actual=np.concatenate([own, theirs]),
                )
                number += 1


def _prompt(where: str, line: dict[str, Any]) -> NDArray[np.int64]:
    """Ids of the request's prompt: a list, or a model input of chunks of tokens."""
    for name in ("prompt", "prompt_token_ids", "input_ids"):
        value = line.get(name)
        if isinstance(value, list):
            return token_list(where, name, value)
        if isinstance(value, Mapping) and isinstance(value.get("chunks"), list):
            chunks = value["chunks"]
            if not all(isinstance(chunk, Mapping) and "tokens" in chunk for chunk in chunks):
                raise ForeignError(
                    f"{where}: {name} has chunks without tokens: expected text alone"
                )
            return token_list(where, name, [t for chunk in chunks for t in chunk["tokens"]])
    raise ForeignError(
        f"{where}: no tokens, found {', '.join(sorted(line))}: a response does not hold them, so "
        "save the request's prompt (token ids) beside it"
    )


def _lists(where: str, name: str, value: Any) -> Entries:
    if not isinstance(value, list):
        raise ForeignError(f"{where}: {name} is no list of lists")
    lists: Entries = []
    for place, entries in enumerate(value):
        try:
            pairs = [(token, logprob) for token, logprob in entries or ()]
        except (TypeError, ValueError) as error:
            raise ForeignError(
                f"{where}, list {place}: {name} holds {str(entries)[:60]}: expected [id, log prob] "
                "pairs"
            ) from error
        lists.append([pair for pair in pairs if pair[1] != MASKED] or None)
    return lists


def _own(where: str, name: str, value: Any, length: int) -> NDArray[np.float64]:
    """Log probs of the actual tokens; NaN where there is none."""
    if value is None:
        return np.full(length, np.nan)
    _same(where, name, len(value), length)
    own = np.array([np.nan if v is None else v for v in value], np.float64)
    return np.where(own == MASKED, np.nan, own)


def _same(where: str, name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ForeignError(f"{where}: {name} has {found} entries for {expected} tokens")


def _refuse_tempered(where: str, answer: Mapping[str, Any]) -> None:
    parameters = answer.get("sampling_params")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    temperature = parameters.get("temperature", 1.0)
    if temperature != 1:
        raise ForeignError(
            f"{where}: sampled at temperature {temperature}: whether the sampled tokens' log probs "
            "are of it is not said, so score prompt and answer as a prompt (topk_prompt_logprobs)"
        )
