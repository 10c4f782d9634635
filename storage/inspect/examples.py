"""One target in its context, for people: what came before, the actual token, what the teacher said.

Texts come from the `tokenizer.json` of the cache; without one they are None and ids are shown.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import tokenizers
from numpy.typing import NDArray

from decant.schemas import ScoredSequence
from decant.storage.cache import kept_tokenizer
from decant.storage.cache.reader import CacheReader
from decant.storage.cli.terminal import escaped, width
from decant.storage.files.store import Store
from decant.storage.inspect.token_bytes import BROKEN, bytes_of, readable

CONTEXT = 24
"""Tokens of context."""
SPACE = "\N{OPEN BOX}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One kept entry."""

    token_id: int
    text: str | None
    probability: float
    """At T=1."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One target; probabilities are the teacher's at T=1."""

    sequence: int
    """Index in the plan."""
    sample_id: str
    position: int
    context_ids: tuple[int, ...]
    """The tokens before, at most 24."""
    context: str | None
    token_id: int
    """The actual token."""
    token: str | None
    probability: float
    """Of the actual token, kept or not."""
    rank: int | None
    """Of the actual token among the kept entries, from 1; None if it is not kept, or if the order
    is not known because draws alone are stored."""
    entries: tuple[Entry, ...]
    """The most probable kept entries; of draws alone the most often drawn, with their share."""
    tail_mass: float | None
    """Of every id that is not kept (not only: not shown); None without log probs of entries."""


def target(sequence: ScoredSequence, index: int, plan_index: int, num_entries: int) -> Target:
    """The `index`-th target of a sequence with its first entries, no texts yet."""
    position = int(sequence.positions[index])
    ids, p = _entries(sequence, index)
    label = int(sequence.input_ids[position])
    ranks = (ids == label).nonzero()[0].tolist() if sequence.logprobs is not None else []
    before = sequence.input_ids[max(position - CONTEXT, 0) : position]
    return Target(
        sequence=plan_index,
        sample_id=sequence.sample_id,
        position=position,
        context_ids=tuple(before.tolist()),
        context=None,
        token_id=label,
        token=None,
        probability=_exp(float(sequence.label_logprob[index])),
        rank=ranks[0] + 1 if ranks else None,
        entries=tuple(
            Entry(token_id=int(v), text=None, probability=float(x))
            for v, x in zip(ids[:num_entries], p, strict=False)
            if v >= 0
        ),
        tail_mass=(None if sequence.log_tail is None else _exp(float(sequence.log_tail[index, 0]))),
    )


def _entries(sequence: ScoredSequence, index: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The kept ids of a target and their probabilities, or shares of the draws, largest first."""
    ids = sequence.token_ids[index]
    if sequence.logprobs is not None:
        return ids, np.exp(np.minimum(sequence.logprobs[index].astype(np.float64), 0))
    if sequence.draws is None:  # no entry is kept
        return ids, np.zeros(0)
    draws = sequence.draws[index]
    order = np.argsort(-draws, kind="stable")
    return ids[order], draws[order] / draws.sum()


def with_texts(targets: Iterable[Target], tokenizer: tokenizers.Tokenizer) -> list[Target]:
    """The same targets with their tokens as text."""

    def text(token_id: int) -> str:
        """What a token adds to a text that comes before it: decoders drop a leading space."""
        alone = tokenizer.decode([token_id], skip_special_tokens=False)
        if BROKEN in alone and (data := bytes_of(tokenizer, [token_id])) is not None:
            return readable(data)
        twice = tokenizer.decode([token_id, token_id], skip_special_tokens=False)
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone

    def before(ids: tuple[int, ...]) -> str:
        """The context, which may begin or end inside of a character."""
        whole = tokenizer.decode(list(ids), skip_special_tokens=False)
        if BROKEN in whole and (data := bytes_of(tokenizer, ids)) is not None:
            return readable(data)
        return whole

    return [
        dataclasses.replace(
            found,
            context=before(found.context_ids),
            token=text(found.token_id),
            entries=tuple(dataclasses.replace(e, text=text(e.token_id)) for e in found.entries),
        )
        for found in targets
    ]


def read_tokenizer(reader: CacheReader) -> tokenizers.Tokenizer | None:
    """The tokenizer of a cache; None if it holds none that the tokenizers library reads.

    Raises FormatError if its file is not the one that was put there.
    """
    data = kept_tokenizer.read_file(Store(reader.url), reader.manifest, "tokenizer.json")
    if data is None:
        return None
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception:  # the tokenizers library raises plain Exception
        return None


# Text in columns


def shown(text: str | None, token_id: int) -> str:
    """A token for a table: its text with spaces at its ends made visible, or its id."""
    if text is None:
        return f"#{token_id}"
    inner = text.strip(" ")
    start = len(text) - len(text.lstrip(" ")) if inner else 0
    end = len(text) - start - len(inner)
    return SPACE * start + escaped(inner) + SPACE * end


def entries_shown(found: Target, columns: int, digits: int = 2) -> str:
    """As many of a target's entries as fit in so many columns."""
    line = ""
    for entry in found.entries:
        longer = f"{line}{shown(entry.text, entry.token_id)} {entry.probability:.{digits}f}"
        if width(longer) > columns:
            break
        line = f"{longer}  "
    return line.rstrip()


def context_shown(found: Target) -> str:
    """The context of a target for a table, on one line."""
    if found.context is None:
        return " ".join(f"#{i}" for i in found.context_ids)
    return escaped(found.context)


def _exp(x: float) -> float:
    return math.exp(min(x, 0.0))
