"""Claims about which tokens hold which characters."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from decant.teacher_dump.inputs.chats import Chats
from decant.teacher_dump.inputs.offsets import OffsetTokenizer, tokens_in_spans
from decant.teacher_dump.inputs.records import Record

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = ["<unk>", "<s>", USER, ASSISTANT, END]
LETTERS = "abcdehlortuw."
MERGES = [("h", "e"), ("l", "l"), ("o", "."), ("a", "b")]


def byte_level(*, normalizer: Any = None) -> Tokenizer:
    """Every byte a token, some letters merged; trims spaces from its offsets as Llama 3 does."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(m) for m in MERGES]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def metaspace(*, scheme: str) -> Tokenizer:
    """What Llama 2 and Mistral have: spaces as a letter, one before every text, bytes at need."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    for token in [*bytes_, "▁", *LETTERS, *("".join(m) for m in MERGES), "▁h"]:
        vocabulary[token] = len(vocabulary)
    model = models.BPE(vocabulary, [*MERGES, ("▁", "h")], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if scheme == "legacy":
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers has it."""
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=END)


REMOVING = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace("\u200b", ""), normalizers.Replace("\r\n", "\n")]
)
TOKENIZERS = {
    "bytes": wrapped(byte_level()),
    "bytes, NFC": wrapped(byte_level(normalizer=REMOVING)),
    "metaspace, always": wrapped(metaspace(scheme="always")),
    "metaspace, first": wrapped(metaspace(scheme="first")),
    "metaspace, legacy": wrapped(metaspace(scheme="legacy")),
}

PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
BLOCKS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
CONTENT_BLOCKS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|end|>' }}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
UNSTABLE = "{{ '<s>' * (messages | length) }}" + PLAIN
"""What stands before depends on what follows, so that no rendering begins like another."""
TEMPLATES = {
    "plain": PLAIN + PROMPT,
    "blocks": BLOCKS,
    "content blocks": CONTENT_BLOCKS,
    "unstable": UNSTABLE + PROMPT,
}

SPEECHES = st.one_of(
    st.text(
        st.characters(codec="utf-8", exclude_characters="<\ufdd0\ufdd1", exclude_categories=["Cn"]),
        max_size=12,
    ),
    st.text("he.ab \n\r😀中e\u0301\u0338\u200b👩‍👧", max_size=12),
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(SPEECHES, min_size=1, max_size=5), assistant_first=st.booleans())
def test_masks_are_exact_for_every_text(name, template, contents, assistant_first):
    """Whatever is said, and whoever speaks first, exactly the tokens of the answers are targets.

    Special tokens cut the text, so each message alone gives its tokens.
    """
    tokenizer = TOKENIZERS[name]
    tokenizer.chat_template = TEMPLATES[template]
    roles = ["assistant", "user"] if assistant_first else ["user", "assistant"]
    chat = [{"role": roles[n % 2], "content": words} for n, words in enumerate(contents)]
    chats = Chats(tokenizer, targets="response", chat_template_kwargs={}, chat_date="")
    [(ids, mask)] = chats.encode([Record("x", {"messages": chat}, "line 1")])
    expected = [(1, False)] * (len(chat) if template == "unstable" else 0)
    for message in chat:
        header = f"<|{message['role']}|>"
        alone = tokenizer(header + message["content"] + END, add_special_tokens=False)["input_ids"]
        is_answer = message["role"] == "assistant"
        expected += [(alone[0], False), *((i, is_answer) for i in alone[1:-1])]
        expected.append((alone[-1], is_answer and template != "content blocks"))
    assert list(zip(ids.tolist(), mask.tolist(), strict=True)) == expected


def test_a_token_counts_by_any_of_its_characters():
    """A token that straddles either border of a span counts, one beside it does not."""
    offsets = np.array([(0, 3), (3, 6), (6, 9), (9, 9), (9, 12)])
    assert tokens_in_spans(offsets, [(3, 6)]).tolist() == [False, True, False, False, False]
    assert tokens_in_spans(offsets, [(5, 7)]).tolist() == [False, True, True, False, False]
    assert tokens_in_spans(offsets, [(9, 12)]).tolist() == [False, False, False, True, True]
    assert tokens_in_spans(offsets, [(0, 1), (11, 12)]).tolist() == [True, *[False] * 3, True]
    assert not tokens_in_spans(offsets, [(4, 4)]).any()
    assert tokens_in_spans(np.zeros((0, 2), dtype=np.int64), [(0, 1)]).shape == (0,)


def test_a_response_is_cut_from_one_text():
    """Prompt and response tokenised as one text lose nothing where they share a token."""
    tokenizer = TOKENIZERS["metaspace, always"]
    tokens = OffsetTokenizer(tokenizer)
    prompt, response = "a ", "hoh"
    [(ids, offsets)] = tokens([prompt + response])
    mask = tokens_in_spans(offsets, [(len(prompt), len(prompt + response))])
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "a", "▁h", "o", "h"]
    assert tokenizer.convert_ids_to_tokens(ids[mask]) == ["▁h", "o", "h"]
    assert tokens([]) == []


@pytest.mark.parametrize("spaces", [" ", "\n  ", ""])
def test_spaces_that_a_special_token_swallows_are_not_its_own(spaces):
    """The tokens of Phi-3 take the spaces beside them; the header of an answer is not a target."""
    tokenizer = byte_level()
    swallowing = [AddedToken(t, special=True, rstrip=True) for t in (USER, ASSISTANT, END)]
    tokenizer.add_special_tokens([*swallowing, AddedToken("<s>", special=True, lstrip=True)])
    phi = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    phi.chat_template = PLAIN.replace("'<|end|>' }}", "'<|end|>\\n<s>' }}") + PROMPT
    chats = Chats(phi, targets="response", chat_template_kwargs={}, chat_date="")
    chat = [
        {"role": "user", "content": spaces + "he"},
        {"role": "assistant", "content": spaces + "he" + spaces},
        {"role": "user", "content": "he"},
    ]
    [(ids, mask)] = chats.encode([Record("x", {"messages": chat}, "line 1")])
    targets = phi.convert_ids_to_tokens(ids[mask])
    assert (targets[0], targets[-2:]) == ("he", [END, "<s>"])
    assert ASSISTANT not in targets and USER not in targets


def test_a_tokenizer_without_offsets_is_refused():
    """Without offsets the way out is named."""
    with pytest.raises(ValueError, match=r"no character offsets.* fast version.* targets: all"):
        OffsetTokenizer(object())
