"""Encoding word by word: the ids are those of whole texts."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from decant.student_train.alignment.encoder import Encoder
from decant.student_train.alignment.words import PATTERNS, Cuts, Words

PARTS = [
    *"aAbzZsltdmTS''.,;(/-_\\\"<|>\n\r\t  0957",
    *"٣²\u00a0\u3000\u2028\u0085\u200b\x00\x1céеǅʰ日😀\u0301",
    *("\u0958", "\u212a", "=\u0338", "<end>", "<left>", "<right>", "\v", "\u2028"),
    *("'s", "'LL", "  ", "    ", "\n\n", " \n", "\r\n", "the", " the", "e\u0301", "<tool>"),
]
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BARE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
KINDS = {
    "GPT-2": GPT_2,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2]),
    **{
        f"pattern {n}": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), BARE]
        )
        for n, pattern in enumerate(PATTERNS)
    },
}


def text_of(generator: random.Random, parts: int) -> str:
    return "".join(generator.choices(PARTS, k=parts))


def tokenizer_of(
    splitter: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
    **model: Any,
) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on texts of the parts, with options of its model."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    generator = random.Random(0)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text_of(generator, 60) for _ in range(150)], trainer)
    described = json.loads(tokenizer.to_str())
    described["model"] |= model
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    tokenizer.add_tokens(
        [
            AddedToken("<tool>", normalized=False),
            AddedToken("<left>", lstrip=True, normalized=True),
            AddedToken("<right>", rstrip=True, single_word=True),
        ]
    )
    tokenizer.encode_special_tokens = True
    return tokenizer


def words_of(tokenizer: tokenizers.Tokenizer, num_words: int = 1000) -> Words:
    cuts = Cuts.of(tokenizer)
    assert cuts is not None
    return Words(tokenizer, cuts, num_words)


def check(words: Words, tokenizer: tokenizers.Tokenizer, texts: list[str]) -> None:
    flat, borders = words([text.encode() for text in texts])
    found = [ids.tolist() for ids in np.split(flat, borders)]
    whole = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    assert found == [encoding.ids for encoding in whole]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize("kind", KINDS)
def test_words_have_the_ids_of_whole_texts(
    kind: str, normalizer: normalizers.Normalizer | None
) -> None:
    """Of texts of white space, marks, letters of many kinds and added tokens, known or not."""
    tokenizer = tokenizer_of(KINDS[kind], normalizer, ignore_merges=normalizer is None)
    words = words_of(tokenizer)
    generator = random.Random(1)
    for _ in range(40):
        check(words, tokenizer, [text_of(generator, generator.randrange(16)) for _ in range(8)])
    assert words.held > 100


def test_words_that_a_normaliser_shortens_and_lengthens_keep_their_ids() -> None:
    """Three letters lose a byte each by NFC and one gains three: the sum of all is the same."""
    tokenizer = tokenizer_of(GPT_2, normalizers.NFC())
    check(words_of(tokenizer), tokenizer, ["e\u0301 be\u0301 ce\u0301 \u0958 the end"])


def test_padding_and_truncation_of_a_file_are_no_part_of_a_text() -> None:
    """Nor of its words: an encoder leaves both out."""
    tokenizer = tokenizer_of(GPT_2)
    text = "the the the aAb " * 9
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.enable_padding(length=512)
    tokenizer.enable_truncation(8)
    given = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    encode = Encoder(given, special_as_text=True)
    assert encode([text])[0].tolist() == whole


def test_no_more_words_are_remembered_than_there_is_room_for() -> None:
    """What has no room is encoded whenever it comes."""
    tokenizer = tokenizer_of(GPT_2)
    words = words_of(tokenizer, 20)
    generator = random.Random(2)
    for _ in range(30):
        check(words, tokenizer, [text_of(generator, 12)])
    assert 0 < words.held <= 20


def test_threads_share_the_words() -> None:
    """Threads that encode at once find what each of them finds alone."""
    tokenizer = tokenizer_of(GPT_2)
    words = words_of(tokenizer)
    generator = random.Random(3)
    batches = [[text_of(generator, 20) for _ in range(10)] for _ in range(40)]
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(check, words, tokenizer, batch) for batch in batches]:
            done.result()


def bare(model: models.Model, splitter: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    return tokenizer


def with_a_letter_that_nfc_makes() -> tokenizers.Tokenizer:
    tokenizer = tokenizer_of(GPT_2, normalizers.NFC())
    tokenizer.add_tokens(["<K>"])
    return tokenizer


UNKNOWN = pre_tokenizers.Split(Regex(r"\w+\s\w+|\s+|."), "isolated")
OTHERS = {
    "lower case": lambda: tokenizer_of(GPT_2, normalizers.Lowercase()),
    "another pattern": lambda: tokenizer_of(pre_tokenizers.Sequence([UNKNOWN, BARE])),
    "no pattern": lambda: tokenizer_of(BARE),
    "a space before": lambda: tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "dropout": lambda: tokenizer_of(GPT_2, dropout=0.1),
    "bytes of its own": lambda: tokenizer_of(GPT_2, byte_fallback=True),
    "ends of words": lambda: bare(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"), GPT_2),
    "unknown": lambda: bare(models.BPE({"a": 0, "?": 1}, [], unk_token="?"), GPT_2),
    "Metaspace": lambda: bare(models.BPE({"a": 0}, []), pre_tokenizers.Metaspace()),
    "Unigram": lambda: bare(models.Unigram([("a", 0.0)]), pre_tokenizers.Metaspace()),
    "WordPiece": lambda: bare(
        models.WordPiece({"a": 0, "?": 1}, unk_token="?"), pre_tokenizers.BertPreTokenizer()
    ),
    "letters of NFC": with_a_letter_that_nfc_makes,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_no_cuts_are_known_of_other_tokenizers(kind: str) -> None:
    """Of which words may depend on the words beside them, or need not be what the text says."""
    assert Cuts.of(OTHERS[kind]()) is None
