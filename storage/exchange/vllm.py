"""vLLM's `prompt_logprobs`, a JSON object per line: of its engine, its server, or its batch runner.

Each list holds the k most probable ids and the actual token; list j is about token j.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from decant.storage.exchange.columns import json_files, json_lines, token_list
from decant.storage.exchange.config import ImportConfig
from decant.storage.exchange.foreign import ForeignError, ForeignRecord, make_record, rows_of

FLAT = ("start_indices", "end_indices", "token_ids", "logprobs")


def read(config: ImportConfig, vocab_size: int) -> Iterator[ForeignRecord]:
    """A record for each object with `prompt_logprobs`, in order. Raises ForeignError."""
    number = 0
    for file in json_files(config.path):
        for where, line in json_lines(file):
            body = _body(where, line)
            outputs = [c for c in body.get("choices") or [body] if isinstance(c, Mapping)]
            if not any(output.get("prompt_logprobs") for output in outputs):
                raise ForeignError(
                    f"{where}: no prompt_logprobs, found {', '.join(sorted(body))}: ask vLLM for "
                    "them (prompt_logprobs=K)"
                )
            for output in outputs:
                if output.get("prompt_logprobs"):
                    yield _record(where, line, body, output, number, config, vocab_size)
                    number += 1


def _body(where: str, line: dict[str, Any]) -> dict[str, Any]:
    """What the server answered; a batch runner wraps it up."""
    response = line.get("response")
    if not isinstance(response, Mapping):
        return line
    if response.get("status_code", 200) != 200 or not isinstance(response.get("body"), dict):
        raise ForeignError(
            f"{where}: status {response.get('status_code')}, no answer: take the line out, or ask "
            "again"
        )
    return response["body"]


def _record(
    where: str,
    line: dict[str, Any],
    body: dict[str, Any],
    output: Mapping[str, Any],
    number: int,
    config: ImportConfig,
    vocab_size: int,
) -> ForeignRecord:
    given = [
        holder[name]
        for holder in (output, body, line)
        for name in ("prompt_token_ids", "prompt", "input_ids")
        if isinstance(holder.get(name), list)
    ]
    if not given:
        raise ForeignError(
            f"{where}: no prompt_token_ids: ask the server for them (return_token_ids), or add the "
            "ids that were sent"
        )
    tokens = token_list(where, "prompt_token_ids", given[0])
    lists = _lists(where, output["prompt_logprobs"])
    if len(lists) != len(tokens):
        raise ForeignError(
            f"{where}: prompt_logprobs has {len(lists)} lists for {len(tokens)} tokens: expected "
            "one each, null for the first"
        )
    own = [line.get(name) for name in ("sample_id", "custom_id", "request_id", "id")]
    sample_id = next((str(name) for name in own if name is not None), str(number))
    entries = rows_of(where, lists)
    return make_record(where, sample_id, tokens, config.shift, *entries, vocab_size)


def _lists(where: str, value: Any) -> list[list[tuple[Any, Any]] | None]:
    """Pairs of id and log prob; None where a token has none."""
    if isinstance(value, Mapping) and set(FLAT) <= set(value):
        starts, ends, ids, values = (value[name] for name in FLAT)
        pairs = list(zip(ids, values, strict=True))
        return [pairs[a:b] for a, b in zip(starts, ends, strict=True)]
    if not isinstance(value, list):
        raise ForeignError(
            f"{where}: prompt_logprobs is {type(value).__name__}: expected a list for each token"
        )
    lists: list[list[tuple[Any, Any]] | None] = []
    for place, entries in enumerate(value):
        if entries is None:
            lists.append(None)
            continue
        try:
            lists.append([(token, _value(entry)) for token, entry in entries.items()])
        except (AttributeError, KeyError, TypeError) as error:
            raise ForeignError(
                f'{where}, list {place}: expected {{"ID": {{"logprob": X, ...}}, ...}}, found '
                f"{str(entries)[:60]}"
            ) from error
    return lists


def _value(entry: Any) -> Any:
    return entry["logprob"] if isinstance(entry, Mapping) else entry
