"""Tokens as bytes, and what `head` makes of them."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from decant.storage import CacheReader
from decant.storage.inspect.examples import Target, with_texts
from decant.storage.inspect.head import head, head_text, marked_sequence
from decant.storage.inspect.marked import BEGIN, END
from decant.storage.inspect.token_bytes import bytes_of, readable
from tests.support.models import build_tokenizer

TOKENIZER = build_tokenizer().backend_tokenizer


@settings(deadline=None)
@given(st.text(max_size=40))
def test_the_bytes_of_tokens_are_those_of_their_text(text: str) -> None:
    """A byte-level tokenizer loses nothing, whatever its tokens split."""
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert bytes_of(TOKENIZER, ids) == text.encode()


def test_bytes_without_a_character_are_shown_as_bytes() -> None:
    """Whole characters stay, parts of one are hexadecimal, at both ends."""
    data = "aあb".encode()
    assert readable(data) == "aあb"
    assert readable(data[:3]) == "a<E3 81>"
    assert readable(data[2:]) == "<81><82>b"


def test_added_tokens_are_their_text() -> None:
    """Special tokens are not byte-level; their text is what they are."""
    ids = [TOKENIZER.token_to_id("<|start|>"), *TOKENIZER.encode("é").ids]
    assert bytes_of(TOKENIZER, ids) == "<|start|>é".encode()


def test_single_bytes_of_byte_fallback() -> None:
    """`<0xE3>` is a byte; text is not known as bytes, nor is its é the byte E9."""
    vocabulary = {"<unk>": 0, "<0xE3>": 1, "<0x81>": 2, "▁a": 3, "é": 4}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    assert bytes_of(tokenizer, [1, 2]) == b"\xe3\x81"
    assert bytes_of(tokenizer, [3]) is None
    assert bytes_of(tokenizer, [4]) is None
    assert bytes_of(tokenizer, [99]) is None


@pytest.mark.parametrize(("text", "shown"), [("あ", ["<E3>", "<81>", "<82>"]), ("ab", ["a", "b"])])
def test_tokens_of_a_table_are_readable(text: str, shown: list[str]) -> None:
    """A part of a character is shown as its bytes, in tokens, entries and contexts."""
    ids = TOKENIZER.encode(text).ids
    found = [
        Target(
            sequence=0,
            sample_id="x",
            position=i,
            context_ids=tuple(ids[:i]),
            context=None,
            token_id=token,
            token=None,
            probability=0.5,
            rank=None,
            entries=(),
            tail_mass=0.5,
        )
        for i, token in enumerate(ids)
    ]
    texts = with_texts(found, TOKENIZER)
    assert [t.token for t in texts] == shown
    assert texts[-1].context == readable(text.encode()[: len(ids) - 1])


def test_head_shows_the_text_with_its_targets_marked(cache: Path) -> None:
    """Without the marks it is the text of the sequence; the first token is never a target."""
    scored = CacheReader(cache)[3]
    text = marked_sequence(cache, sequence=3)
    assert text is not None and text.count(BEGIN) == text.count(END) == 1
    whole = TOKENIZER.decode(scored.input_ids.tolist(), skip_special_tokens=False)
    assert text.replace(BEGIN, "").replace(END, "") == whole
    first = TOKENIZER.decode(scored.input_ids[:1].tolist(), skip_special_tokens=False)
    assert text.startswith(first + BEGIN)
    assert text in head_text(head(cache, sequence=3), text)
