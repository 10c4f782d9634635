"""The texts of a cache's targets, and which text each sample is compared with."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decant.storage import CacheReader
from decant.storage.inspect.examples import read_tokenizer


@dataclass(frozen=True, slots=True)
class References:
    """Texts by the id of the sample that they are the reference of."""

    texts: dict[str, str]
    what: str
    """Where they come from, for people."""


def read_references(path: str, cache: str, samples: Sequence[tuple[str, str]]) -> References:
    """Those in a file of JSON lines, else in the targets of a cache, by the samples' ids.

    Of several samples of a prompt, "id#1" and so on, each has the reference of the prompt, or the
    one of its own name. Raises ValueError for a file without references, or for other samples.
    """
    if path:
        known, what = _of_file(Path(path)), path
    elif cache:
        known, what = _of_cache(cache), f"what the targets of {cache} say"
    else:
        return References({}, "")
    found = {}
    for sample_id, _ in samples:
        reference = known.get(sample_id, known.get(_prompt_of(sample_id)))
        if reference:
            found[sample_id] = reference
    if path and not found:
        first = next(iter(samples), ("", ""))[0]
        raise ValueError(
            f"--references {path} has no record of any of the {len(samples)} samples, such as "
            f"{first!r}: its ids, {list(known)[:3]} and so on, must be those of the prompts"
        )
    return References(found, what if found else "")


def texts_of(reader: CacheReader) -> Iterator[tuple[str, str]]:
    """Sample id and text of the targets of each sequence that has some; none without a tokenizer.

    A record that was cut into windows has a text for each.
    """
    tokenizer = read_tokenizer(reader)
    if tokenizer is None:
        return
    for group in reader.row_groups():
        rows = reader.read_stored(group)
        for index, sample_id in enumerate(rows.sample_ids):
            span = slice(int(rows.row_starts[index]), int(rows.row_starts[index + 1]))
            ids = rows.token_id[span][rows.is_target[span]]
            if len(ids):
                yield sample_id, tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def _prompt_of(sample_id: str) -> str:
    name, mark, number = sample_id.rpartition("#")
    return name if mark and number.isdigit() else sample_id


def _of_cache(url: str) -> dict[str, str]:
    known: dict[str, str] = {}
    for sample_id, text in texts_of(CacheReader(url)):
        known.setdefault(sample_id, text)
        known.setdefault(_prompt_of(sample_id), text)
    return known


def _of_file(path: Path) -> dict[str, str]:
    """By `id`, or as records without one are called."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--references {path} cannot be read: {error}") from error
    known: dict[str, str] = {}
    number = 0
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            known[str(record.get("id", f"{path.name}:{number}"))] = _response(record)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path} line {at}: expected a JSON object with a response, a text, or messages "
                f"that end with the assistant's: {error!r}"
            ) from error
        number += 1
    return known


def _response(record: dict[str, Any]) -> str:
    said: Any = record["messages"] if "messages" in record else record.get("response")
    if said is None:
        said = record["completion"]
    if isinstance(said, list):
        if said[-1]["role"] != "assistant":
            raise ValueError("the messages end without the assistant's")
        said = said[-1]["content"]
    if not isinstance(said, str):
        raise ValueError(f"the response is {said!r:.40}")
    return said
