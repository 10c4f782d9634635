"""Caches aligned with students: what becomes of them, and what cannot be aligned."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, normalizers

from decant.schemas import TokenizerInfo, Truncation
from decant.storage import CacheReader
from decant.storage.cache.plan import plan_of
from decant.storage.cache.tokenizer_files import TokenizerFiles
from decant.storage.cache.writer import write_cache
from decant.storage.files.store import Store
from decant.student_train import CacheStream
from decant.student_train.alignment.aligner import Aligner
from decant.student_train.alignment.token_bytes import TokenTable
from decant.student_train.data.collate_events import collate_events, own_events
from decant.student_train.losses import (
    DIVERGENCES,
    fused_linear_divergence,
    sparse_divergence,
)
from tests.support import alignments, caches
from tests.support.models import build_tokenizer

TEACHER = alignments.byte_level(380)
STUDENT = alignments.byte_level(300, digits=True)


def cache_of(
    path: Path,
    texts: list[str],
    tokenizer: Any = TEACHER,
    truncation: Truncation | None = None,
    *,
    keep_tokenizer: bool = True,
    end: bool = False,
) -> CacheReader:
    """A cache of these texts with random distributions, and of a tokenizer's files."""
    truncation = truncation or Truncation(k=6)
    alignments.save(tokenizer, path.with_suffix(".tokenizer"))
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    settings = caches.Settings(truncation=truncation, vocab_size=size, temperatures=(1.0,))
    generator = np.random.default_rng(0)
    scored = []
    for number, text in enumerate(texts):
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ids += [tokenizer.backend_tokenizer.token_to_id(alignments.END)] * end
        is_target = np.arange(len(ids)) > 0
        dense = caches.random_logprobs(generator, len(ids) - 1, size)
        tokens = np.array(ids, np.int32)
        name = f"text-{number}"
        scored.append(caches.scored_sequence(dense, tokens, is_target, settings, name, generator))
    info = TokenizerInfo(fingerprint="", files={})
    if keep_tokenizer:
        info = TokenizerFiles.read(str(path.with_suffix(".tokenizer"))).save(Store(path))
    draft = dataclasses.replace(settings.draft(), tokenizer=info)
    write_cache(path, draft, scored, plan_of([scored]))
    return CacheReader(path)


def rows_of(reader: CacheReader) -> Any:
    return reader.read_stored(reader.row_groups()[0])


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    texts = [f"the lazy dog 201{i} in {i} woods 日本 é" for i in range(6)]
    return cache_of(tmp_path_factory.mktemp("align") / "cache", texts, end=True)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_tokenizers_give_todays_loss(cache: Path, kind: str) -> None:
    """Value and gradient of logits to 1e-6, of every kind; whether aligned or not."""
    reader = CacheReader(cache)
    plain = next(iter(CacheStream(cache, batch_size=4)))
    aligner = Aligner(reader, build_tokenizer(), where="itself")
    generator = torch.Generator().manual_seed(0)
    vocab_size = plain.vocab_size
    stream = CacheStream(
        cache, batch_size=4, alignment=lambda _: aligner, vocab_size=aligner.vocab_size
    )
    batch = next(iter(stream))
    assert batch.sample_ids == plain.sample_ids
    for name in ("input_ids", "predictors", "labels", "label_logprob"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name
    logits = 3 * torch.randn(plain.num_targets, vocab_size, generator=generator)
    found = []
    for targets in (plain.targets_at(1.0), batch.targets_at(1.0)):
        x = logits.clone().requires_grad_()
        loss = sparse_divergence(x, targets, kind)
        loss.sum().backward()
        found.append((loss.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_own_rows_as_events_are_their_own_targets(cache: Path) -> None:
    """Each kept id an event, the stored tail the rest: what mixtures make of a cache like that."""
    reader = CacheReader(cache)
    rows = own_events(rows_of(reader), reader.manifest.layout)
    batch = collate_events([(rows, 0), (rows, 1)], 300)
    both = [reader[0], reader[1]]
    np.testing.assert_array_equal(
        batch.events.token_ids, np.concatenate([s.token_ids for s in both])
    )
    np.testing.assert_array_equal(batch.labels, np.concatenate([s.labels for s in both]))
    np.testing.assert_array_equal(
        batch.events.log_rest, np.concatenate([s.log_tail[:, 0] for s in both])
    )


@pytest.mark.parametrize("kind", ["fkl", "akl"])
@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_the_fused_head_gives_the_plain_loss(
    reader: CacheReader, kind: str, chunk_size: int
) -> None:
    """With all gradients, the cross-entropy and weights per row; rows of a chunk stay together."""
    aligner = Aligner(reader, STUDENT, where="student")
    found = aligner(rows_of(reader))
    batch = collate_events([(found, i) for i in range(len(found))], aligner.vocab_size)
    assert int(batch.events.sizes.max()) > 1
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.num_targets, 8, generator=generator)
    head = torch.randn(aligner.vocab_size + 3, 8, generator=generator)
    weights = torch.rand(batch.num_targets, generator=generator)
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if fused:
            loss = fused_linear_divergence(
                h,
                w,
                batch.targets,
                batch.labels,
                kind,
                kd_weight=weights,
                ce_weight=0.5,
                chunk_size=chunk_size,
                vocab_size=aligner.vocab_size,
            ).loss
        else:
            logits = F.linear(h, w)[:, : aligner.vocab_size]
            kd = (weights * sparse_divergence(logits, batch.targets, kind)).sum()
            loss = (kd + 0.5 * F.cross_entropy(logits, batch.labels, reduction="sum")) / len(h)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_both_sides_say_their_own_tokens(reader: CacheReader) -> None:
    """Each chunk's log prob is the sum of the teacher's labels; the student reads the same text."""
    aligner = Aligner(reader, STUDENT, where="student")
    rows = rows_of(reader)
    found = aligner(rows)
    backend = STUDENT.backend_tokenizer
    for i, scored in enumerate(reader):
        chunks = slice(found.chunk_starts[i], found.chunk_starts[i + 1])
        ids = found.token_id[found.row_starts[i] : found.row_starts[i + 1]].tolist()
        text = TEACHER.backend_tokenizer.decode(
            scored.input_ids.tolist(), skip_special_tokens=False
        )
        assert backend.decode(ids, skip_special_tokens=False) == text
        assert ids[-1] == backend.token_to_id(alignments.END)
        # The teacher's first token is no target; whatever shares its chunk is in none.
        skipped = aligner.figures.targets - aligner.figures.targets_in_chunks
        assert skipped < 3 * len(rows)
        total = float(found.events.observed[chunks].sum())
        assert total >= float(scored.label_logprob.sum()) - 1e-3


def test_numerals_meet_digits(tmp_path: Path) -> None:
    """A whole numeral of the teacher's against digits: those that differ in the last are events."""
    vocabulary = TEACHER.backend_tokenizer.get_vocab()
    reader = cache_of(tmp_path / "cache", ["the 2018"], truncation=Truncation(k=len(vocabulary)))
    aligner = Aligner(reader, STUDENT, where="student")
    found = aligner(rows_of(reader))
    (chunk,) = np.flatnonzero(found.size == len(" 2018"))
    (target,) = np.flatnonzero(reader[0].labels == vocabulary["Ġ2018"])
    scored = reader[0]
    digits = {numeral[-1]: vocabulary[numeral] for numeral in ("Ġ2017", "Ġ2018")}
    for digit, numeral in digits.items():
        ours = STUDENT.backend_tokenizer.token_to_id(digit)
        (slot,) = np.flatnonzero(found.events.token_ids[chunk] == ours)
        (kept,) = np.flatnonzero(scored.token_ids[target] == numeral)
        assert found.events.log_p[chunk, slot] == scored.logprobs[target, kept]
    assert int((found.events.token_ids[chunk] >= 0).sum()) == 2


def test_labels_alone_give_chunks_of_two_classes(tmp_path: Path) -> None:
    """The likelihood of each chunk, from the smallest cache there is."""
    reader = cache_of(
        tmp_path / "cache", ["the lazy 2018 dog"], truncation=Truncation(method="label")
    )
    aligner = Aligner(reader, STUDENT, where="student")
    events = aligner(rows_of(reader)).events
    assert events.token_ids.shape[1] == 1 and (events.token_ids >= 0).all()
    np.testing.assert_allclose(np.exp(events.log_p[:, 0]), np.exp(events.observed), rtol=1e-6)
    np.testing.assert_allclose(np.exp(events.log_p[:, 0]) + np.exp(events.log_rest), 1, rtol=1e-6)


def test_a_sequence_that_was_cut_within_a_character_loses_that_alone(tmp_path: Path) -> None:
    """Its other tokens are aligned; the student never reads half a character."""
    texts = ["the dog 日本"] * 2
    alone = alignments.byte_level(260)
    reader = cache_of(tmp_path / "cache", texts, alone)
    rows = rows_of(reader)
    length = int(rows.row_starts[1])
    cut = dataclasses.replace(
        rows,
        row_starts=np.array([0, length, 2 * length - 1]),
        token_id=rows.token_id[: 2 * length - 1],
        is_target=rows.is_target[: 2 * length - 1],
    )
    found = Aligner(reader, STUDENT, where="student")(cut)
    ids = found.token_id[found.row_starts[1] : found.row_starts[2]].tolist()
    assert STUDENT.backend_tokenizer.decode(ids) == "the dog 日"


def test_a_sequence_that_cannot_be_aligned_keeps_its_place(tmp_path: Path) -> None:
    """With one token and no chunk; its reason is an example, and too many of them stop."""
    texts = ["the ½ dog" if i == 3 else "the dog" for i in range(30)]
    reader = cache_of(tmp_path / "cache", texts)
    changing = alignments.byte_level(300)
    changing.backend_tokenizer.normalizer = normalizers.NFKC()
    aligner = Aligner(reader, changing, where="student", max_left_out=0.05)
    found = aligner(rows_of(reader))
    assert np.diff(found.chunk_starts)[3] == 0 and np.diff(found.row_starts)[3] == 1
    assert (np.delete(np.diff(found.chunk_starts), 3) > 0).all()
    (example,) = aligner.figures.examples
    assert example.startswith("text-3: the student's tokenizer changes the text: ")
    assert "½" in example and aligner.figures.left_out == 1
    strict = Aligner(reader, changing, where="student", max_left_out=0.01)
    with pytest.raises(ValueError, match=r"1 of 30 sequences.*max_left_out 0\.01.*first: text-3"):
        strict(rows_of(reader))


def test_caches_and_tokenizers_that_cannot_be_aligned_are_refused(tmp_path: Path) -> None:
    """Each with what is wrong and the way out, before anything is trained."""
    drawn = cache_of(
        tmp_path / "drawn", ["the dog"], truncation=Truncation(method="sample", draws=4)
    )
    with pytest.raises(ValueError, match=r"holds draws .*method sample.*topk, topp or label"):
        Aligner(drawn, STUDENT, where="student")
    ready = cache_of(tmp_path / "ready", ["the dog"], keep_tokenizer=False)
    with pytest.raises(ValueError, match=r"holds no copy of its tokenizer.*dump again"):
        Aligner(ready, STUDENT, where="student")
    reader = cache_of(tmp_path / "cache", ["the dog"])
    endless = alignments.byte_level(300)
    endless.special_tokens_map = {}
    with pytest.raises(ValueError, match=r"of student names no end token .*eos_token"):
        Aligner(reader, endless, where="student")
    with pytest.raises(ValueError, match=r"no token of .* has the bytes of any token of student"):
        Aligner(reader, alignments.letters([alignments.END, "thequick"]), where="student")


@pytest.mark.parametrize("family", alignments.FAMILIES)
def test_tokenizers_of_other_families_are_aligned(family: str, tmp_path: Path) -> None:
    """On either side: nothing is left out, and the student reads the text that was scored."""
    other = alignments.FAMILIES[family]()
    texts = [
        "the lazy dog 2017 日本 é",
        "two  spaces\n\n tab\t",
        "a quick brown fox",
        "<tool> 👩‍👩",
    ]
    for teacher, student in ((TEACHER, other), (other, TEACHER)):
        reader = cache_of(tmp_path / f"cache-{teacher is other}", texts, teacher)
        found, figures = Aligner(reader, student, where="student").measured(rows_of(reader))
        assert figures.left_out == 0, figures.examples
        assert figures.targets_in_chunks > 0.5 * figures.targets
        table = TokenTable.of(student, "student")
        for text, start, stop in zip(texts, found.row_starts, found.row_starts[1:], strict=False):
            read = table.text_of(found.token_id[start:stop].astype(int))
            assert read.removeprefix(b" ") == text.encode()


def test_text_that_the_teacher_could_not_say_is_left_out(tmp_path: Path) -> None:
    """An unknown token is text that nobody knows, whatever the student's tokenizer names so."""
    reader = cache_of(tmp_path / "cache", ["the dog 日本"], alignments.unigram(fallback=False))
    student = alignments.unigram()
    aligner = Aligner(reader, student, where="student")
    with pytest.raises(
        ValueError, match=r"token <unk> stands for text .*what was there is unknown"
    ):
        aligner.refuse(aligner.measured(rows_of(reader))[1])


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_a_token_that_swallows_white_space_leaves_a_text_out(side: str, tmp_path: Path) -> None:
    """The teacher's: its text is not known. The student's: it changes the text. Never silently."""
    greedy = alignments.byte_level(380)
    greedy.backend_tokenizer.add_tokens([AddedToken("<tool>", **{side: True})])
    texts = ["the  <tool>  dog", "the lazy dog"]
    for teacher, student, reason in (
        (greedy, STUDENT, "the teacher's token <tool> swallows white space beside it"),
        (TEACHER, greedy, "the student's tokenizer changes the text"),
    ):
        reader = cache_of(tmp_path / f"cache-{teacher is greedy}", texts, teacher)
        figures = Aligner(reader, student, where="student").measured(rows_of(reader))[1]
        assert figures.left_out == 1
        assert figures.examples[0].startswith(f"text-0: {reason}")


def test_messages_that_are_unknown_are_asked_for(tmp_path: Path) -> None:
    """A special token of a chat template has no counterpart: it never becomes text."""
    chatty = alignments.byte_level(380)
    chatty.backend_tokenizer.add_special_tokens(["<|im_start|>"])
    reader = cache_of(tmp_path / "cache", ["<|im_start|>the dog"] * 3, chatty)
    aligner = Aligner(reader, STUDENT, where="student")
    with pytest.raises(ValueError, match=r"<\|im_start\|>.*messages of this sequence are unknown"):
        aligner.refuse(aligner.measured(rows_of(reader))[1])


def test_other_temperatures_are_refused(reader: CacheReader) -> None:
    """With why: a product of tempered probabilities is that of no string."""
    aligner = Aligner(reader, STUDENT, where="student")
    with pytest.raises(
        ValueError, match=r"temperature 2: .*another tokenizer.*loss.temperature to 1"
    ):
        CacheStream(
            reader.url, batch_size=1, temperature=2.0, alignment=lambda _: aligner, vocab_size=300
        )
