"""Answers of TRL's vLLM server, a JSON object per line.

Of `/get_sequence_logprobs/`, in either of its forms, with the request's `sequences` and
`prompt_lengths` beside the answer; of `/generate/` and `/chat/` as they are. Lists are about the
tokens of the completion.
"""

import base64
import binascii
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.storage.exchange.columns import Lists, json_files, json_lines, token_list
from decant.storage.exchange.config import ImportConfig
from decant.storage.exchange.foreign import ForeignError, ForeignRecord, make_record, rows_of

DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Of a request: anything else changes the distributions that the server tells."""


def read(config: ImportConfig, vocab_size: int) -> Iterator[ForeignRecord]:
    """A record for each sequence of each answer, in order. Raises ForeignError."""
    number = 0
    for file in json_files(config.path):
        for where, line in json_lines(file):
            _refuse_changed(where, line)
            sequences, prompts = _sequences(where, line)
            found = _binary(where, line) if "logprobs_b64" in line else _nested(where, line)
            if len(found) != len(sequences):
                raise ForeignError(
                    f"{where}: log probs of {len(found)} sequences, tokens of {len(sequences)}"
                )
            for i, (tokens, prompt, (lists, actual)) in enumerate(
                zip(sequences, prompts, found, strict=True)
            ):
                here = where if len(sequences) == 1 else f"{where} sequence {i}"
                if len(lists[0]) != len(tokens) - prompt:
                    raise ForeignError(
                        f"{here}: {len(lists[0])} lists for {len(tokens) - prompt} tokens of the "
                        "completion: expected one each"
                    )
                offset = prompt + config.shift
                yield make_record(
                    here, str(number), tokens, offset, *lists, vocab_size, actual=actual
                )
                number += 1


def _refuse_changed(where: str, line: dict[str, Any]) -> None:
    for name, default in DEFAULTS.items():
        value = line.get(name, default)
        if value != default and not (name == "top_k" and value in (0, None)):
            raise ForeignError(
                f"{where}: {name} is {value}: the server tells log probs after it, and a cache "
                f"holds those before; ask again with {name} {default}"
            )


def _sequences(where: str, line: dict[str, Any]) -> tuple[list[NDArray[np.int64]], list[int]]:
    """Tokens of each sequence, and how many of them are the prompt."""
    if "sequences" in line and "prompt_lengths" in line:
        sequences = [token_list(where, "sequences", tokens) for tokens in line["sequences"]]
        prompts = [int(n) for n in line["prompt_lengths"]]
        if len(prompts) != len(sequences):
            raise ForeignError(
                f"{where}: {len(prompts)} prompt_lengths for {len(sequences)} sequences"
            )
        return sequences, prompts
    if "prompt_ids" in line and "completion_ids" in line:
        prompts_ids = [token_list(where, "prompt_ids", tokens) for tokens in line["prompt_ids"]]
        answers = [token_list(where, "completion_ids", t) for t in line["completion_ids"]]
        each, rest = divmod(len(answers), max(len(prompts_ids), 1))
        if rest or not prompts_ids:
            raise ForeignError(
                f"{where}: {len(answers)} completion_ids for {len(prompts_ids)} prompt_ids"
            )
        asked = [prompts_ids[i // each] for i in range(len(answers))]
        pairs = zip(asked, answers, strict=True)
        return [np.concatenate(pair) for pair in pairs], [len(prompt) for prompt in asked]
    raise ForeignError(
        f"{where}: no tokens, found {', '.join(sorted(line))}: add the request's sequences and "
        "prompt_lengths to the answer, or save prompt_ids and completion_ids with it"
    )


Found = list[tuple[Lists, NDArray[np.float64] | None]]


def _nested(where: str, line: dict[str, Any]) -> Found:
    values, ids = line.get("logprobs"), line.get("logprob_token_ids")
    if not isinstance(values, list) or not isinstance(ids, list) or len(values) != len(ids):
        raise ForeignError(
            f"{where}: expected logprobs and logprob_token_ids of every sequence, found "
            f"{', '.join(sorted(line))}"
        )
    found: Found = []
    for of_values, of_ids in zip(values, ids, strict=True):
        try:
            pairs = [list(zip(i, v, strict=True)) for i, v in zip(of_ids, of_values, strict=True)]
        except (TypeError, ValueError) as error:
            raise ForeignError(
                f"{where}: logprobs and logprob_token_ids differ in shape: {error}"
            ) from error
        found.append((rows_of(where, pairs), None))
    return found


def _binary(where: str, line: dict[str, Any]) -> Found:
    """The base64 form: padded to the longest completion; -inf = no entry."""
    try:
        shape, lengths = tuple(line["shape"]), line["completion_lengths"]
        values = _decoded(line["logprobs_b64"], "<f4", shape).astype(np.float64)
        ids = _decoded(line["token_ids_b64"], "<i4", shape).astype(np.int64)
        actual = None
        if line.get("actual_logprobs_b64"):
            actual = _decoded(line["actual_logprobs_b64"], "<f4", (*shape[:2], 1))[:, :, 0]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ForeignError(f"{where}: its arrays cannot be read: {error!r}") from error
    ids = np.where(values == -np.inf, -1, ids)
    found: Found = []
    for i, length in enumerate(lengths):
        own = None
        if actual is not None:
            own = actual[i, :length].astype(np.float64)
            own[own == -np.inf] = np.nan
        found.append(((ids[i, :length], values[i, :length]), own))
    return found


def _decoded(text: str, dtype: str, shape: tuple[int, ...]) -> NDArray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
