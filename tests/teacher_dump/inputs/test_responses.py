"""Claims about prompt + response: the two are one text, of which the response is learnt."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from decant.teacher_dump.inputs.records import SourceError
from tests.support.records import BOS, EOS, TOKENIZER, bare, one, record


def test_prompt_and_response_are_read_as_one_text():
    """They are tokenised together; a token across their border is a target."""
    whole = bare("hello you")
    assert bare("hel") + bare("lo you") != whole
    fields = record(prompt="hel", response="lo you")
    assert one(fields) == ([BOS, *whole, EOS], [*whole, EOS])
    prompt, response = bare("hello"), bare(" you")
    assert prompt + response == whole
    fields = record(prompt="hello", response=" you")
    assert one(fields) == ([BOS, *whole, EOS], [*response, EOS])
    assert one(fields, targets="all")[1] == [*whole, EOS]
    assert one(fields, add_eos=False)[1] == response


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.text(max_size=12))
def test_no_letter_of_a_response_is_left_out(prompt, response):
    """Whatever the letters, the targets hold the response, and at most a token's rest besides."""
    prompt, response = (text.replace("<", "") for text in (prompt, response))
    ids, targets = one(record(prompt=prompt, response=response))
    assert ids == [BOS, *bare(prompt + response), EOS]
    learnt = TOKENIZER.decode(targets)
    assert learnt.endswith(response + "</s>")
    besides = learnt.removesuffix(response + "</s>").strip("\ufffd")  # bytes of a letter
    assert prompt.endswith(besides) and len(besides) < 12


def metaspace_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """Words with a space before each, as Llama 2, Mistral and Phi-3 have them, and bytes."""
    words = ["the", "fox", "runs", "away", "Q", ":", "A", "."]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁"]
    vocab += [f"▁{word}" for word in words] + words
    tokenizer = Tokenizer(
        models.Unigram([(token, -float(len(vocab) - n)) for n, token in enumerate(vocab)], 0, True)
    )
    if scheme == "normalizer":
        marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(marks)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = bos
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("scheme", ["always", "first", "normalizer"])
@pytest.mark.parametrize(
    ("prompt", "response", "learnt"),
    [
        ("Q: fox A:", "runs away", "runs▁away</s>"),
        ("Q: fox A:", " runs away", "▁runs▁away</s>"),
        ("Q: fox A: ", "runs away", "▁runs▁away</s>"),
        ("Q: fox\nA:", "é 中", "é▁中</s>"),
        ("", "fox", "▁fox</s>"),
    ],
)
def test_no_token_is_between_a_prompt_and_its_response(scheme, prompt, response, learnt):
    """Tokenizers that put a space before a text put none before a response."""
    tokenizer = metaspace_tokenizer(scheme)
    ids, targets = one(record(prompt=prompt, response=response), tokenizer=tokenizer)
    assert ids == [*tokenizer(prompt + response)["input_ids"], 2]
    tokens = "".join(
        bytes([int(token[3:5], 16)]).decode("latin-1") if token.startswith("<0x") else token
        for token in tokenizer.convert_ids_to_tokens(targets)
    )
    plain = learnt.replace("é", "Ã©").replace("中", "ä¸\xad")
    assert tokens == plain


class Slow:
    """A tokenizer without offsets: a word, with the space before it, is a token."""

    is_fast = False
    bos_token_id, eos_token_id, unk_token_id = None, 0, None
    chat_template = None
    added_tokens_decoder = {0: "</s>"}  # noqa: RUF012
    all_special_tokens = ("</s>",)

    def __init__(self, *, space_first: bool) -> None:
        """`space_first`: put a space before every text."""
        self.space_first = space_first
        self.words = ["</s>"]

    def __call__(self, texts, **_):
        if isinstance(texts, str):
            return {"input_ids": self(texts=[texts])["input_ids"][0]}
        return {"input_ids": [self._ids(text) for text in texts]}

    def _ids(self, text: str) -> list[int]:
        words = re.findall(r"\s?\S+|\s", " " * self.space_first + text)
        self.words += [word for word in dict.fromkeys(words) if word not in self.words]
        return [self.words.index(word) for word in words]

    def decode(self, ids, **_) -> str:
        text = "".join(self.words[i] for i in ids)
        return text.removeprefix(" " * self.space_first)


def test_without_offsets_prompt_and_response_are_joined_if_they_may_be():
    """Where joining gives the same text, the border is between the two; elsewhere it is refused."""
    slow = Slow(space_first=False)
    ids, targets = one(record(prompt="a b", response=" c d"), tokenizer=slow)
    assert (slow.decode(ids), slow.decode(targets)) == ("a b c d</s>", " c d</s>")
    with pytest.raises(SourceError, match=r"no character offsets.*makes other text together"):
        one(record(prompt="a b", response="c d"), tokenizer=Slow(space_first=True))


def test_an_empty_prompt_leaves_the_response_whole():
    """Without a prompt, all but the very first token is a target."""
    assert one(record(prompt="", response="hello you"))[1] == [*bare("hello you"), EOS]
