"""Whether the ids of a cache mean the same to a student's tokenizer, and what else differs.

What an id means follows from vocabulary, merges, normaliser, pre-tokenizer and decoder: these must
agree. Which of the tokens begin, end or pad a text, what a chat looks like and which further tokens
a tokenizer has are choices: a base model and its instruction-tuned one differ in them.
"""

from dataclasses import dataclass
from typing import Any

from decant.schemas.strict import UnfitError
from decant.schemas.tokenizer import (
    described_backend,
    first_difference,
    tokenizer_fingerprint,
    tried,
)

CHOICES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
SHOWN = 3
UNKNOWN = object()
Flags = dict[str, tuple[bool, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SameIds:
    """Two tokenizers, a cache's and a student's, of which all ids of the cache mean the same."""

    more: dict[str, int]
    """Tokens that the student's alone has, by token."""
    differences: tuple[str, ...]
    """Everything else in which they differ, for people."""

    def text(self) -> str:
        """What differs, in one line; "" if nothing does."""
        said = list(self.differences)
        if self.more:
            each = [f"{token!r} ({index})" for token, index in self.more.items()]
            said.append(f"{len(each)} tokens more: {_first(each)}")
        return "; ".join(said)


class Unlike(UnfitError):
    """An id means different things to two tokenizers, or they make other ids of a text."""


def check_same_tokenizer(
    teacher: Any, student: Any, where: str, *, vocab_size: int | None = None
) -> SameIds:
    """`compare` a cache's tokenizer with a student's; the error says what to do.

    Raises FormatError that names `where`.
    """
    try:
        return compare(teacher, student, vocab_size=vocab_size)
    except Unlike as error:
        raise UnfitError(
            f"{where} was dumped with another tokenizer than the student's: {error} (cache vs "
            "student). Use a student of the teacher's tokenizer, or dump again with the student's."
        ) from error


def compare(one: Any, other: Any, *, vocab_size: int | None = None) -> SameIds:
    """What differs between two tokenizers though ids of the one mean the same to the other.

    Ids below `vocab_size` count, by default all of them. Raises Unlike with the first difference if
    one means something else, or if texts become other ids: other merges, or a text of `PROBES` that
    is encoded or decoded unlike, whatever is put around it.
    """
    if tokenizer_fingerprint(one) == tokenizer_fingerprint(other):
        return SameIds(more={}, differences=())
    theirs, ours = _by_id(one), _by_id(other)
    counted = [i for i in sorted(theirs) if vocab_size is None or i < vocab_size]
    if differing := [i for i in counted if theirs[i] != ours.get(i)]:
        shown = ", ".join(f"{i}: {theirs[i]!r} vs {ours.get(i)!r}" for i in differing[:5])
        raise Unlike(f"{len(differing)} ids differ, first {shown}")
    backends = described_backend(one), described_backend(other)
    merges, scores = (
        [backend.get("model", {}).get(name) for backend in backends] for name in ("merges", "vocab")
    )
    if merges[0] != merges[1]:
        raise Unlike(f"same vocabulary, but merges differ: {_first_place(*merges)}")
    if isinstance(scores[0], list) and isinstance(scores[1], list):  # token and score by id
        size = min(map(len, scores))
        if scores[0][:size] != scores[1][:size]:
            raise Unlike(f"same vocabulary, but scores differ: {_first_place(*scores)}")
    if found := first_difference(one, other, only_bare=True):
        raise Unlike(f"same vocabulary, but texts become other ids: {found}")
    more = {token: i for i, token in sorted(ours.items()) if theirs.get(i) != token}
    flags = [_flags(backend) for backend in backends]
    return SameIds(more=more, differences=tuple(_choices(one, other, theirs, ours, *flags)))


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _first_place(one: Any, other: Any) -> str:
    """The first place at which two lists differ."""
    one, other = one or [], other or []
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if at is None:
        return f"there are {len(one)} vs {len(other)}"
    return f"number {at} is {one[at]!r} vs {other[at]!r}"


def _choices(
    teacher: Any,
    student: Any,
    theirs: dict[int, str],
    ours: dict[int, str],
    one: Flags,
    other: Flags,
) -> list[str]:
    """Everything but tokens in which two tokenizers of the same ids differ."""
    found = []
    for name in CHOICES:
        said, mine = (_named(tokenizer, name) for tokenizer in (teacher, student))
        if said != mine:
            found.append(f"{name} {mine!r} where the cache has {said!r}")
    templates = [getattr(tokenizer, "chat_template", UNKNOWN) for tokenizer in (teacher, student)]
    if UNKNOWN not in templates and templates[0] != templates[1]:
        found.append("another chat template")
    around = [_around(tokenizer) for tokenizer in (teacher, student)]
    if around[0] != around[1]:
        found.append(f"a text is put between {around[1]} where the cache has {around[0]}")
    names = {*ours.values()}
    unlike = [repr(token) for token in one if token in names and one[token] != other.get(token, ())]
    if unlike:
        found.append(f"other flags of the added tokens {_first(unlike)}")
    if beyond := [repr(theirs[i]) for i in sorted(theirs) if i not in ours]:
        found.append(f"without {_first(beyond)}, which stand nowhere in the cache")
    return found


def _first(names: list[str]) -> str:
    """Some of them, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _named(tokenizer: Any, name: str) -> str | None:
    value = tokenizer.special_tokens_map.get(name)
    return None if value is None else str(value)


def _around(tokenizer: Any) -> str:
    """What is put before and after a text; "unknown" if the text itself comes out otherwise."""
    bare, framed = tried(tokenizer, "a", False), tried(tokenizer, "a", True)
    if isinstance(bare, str) or isinstance(framed, str):
        return "unknown"
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            before, after = framed[:start], framed[start + len(bare) :]
            return " and ".join(
                " ".join(tokens.get(i, str(i)) for i in ids) or "nothing" for ids in (before, after)
            )
    return "unknown"


def _flags(backend: dict[str, Any]) -> Flags:
    """The flags of each added token."""
    added = backend.get("added_tokens") or []
    return {token["content"]: tuple(token.get(n, False) for n in FLAGS) for token in added}
