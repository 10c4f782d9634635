"""Claims about sequences that a teacher cannot score: found, named, left out, and nothing else.

The teacher is a real one; what ails it is a hook on its embedding, as a kernel would fail there.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decant.schemas import FormatError, ScoredSequence, Truncation
from decant.storage import CacheReader, CacheWriter, verify
from decant.storage.cache import paths
from decant.storage.cache.records import Rewritten
from decant.teacher_dump import DumpConfig, EngineError, TeacherConfig, dump
from decant.teacher_dump.engines import Engine, open_engine
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.job.isolate import FEW, Isolator, Rejection, TooManyRejected
from tests.support import models

V = models.VOCAB_SIZE
BAD = 77
"""The token on which the teacher fails."""


@pytest.fixture(scope="module")
def engine(teacher_path: Path) -> Engine:
    """Batches of a few sequences."""
    return open_engine(
        TeacherConfig(path=str(teacher_path), dtype="float32", max_batch_tokens=64),
        str(teacher_path),
        vocab_size=V,
        truncation=Truncation(method="sample", draws=8, seed=3),
        temperatures=(1.0,),
        max_length=32,
    )


def sequences_of(count: int, bad: set[int] = frozenset()) -> list[TokenSequence]:  # type: ignore[assignment]
    """Random ones of uneven length; those that are `bad` hold the token."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        ids = rng.integers(4, BAD, int(rng.integers(3, 30))).astype(np.int32)
        if index in bad:
            ids[1] = BAD
        made.append(TokenSequence(f"sample-{index}", ids, np.arange(len(ids)) > 0))
    return made


@contextmanager
def failing(when: Callable[[torch.Tensor], bool], error: str = "the kernel failed") -> Iterator:
    """Every embedding of this process fails on these ids; gives how often it was called."""
    calls: list[int] = []

    def fail(module: torch.nn.Module, arguments: tuple) -> None:
        if isinstance(module, torch.nn.Embedding):
            calls.append(arguments[0].shape[0])
            if when(arguments[0]):
                raise RuntimeError(error)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(fail)
    try:
        yield calls
    finally:
        handle.remove()


def has_bad(ids: torch.Tensor) -> bool:
    """Whether the token is among them."""
    return bool((ids == BAD).any())


def outcome(results: list[ScoredSequence | Rejection]) -> list[str]:
    """The sample of each, with a ! where it was rejected."""
    return [
        f"!{r.sequence.sample_id}" if isinstance(r, Rejection) else r.sample_id for r in results
    ]


@pytest.mark.parametrize("bad", [{0}, {39}, {17}, {0, 1, 2}, {5, 20, 21}, {3, 39}])
def test_the_bad_ones_and_only_they_are_rejected(engine: Engine, bad: set[int]):
    """In plan order; the others are what they are without them, to the draw."""
    sequences = sequences_of(40, bad)
    clean = list(engine.score(sequences_of(40), 100))
    with failing(has_bad) as calls:
        results = list(Isolator(engine, 0.2).score(sequences, 100))
    assert outcome(results) == [f"{'!' * (i in bad)}sample-{i}" for i in range(40)]
    for index, (result, expected) in enumerate(zip(results, clean, strict=True)):
        if isinstance(result, Rejection):
            assert result.reason == "RuntimeError: the kernel failed"
        elif index not in bad:
            assert np.mean(result.token_ids == expected.token_ids) > 0.98
    assert len(calls) < 40 * (1 + len(bad))  # by halves, not one by one


def test_a_nan_rejects_its_sequence_without_a_search(teacher_path: Path, tmp_path: Path):
    """The engine says which: the others are scored once or twice."""
    models.save_teacher(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = open_engine(
        TeacherConfig(path=str(tmp_path), dtype="float32", max_batch_tokens=64),
        str(tmp_path),
        vocab_size=V,
        truncation=Truncation(k=8),
        temperatures=(1.0,),
        max_length=32,
    )
    with failing(lambda _: False) as calls:
        results = list(Isolator(engine, 0.1).score(sequences_of(40, {8, 30}), 0))
    assert outcome(results) == [f"{'!' * (i in (8, 30))}sample-{i}" for i in range(40)]
    assert "NaN or infinite logits for sample sample-8" in results[8].reason
    assert sum(calls) < 3 * 40


def test_a_teacher_that_has_broken_down_rejects_nothing(engine: Engine):
    """What it raised is raised, although each sequence fails alone now."""
    good = sequences_of(12)
    isolator = Isolator(engine, 1.0)
    assert len(list(isolator.score(good, 0))) == 12
    with failing(lambda _: True, "off the bus"), pytest.raises(RuntimeError, match="off the bus"):
        list(isolator.score(good, 0))
    nothing = "scores nothing: RuntimeError: off the bus"
    with failing(lambda _: True, "off the bus"), pytest.raises(EngineError, match=nothing):
        list(Isolator(engine, 1.0).score(good, 0))


@pytest.mark.parametrize(
    ("share", "count", "allowed"), [(0.5, 40, 20), (0.01, 40, FEW), (0.0, 40, 0)]
)
def test_too_many_stop_the_dump(engine: Engine, share: float, count: int, allowed: int):
    """A share of those given, a few always, and none where none may; the last one is named."""
    enough = set(range(1, 1 + allowed))
    with failing(has_bad):
        assert len(list(Isolator(engine, share).score(sequences_of(count, enough), 0))) == count
        with pytest.raises(TooManyRejected, match=f"sample-{allowed + 1} cannot be scored: Runt"):
            list(Isolator(engine, share).score(sequences_of(count, enough | {allowed + 1}), 0))


def test_an_interrupt_is_not_a_bad_sequence(engine: Engine):
    """It passes through at once."""

    def interrupt(_: torch.Tensor) -> bool:
        raise KeyboardInterrupt

    with failing(interrupt) as calls, pytest.raises(KeyboardInterrupt):
        list(Isolator(engine, 1.0).score(sequences_of(8), 0))
    assert len(calls) == 1


# In a dump.


@pytest.fixture
def config(dump_config: DumpConfig, tmp_path: Path) -> DumpConfig:
    """That of `cache`, into a directory that is not there yet."""
    return dataclasses.replace(dump_config, output=str(tmp_path / "cache"))


def test_a_dump_goes_on_without_the_bad_ones_and_says_so(
    config: DumpConfig, cache: Path, caplog: pytest.LogCaptureFixture
):
    """All else is row for row the undisturbed cache; a rerun leaves it, a retry mends it."""
    lengths = [len(sequence.input_ids) for sequence in CacheReader(cache)]
    longest = int(np.argmax(lengths))
    ids = torch.tensor(CacheReader(cache)[longest].input_ids)

    def hit(batch: torch.Tensor) -> bool:
        wide = batch.shape[1] >= len(ids)
        return wide and bool((batch[:, : len(ids)] == ids).all(dim=1).any())

    with failing(hit):
        manifest = dump(config)
    assert manifest.totals is not None and manifest.totals.rejected == 1
    (rejected,) = manifest.rejected
    expected = CacheReader(cache)[longest]
    assert (rejected.sequence, rejected.sample_id) == (longest, expected.sample_id)
    assert rejected.reason == "RuntimeError: the kernel failed"
    assert rejected.targets == expected.num_targets
    assert verify(config.output).problems == ()
    reader = CacheReader(config.output)
    for index, whole in enumerate(CacheReader(cache)):
        ours = reader[index]
        if index == longest:
            assert ours.num_targets == 0 and np.array_equal(ours.input_ids, whole.input_ids)
            continue
        np.testing.assert_allclose(ours.logprobs, whole.logprobs, atol=1e-4)
        np.testing.assert_allclose(ours.log_tail, whole.log_tail, atol=1e-4)
    assert dump(config) == manifest
    opened = CacheReader(config.output)
    again = dump(config, retry_rejected=True)
    with pytest.raises(Rewritten, match="was rewritten while it was read"):
        list(opened)
    assert (opened.generation, CacheReader(config.output).generation) == (0, 1)
    assert again.cache_id == manifest.cache_id
    assert not (Path(config.output) / paths.RENEWAL).exists()
    assert again.totals is not None and again.totals.rejected == 0 and again.rejected == ()
    assert again.totals.targets == manifest.totals.targets + rejected.targets
    np.testing.assert_allclose(
        CacheReader(config.output)[longest].logprobs, expected.logprobs, atol=1e-4
    )
    assert verify(config.output).problems == ()


def test_a_retry_that_fails_leaves_a_complete_cache(config: DumpConfig):
    """Not one record is lost, and a later retry mends what is left."""
    config = dataclasses.replace(config, max_rejected=1.0)
    plain = list(CacheReader(dump(config) and config.output))
    marks = [s.input_ids[:4] for s in (plain[0], plain[-1])]
    shutil.rmtree(config.output)

    def hit(batch: torch.Tensor) -> bool:
        return any((batch[:, :4] == torch.tensor(m)).all(dim=1).any() for m in marks)

    with failing(hit):
        before = dump(config)
    assert len({r.shard for r in CacheWriter(config.output).committed() if r.rejected}) == 2
    with failing(lambda _: True), pytest.raises(EngineError, match="scores nothing: RuntimeError"):
        dump(config, retry_rejected=True)
    assert verify(config.output).problems == () and dump(config) == before
    last = torch.tensor(marks[1])

    def late(batch: torch.Tensor) -> bool:
        return bool((batch[:, :4] == last).all(dim=1).any())

    strict = dataclasses.replace(config, max_rejected=0.0)
    with failing(late), pytest.raises(TooManyRejected):
        dump(strict, retry_rejected=True)
    assert verify(config.output).problems == ()
    half = CacheReader(config.output).manifest
    assert len(half.rejected) < len(before.rejected) and half.rejected
    assert dump(config, retry_rejected=True).rejected == ()
    assert verify(config.output).problems == ()


def test_what_fails_in_writing_is_not_the_data_s_fault(config: DumpConfig):
    """It is raised as it is, by the file's name; nothing is rejected, and the shard is not there.

    The commit that fails is overlapped by the scoring of the next shards, which stops.
    """
    config = dataclasses.replace(config, max_rejected=1.0)
    with failing(lambda _: True), pytest.raises(EngineError):
        dump(config)
    shards = Path(config.output) / "shards"
    in_the_way = shards / "part-000001.parquet"
    in_the_way.mkdir(parents=True)
    with failing(lambda _: False) as calls, pytest.raises(IsADirectoryError, match=in_the_way.name):
        dump(config)
    assert {path.name for path in shards.iterdir()} <= {
        *("part-000000.parquet", "part-000000.json", in_the_way.name),
        *("part-000002.parquet", "part-000002.json"),
    }
    in_the_way.rmdir()
    manifest = dump(config)
    assert len(calls) < manifest.num_shards + 3
    assert manifest.rejected == () and verify(config.output).ok


def test_a_cache_of_rejections_is_not_made(config: DumpConfig, tmp_path: Path):
    """A teacher that gives NaN for everything stops the dump at once."""
    teacher = tmp_path / "teacher"
    models.save_teacher(teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    config = dataclasses.replace(
        config, teacher=dataclasses.replace(config.teacher, path=str(teacher)), max_rejected=1.0
    )
    with pytest.raises(TooManyRejected, match="the teacher scores none of the first"):
        dump(config)
    assert not list(Path(config.output).glob("shards/*"))


def test_strict_stops_at_the_first(config: DumpConfig, tmp_path: Path):
    """max_rejected: 0 names the sample and why, in one line, and commits nothing of its shard."""
    source = tmp_path / "a.jsonl"
    lines = [{"id": f"x{i}", "input_ids": [5, 6, BAD if i == 6 else 7, 8]} for i in range(9)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = dataclasses.replace(
        config,
        max_rejected=0.0,
        teacher=dataclasses.replace(config.teacher, tokenizer="none"),
        source=dataclasses.replace(config.source, path=str(source)),
    )
    with failing(has_bad), pytest.raises(EngineError, match="x6 cannot be scored: RuntimeError"):
        dump(config)
    with pytest.raises(FormatError, match="not complete"):
        CacheReader(config.output)
    lenient = dataclasses.replace(config, max_rejected=0.01)  # not part of what the cache is
    with failing(has_bad):
        manifest = dump(lenient)
    assert [entry.sample_id for entry in manifest.rejected] == ["x6"]
