"""Encoding word by word: the ids are those of whole texts."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from decant.student_train.alignment.words import PATTERNS, Cuts, Words

PARTS = [
    *"aAbzZsltdmTS''.,;(/-_\\\"<|>\n\r\t  0957",
    *"٣²\u00a0\u3000\u2028\u0085\u200b\x00\x1céеǅʰ日😀\u0301",
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
    splitter: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on texts of the parts."""
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
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
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
    tokenizer = tokenizer_of(KINDS[kind], normalizer)
    words = words_of(tokenizer)
    generator = random.Random(1)
    for _ in range(150):
        check(words, tokenizer, [text_of(generator, generator.randrange(16)) for _ in range(8)])
    assert words.held > 100


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


def _with_suffix() -> tokenizers.Tokenizer:
    tokenizer = tokenizer_of(GPT_2)
    tokenizer.model = models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>")
    return tokenizer


def _lower() -> tokenizers.Tokenizer:
    return tokenizer_of(GPT_2, normalizers.Lowercase())


def _unknown_pattern() -> tokenizers.Tokenizer:
    splitter = pre_tokenizers.Split(Regex(r"\w+\s\w+|\s+|."), "isolated")
    return tokenizer_of(pre_tokenizers.Sequence([splitter, BARE]))


def _no_pattern() -> tokenizers.Tokenizer:
    return tokenizer_of(BARE)


def _space_before() -> tokenizers.Tokenizer:
    return tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=True))


@pytest.mark.parametrize(
    "made", [_with_suffix, _lower, _unknown_pattern, _no_pattern, _space_before]
)
def test_no_cuts_are_known_of_other_tokenizers(made: object) -> None:
    """Of which words may depend on the words beside them, or need not be what the text says."""
    assert callable(made)
    assert Cuts.of(made()) is None
