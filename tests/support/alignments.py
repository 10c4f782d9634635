"""Two tokenisers of a few letters, rows of a cache made by hand, and what their chunks must hold.

The reference enumerates what either side may say, one string at a time, in plain Python.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from decant.schemas import Distributions
from decant.storage.cache.rows import Rows
from decant.student_train.alignment.events import Matching, last_rows
from decant.student_train.alignment.pieces import Aligned, Pieces, aligned
from decant.student_train.alignment.token_bytes import TokenTable
from decant.student_train.losses import EventTargets

END = "<end>"
TEACHER = [END, "a", "b", "c", "ab", "bc", "abc", "ca", "cab"]
STUDENT = ["a", "c", "b", END, "aa", "abc", "cc", "bca", "ca", "bb"]


def letters(tokens: Sequence[str]) -> Any:
    """A tokenizer of these tokens, the end among them."""
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END])
    return SimpleNamespace(backend_tokenizer=backend, special_tokens_map={"eos_token": END})


def table(tokens: Sequence[str]) -> TokenTable:
    """The table of one."""
    return TokenTable.of(letters(tokens), "letters")


def split(text: str, tokens: Sequence[str], generator: np.random.Generator) -> list[int]:
    """Some way of writing a text in tokens, which need not be the tokenizer's own."""
    ids: list[int] = []
    while text:
        fitting = [i for i, token in enumerate(tokens) if text.startswith(token)]
        ids.append(int(generator.choice(fitting)))
        text = text[len(tokens[ids[-1]]) :]
    return ids


def rows_of(ids: Sequence[int], dense: NDArray[np.float64], k: int) -> Rows:
    """One sequence whose tokens are all targets, each with its top k of the dense log probs."""
    order = np.argsort(-dense, axis=1)[:, :k].astype(np.int32)
    kept = np.take_along_axis(dense, order, axis=1)
    rest = dense.copy()
    np.put_along_axis(rest, order.astype(np.int64), -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.exp(rest).sum(axis=1))
    label = dense[np.arange(len(ids)), ids]
    return Rows(
        sequence=np.zeros(1, np.int64),
        sample_ids=["sample"],
        row_starts=np.array([0, len(ids)]),
        target_starts=np.array([0, len(ids)]),
        input_ids=np.array(ids, np.int32),
        is_target=np.ones(len(ids), np.bool_),
        positions=np.arange(len(ids), dtype=np.int32),
        token_ids=order,
        logprobs=kept if k else None,
        log_z=np.zeros((len(ids), 1)),
        log_tail=log_tail[:, None] if k else None,
        label_logprob=label,
    )


def at_ends(both: Aligned, rows: Rows) -> Distributions[Any]:
    """The distributions of the last tokens of chunks, where every row is a target."""
    ends = last_rows(both)
    return Distributions(**{name: values[ends] for name, values in rows.known().items()})


def both_of(teacher_ids: Sequence[int], student_ids: Sequence[int], matching: Matching) -> Aligned:
    """One text in two tokenisations, ended on both sides."""
    pieces = Pieces()
    last = len(teacher_ids) - 1
    ours = np.array(student_ids, np.int64)
    pieces.add(0, ours[:-1], teacher=(0, last))
    pieces.add(0, ours[-1:], is_special=True, teacher=(last, 1))
    ids = np.array(teacher_ids, np.int64)
    return aligned(pieces, 1, ids, matching.teacher, matching.student)


def event_targets(both: Aligned, events: Any) -> EventTargets:
    """What the loss takes; the student's rows are those of the chunks."""
    return EventTargets(
        token_ids=torch.from_numpy(events.token_ids).long(),
        log_p=torch.from_numpy(events.log_p),
        log_rest=torch.from_numpy(events.log_rest),
        labels=torch.from_numpy(both.student.ids),
        sizes=torch.from_numpy(both.chunks.num_student),
    )


def enumerated(
    labels: Sequence[int], log_probs: NDArray[np.float64], tokens: Sequence[str]
) -> tuple[dict[tuple[str, int], float], float]:
    """What one side may say in a chunk in which `labels` was said: {(string, last id): mass}.

    The other number is the mass of all that leaves the labels before the last.
    """
    left, mass = 0.0, 1.0
    for label, row in zip(labels[:-1], log_probs[:-1], strict=True):
        for other in range(len(tokens)):
            if other != label:
                left += mass * math.exp(row[other])
        mass *= math.exp(row[label])
    prefix = "".join(tokens[i] for i in labels[:-1])
    said = {
        (prefix + token, i): mass * math.exp(log_probs[-1][i]) for i, token in enumerate(tokens)
    }
    return said, left


def reference_classes(
    teacher_labels: Sequence[int],
    student_labels: Sequence[int],
    log_p: NDArray[np.float64],
    log_q: NDArray[np.float64],
    k: int,
) -> tuple[list[float], list[float]]:
    """P and Q of every event of a chunk, by P, and of all the rest."""
    kept = set(np.argsort(-log_p[-1])[:k].tolist())
    one = len(teacher_labels) == len(student_labels) == 1
    said_t, rest_p = enumerated(teacher_labels, log_p, TEACHER)
    said_s, rest_q = enumerated(student_labels, log_q, STUDENT)
    ours = {string: (i, mass) for (string, i), mass in said_s.items()}
    found = {s: m for (s, i), m in said_t.items() if i in kept and s in ours}
    observed = "".join(TEACHER[i] for i in teacher_labels)
    if not one or not found:
        found[observed] = said_t[observed, teacher_labels[-1]]
    events = sorted(found, key=lambda string: -found[string])
    p = [found[s] for s in events]
    q = [ours[s][1] for s in events]
    for (string, _), mass in said_t.items():
        rest_p += mass * (string not in found)
    for (string, _), mass in said_s.items():
        rest_q += mass * (string not in found)
    return [*p, rest_p], [*q, rest_q]


SAMPLE_TEXTS = (
    "the quick brown fox jumps over a lazy dog 2017 2018 201 in 3.14159",
    "def f(x):\n    return {'a': [x] * 2}  # comment\r\n\tpass",
    "naïve façade nai\u0308ve 日本語 中文文本 👩‍👩‍👧‍👦 🇫🇷 émoji",
)


def byte_level(vocab_size: int, *, digits: bool = False, bos: bool = False) -> Any:
    """A byte-level BPE of `SAMPLE_TEXTS`, which may cut numbers into digits, or begin with bos."""
    backend = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        SAMPLE_TEXTS * 2,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return SimpleNamespace(
        backend_tokenizer=backend, special_tokens_map={"bos_token": "<s>", "eos_token": END}
    )


def with_spaces(vocab_size: int = 330) -> Any:
    """A BPE as of sentencepiece: a mark for spaces, one put before a text, byte fallback."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        SAMPLE_TEXTS[:2] * 2, trainers.BpeTrainer(vocab_size=vocab_size - 256, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", END, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(dict.fromkeys(tokens))},
            [tuple(pair) for pair in model["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", END])
    return SimpleNamespace(
        backend_tokenizer=backend,
        special_tokens_map={"bos_token": "<s>", "eos_token": END, "unk_token": "<unk>"},
    )


def unigram(prepend_scheme: Any = "always", *, fallback: bool = True) -> Any:
    """A Unigram as of sentencepiece, whose pre-tokenizer puts the space; perhaps byte fallback."""
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    trained.train_from_iterator(
        SAMPLE_TEXTS[:2] * 2,
        trainers.UnigramTrainer(
            vocab_size=60,
            special_tokens=["<unk>", "<s>", END],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    scores = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["vocab"]]
    scores[3:3] = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] if fallback else []
    backend = tokenizers.Tokenizer(models.Unigram(scores, 0, fallback))
    backend.pre_tokenizer = trained.pre_tokenizer
    spaces = decoders.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), spaces])
    backend.add_special_tokens(["<unk>", "<s>", END])
    return SimpleNamespace(
        backend_tokenizer=backend, special_tokens_map={"eos_token": END, "unk_token": "<unk>"}
    )


def by_regex(vocab_size: int = 330) -> Any:
    """A byte-level BPE that cuts as those of tiktoken do: by an expression of its own."""
    tokenizer = byte_level(vocab_size)
    expression = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def with_prefix_space() -> Any:
    """A byte-level BPE that puts a space before a text, and leaves it there when it decodes."""
    tokenizer = byte_level(330)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def with_added_tokens(tokenizer: Any) -> Any:
    """The same with added tokens that are text."""
    tokenizer.backend_tokenizer.add_tokens(["  ", "brown fox", "<tool>", "日本"])
    return tokenizer


FAMILIES = {
    "byte-level that puts a space": with_prefix_space,
    "byte-level by an expression": by_regex,
    "byte-level with added tokens": lambda: with_added_tokens(byte_level(330)),
    "spaces": with_spaces,
    "spaces with added tokens": lambda: with_added_tokens(with_spaces()),
    "unigram, always": lambda: unigram("always"),
    "unigram, first": lambda: unigram("first"),
    "unigram, never": lambda: unigram("never"),
}
"""Tokenizers that lose no text, but for marks of spaces."""


def text_rows(texts: Sequence[str], tokenizer: Any) -> Any:
    """Sequences of texts, as far as their tokens go."""
    backend = tokenizer.backend_tokenizer
    encoded = [backend.encode(t, add_special_tokens=False).ids for t in texts]
    return SimpleNamespace(
        sample_ids=[f"text-{number}" for number in range(len(texts))],
        row_starts=np.append(0, np.cumsum([len(ids) for ids in encoded])),
        token_id=np.concatenate([np.array(ids, np.int32) for ids in encoded]),
    )


def save(tokenizer: Any, folder: Path, chat_template: str = "") -> None:
    """Write a tokenizer so that transformers and `TokenizerFiles` load it."""
    names = {"bos_token": "<s>", "eos_token": END, "unk_token": "<unk>"}
    given = {name: tokenizer.special_tokens_map.get(name) for name in names}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **{k: v for k, v in given.items() if v}
    )
    if chat_template:
        wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)
