"""Tables of tokens as bytes: whatever a tokenizer writes, and what has no table."""

from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers import ByT5Tokenizer

from decant.student_train.alignment.token_bytes import BASE, NO_BYTES, SPECIAL, TokenTable
from tests.support import alignments

BYTE_LEVEL = alignments.byte_level(340)
SPACES = alignments.with_spaces()
TABLES = {
    "byte-level": (BYTE_LEVEL, TokenTable.of(BYTE_LEVEL, "one")),
    "spaces": (SPACES, TokenTable.of(SPACES, "two")),
}


def hashed(data: bytes) -> int:
    value = 0
    for byte in data:
        value = (value * int(BASE) + byte + 1) % 2**64
    return value


@pytest.mark.parametrize("name", TABLES)
@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=30))
def test_tokens_join_to_the_text(name: str, text: str) -> None:
    """Any text, but for the space that is put before it; an unknown token is none of it."""
    tokenizer, table = TABLES[name]
    text = text.replace("▁", "_").encode(errors="ignore").decode()
    ids = np.array(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, int)
    joined = table.text_of(ids)
    assert joined[table.puts_space and joined[:1] == b" " :] == text.encode()


@pytest.mark.parametrize("name", TABLES)
def test_hashes_are_those_of_the_bytes(name: str) -> None:
    """Of every beginning of every token; and a token is found by the hash of its bytes."""
    _, table = TABLES[name]
    for token in range(0, len(table), 7):
        data = table.text_of(np.array([token]))
        for length in range(len(data) + 1):
            found = table.beginnings(np.array([token]), np.array([length]))
            assert int(found[0]) == hashed(data[:length])
        if data:
            (same,) = table.find(np.array([hashed(data)], np.uint64))
            assert table.text_of(np.array([same])) == data
    assert table.find(np.array([hashed(b"no such token")], np.uint64)).tolist() == [-1]


def test_bytes_of_byte_fallback_come_after_ordinary_tokens() -> None:
    """`a` is found as the token of the letter; the two stand for different ones of the other."""
    _, table = TABLES["spaces"]
    vocabulary = SPACES.backend_tokenizer.get_vocab()
    letter, byte = vocabulary["a"], vocabulary["<0x61>"]
    assert table.find(table.hashes[[byte]]).tolist() == [letter]
    pairs = table.paired_with(table)
    assert pairs[[letter, byte]].tolist() == [letter, byte]
    theirs = table.paired_with(TABLES["byte-level"][1])
    assert theirs[letter] == BYTE_LEVEL.backend_tokenizer.token_to_id("a") and theirs[byte] == -1


@pytest.mark.parametrize("name", TABLES)
def test_a_tokenizer_is_paired_with_itself_id_by_id(name: str) -> None:
    """All tokens that have bytes or a role, special ones included."""
    _, table = TABLES[name]
    known = table.kind != NO_BYTES
    np.testing.assert_array_equal(table.paired_with(table)[known], np.arange(len(table))[known])


def test_special_tokens_are_paired_by_role_and_then_by_name() -> None:
    """Never by bytes: a special token that reads like text of the other's has no counterpart."""
    one, two = alignments.byte_level(300), alignments.byte_level(310)
    one.backend_tokenizer.add_special_tokens(["<|end|>", "the", "<|tool|>"])
    two.backend_tokenizer.add_special_tokens(["<|end|>", "<|tool|>"])
    one.special_tokens_map = {"eos_token": "<|end|>"}
    first, second = TokenTable.of(one, "one"), TokenTable.of(two, "two")
    ids = {t: one.backend_tokenizer.token_to_id(t) for t in ("<|end|>", "the", "<|tool|>")}
    assert all(first.kind[i] == SPECIAL for i in ids.values())
    pairs = first.paired_with(second)
    assert pairs[ids["<|end|>"]] == two.backend_tokenizer.token_to_id(alignments.END)
    assert pairs[ids["the"]] == -1
    assert pairs[ids["<|tool|>"]] == two.backend_tokenizer.token_to_id("<|tool|>")
    assert len(set(pairs[pairs >= 0].tolist())) == int((pairs >= 0).sum())


def test_the_space_that_a_tokenizer_puts_is_known() -> None:
    """At the begin of a text and behind special tokens, or not at all."""
    assert TABLES["spaces"][1].puts_space and TABLES["spaces"][1].puts_space_again
    assert not TABLES["byte-level"][1].puts_space


def test_tokenizers_without_a_table_are_refused() -> None:
    """A slow one, one that marks the insides of words, one whose decoder says something else."""
    with pytest.raises(
        ValueError, match=r"of student has no tokenizer\.json that says which bytes"
    ):
        TokenTable.of(SimpleNamespace(special_tokens_map={}), "student")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"of student has no tokenizer\.json"):
        TokenTable.of(ByT5Tokenizer(), "student")
    pieces = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}))
    with pytest.raises(ValueError, match="do not say which bytes they are"):
        TokenTable.of(SimpleNamespace(backend_tokenizer=pieces, special_tokens_map={}), "student")
    upper = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefghijklmno ")}, []))
    upper.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("e", "E")])
    with pytest.raises(ValueError, match="do not join to the text they stand for"):
        TokenTable.of(SimpleNamespace(backend_tokenizer=upper, special_tokens_map={}), "student")
