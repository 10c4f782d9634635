"""Which differences between two tokenizers change what an id means, and which are choices."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from decant.schemas import FormatError, check_same_tokenizer, tokenizer_fingerprint
from tests.support.models import VOCAB_SIZE, build_tokenizer

Change = Callable[[Any], object]


def with_bos_before(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )


def changed(*changes: Change) -> Any:
    tokenizer = build_tokenizer()
    for change in changes:
        change(tokenizer)
    return tokenizer


CHOICES: list[tuple[Change, str]] = [
    (
        lambda t: setattr(t, "eos_token", "<|end|>"),
        "eos_token '<|end|>' where the cache has '</s>'",
    ),
    (
        lambda t: setattr(t, "bos_token", "<|start|>"),
        "bos_token '<|start|>' where the cache has '<s>'",
    ),
    (lambda t: setattr(t, "pad_token", "<s>"), "pad_token '<s>' where the cache has '</s>'"),
    (lambda t: setattr(t, "unk_token", "<s>"), "unk_token '<s>' where the cache has None"),
    (lambda t: setattr(t, "chat_template", None), "another chat template"),
    (
        with_bos_before,
        "a text is put between <s> and nothing where the cache has nothing and nothing",
    ),
    (
        lambda t: t.backend_tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True)]),
        "other flags of the added tokens '<|end|>'",
    ),
    (lambda t: t.add_special_tokens({"pad_token": "[PAD]"}), "1 tokens more: '[PAD]' (300)"),
    (
        lambda t: t.add_tokens([f"<think {i}>" for i in range(5)]),
        "5 tokens more: '<think 0>' (300), '<think 1>' (301), '<think 2>' (302) and 2 more",
    ),
]
"""A change, and what is said of it."""


@pytest.mark.parametrize(("change", "said"), CHOICES, ids=[said[:20] for _, said in CHOICES])
def test_choices_leave_every_id_as_it_is(change: Change, said: str) -> None:
    """Special tokens, templates and further tokens are told, and no mismatch."""
    same = check_same_tokenizer(build_tokenizer(), changed(change), "CACHE")
    expected = said
    if tokenizer_fingerprint(build_tokenizer()) == tokenizer_fingerprint(changed(change)):
        expected = ""  # what no id depends on is not even looked at
    assert expected in same.text() and bool(expected) == bool(same.text())
    assert all(index >= VOCAB_SIZE for index in same.more.values())


def test_all_choices_at_once_are_told() -> None:
    """As between a base model and its instruction-tuned one."""
    same = check_same_tokenizer(build_tokenizer(), changed(*[c for c, _ in CHOICES[:5]]), "CACHE")
    assert all(said in same.text() for _, said in CHOICES[:5]), same.text()


def test_ids_that_stand_nowhere_in_the_cache_do_not_count() -> None:
    """A token beyond the shared vocabulary may be another one, or none, to the student."""
    teacher = changed(lambda t: t.add_tokens(["<image>"]))
    with pytest.raises(FormatError, match="1 ids differ, first 300: '<image>' vs None"):
        check_same_tokenizer(teacher, build_tokenizer(), "CACHE")
    same = check_same_tokenizer(teacher, build_tokenizer(), "CACHE", vocab_size=VOCAB_SIZE)
    assert same.more == {} and "without '<image>'" in same.text()
    other = changed(lambda t: t.add_tokens(["<think>"]))
    same = check_same_tokenizer(teacher, other, "CACHE", vocab_size=VOCAB_SIZE)
    assert same.more == {"<think>": 300}


def unigram(score: float) -> Any:
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("b", score), ("ab", -9.0)]
    tokenizer = Tokenizer(Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def renamed(tokenizer: Any) -> Any:
    text = tokenizer.backend_tokenizer.to_str().replace("<|end|>", "<|stop|>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="</s>")


@pytest.mark.parametrize(
    ("student", "match"),
    [
        (lambda: build_tokenizer(280), r"\d+ ids differ, first 2\d\d: '.*' vs None"),
        (lambda: renamed(build_tokenizer()), r"1 ids differ, first 3: '<\|end\|>' vs '<\|stop\|>'"),
        (
            lambda: changed(
                lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase())
            ),
            "texts become other ids: 'déjà vu.*Ωμέγα.*ωμέγα",
        ),
        (
            lambda: changed(
                lambda t: setattr(t.backend_tokenizer, "decoder", decoders.Sequence([]))
            ),
            "texts become other ids: .* comes back as",
        ),
    ],
    ids=["vocabulary", "name", "normaliser", "decoder"],
)
def test_what_changes_an_id_is_refused(student: Callable[[], Any], match: str) -> None:
    """With the first difference, the cache's side first."""
    with pytest.raises(FormatError, match=f"CACHE was dumped with another tokenizer.*{match}"):
        check_same_tokenizer(build_tokenizer(), student(), "CACHE")


def test_other_scores_are_refused() -> None:
    """A unigram model splits by them."""
    with pytest.raises(FormatError, match=r"scores differ: number 3 is \['b', -3.0\] vs"):
        check_same_tokenizer(unigram(-3.0), unigram(-4.0), "CACHE")
