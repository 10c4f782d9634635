"""Training students of another tokenizer: streams, mixtures, resuming, evaluation, refusals."""

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from decant.schemas import FormatError
from decant.student_train import CacheStream, EvalConfig, LossConfig, StudentConfig, train
from decant.student_train.config.alignment import AlignConfig
from decant.student_train.config.mixture import CacheShare
from decant.student_train.config.selection import SelectionConfig
from decant.student_train.data.follow import FollowStream
from decant.student_train.data.mixture import MixtureStream
from decant.student_train.dry_run import dry_run
from decant.student_train.losses import EventTargets
from decant.student_train.model.alignment import Alignment
from decant.student_train.verdict import evaluate_student
from decant.teacher_dump import DumpConfig, TeacherConfig, dump
from tests.support import alignments
from tests.support.trainings import STUDENT, config, losses, weights


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's tokenizer that shares no id with the cache's."""
    path = tmp_path_factory.mktemp("tokenizer")
    alignments.save(alignments.byte_level(310, bos=True), path)
    return path


@pytest.fixture(scope="module")
def other_cache(
    tokenizer_path: Path,
    dump_config: DumpConfig,
    teacher_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A cache of a teacher with the student's own tokenizer."""
    path = tmp_path_factory.mktemp("own")
    teacher = TeacherConfig(path=str(teacher_path), tokenizer=str(tokenizer_path), dtype="float32")
    dump(dataclasses.replace(dump_config, output=str(path / "cache"), teacher=teacher))
    return path / "cache"


def student(tokenizer_path: Path) -> StudentConfig:
    return StudentConfig(config=STUDENT, tokenizer=str(tokenizer_path))


def aligned_config(url: Path, output: Path, tokenizer_path: Path, **changes: Any) -> Any:
    given = {
        "student": student(tokenizer_path),
        "tokenizer_mismatch": "align",
        "align": AlignConfig(max_left_out=0.2),
    }
    return config(url, output, **(given | changes))


def options(tokenizer_path: Path) -> dict[str, Any]:
    return Alignment(student(tokenizer_path), AlignConfig()).stream_options


def taken(stream: Any, batches: int) -> list[Any]:
    iterator = iter(stream)
    found = list(itertools.islice(iterator, batches))
    iterator.close()
    return found


def test_another_tokenizer_is_refused_with_the_way_out(
    cache: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    """By default, as it may be a mistake in a path."""
    with pytest.raises(FormatError, match=r"another tokenizer.*tokenizer_mismatch: align"):
        train(config(cache, tmp_path, student=student(tokenizer_path)))
    with pytest.raises(ValueError, match="has no effect on a student that is made from"):
        train(config(cache, tmp_path, tokenizer_mismatch="align"))
    with pytest.raises(ValueError, match="'alin' is not one of"):
        config(cache, tmp_path, tokenizer_mismatch="alin")
    with pytest.raises(ValueError, match="align has no effect without"):
        config(cache, tmp_path, align=AlignConfig(max_left_out=0.5))


def test_the_order_is_that_of_the_cache(cache: Path, tokenizer_path: Path) -> None:
    """Sequence by sequence the same samples as for any student, on every rank; also resumed."""
    alignment = options(tokenizer_path)
    plain = taken(CacheStream(cache, batch_size=3, rank=1, world_size=2), 6)
    stream = CacheStream(cache, batch_size=3, rank=1, world_size=2, **alignment)
    found = taken(stream, 6)
    assert [b.sample_ids for b in found] == [b.sample_ids for b in plain]
    resumed = CacheStream(cache, batch_size=3, rank=1, world_size=2, **alignment)
    resumed.load_state_dict({**resumed.state_dict(), "consumed": 3 * 2 * 4})
    for one, other in zip(taken(resumed, 2), found[4:], strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.events.log_p, other.events.log_p)
    follow = taken(FollowStream(cache, batch_size=3, **alignment), 2)
    assert all(isinstance(batch.targets, EventTargets) for batch in [*found, *follow])


def test_packed_rows_hold_the_same_targets(cache: Path, tokenizer_path: Path) -> None:
    """Each predictor stands before its label, in padded and in packed rows."""
    stream = CacheStream(cache, batch_size=6, **options(tokenizer_path))
    for packing in ("none", "rows", "padding_free"):
        steps = stream.steps(1, packing)
        (batch,) = next(steps)
        steps.close()
        assert batch.num_targets == len(batch.labels) == int(batch.events.sizes.sum()) > 0
        flat = batch.input_ids.flatten()
        assert torch.equal(flat[batch.predictors + 1], batch.labels)
        assert int(flat.max()) < batch.vocab_size == 310


def test_training_goes_on_to_the_sample(
    cache: Path, tokenizer_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A resumed run ends with the weights of one that was not; the log says what was aligned."""
    caplog.set_level(logging.INFO)
    whole = aligned_config(
        cache,
        tmp_path / "whole",
        tokenizer_path,
        packing="rows",
        eval=EvalConfig(heldout_fraction=0.1),
    )
    summary = train(whole)
    said = caplog.text
    for part in ("chunks", "1:1", "1:N", "M:1", "M:N", "kept mass", "left out"):
        assert part in said
    before = summary["before"]
    assert summary["heldout_bits_per_byte"] < before["heldout_bits_per_byte"]
    assert 0 < summary["heldout_divergence_per_byte"] < before["heldout_divergence_per_byte"]
    assert "acceptance_lower" not in summary
    saved = AutoTokenizer.from_pretrained(tmp_path / "whole/student")
    assert saved.get_vocab() == AutoTokenizer.from_pretrained(tokenizer_path).get_vocab()

    halves = dataclasses.replace(whole, output=str(tmp_path / "halves"), save_every_steps=3)
    interrupt_after(halves, 3)
    train(halves)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "halves")[name]), name

    verdict = evaluate_student(
        StudentConfig(path=str(tmp_path / "whole/student")),
        str(cache),
        heldout_fraction=0.1,
        tokenizer_mismatch="align",
    )
    for name in ("heldout_ce", "heldout_divergence", "heldout_bits_per_byte"):
        assert verdict.metrics[name] == pytest.approx(summary[name], rel=1e-5)


def interrupt_after(run: Any, steps: int) -> None:
    """Leave what a run that was killed behind its checkpoint at this step leaves."""
    train(run)
    output = Path(run.output)
    (output / "summary.json").unlink()
    kept = output / "checkpoints" / f"step-{steps:08d}"
    if not kept.exists():
        pytest.fail(f"no {kept}: {sorted(output.rglob('*'))[:20]}")


def test_a_mixture_of_an_aligned_cache_and_one_of_the_students_own(
    cache: Path, other_cache: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    """Each target is of its cache; both are learned, with weights of their own."""
    mixed = MixtureStream([cache, other_cache], [1, 1], batch_size=4, **options(tokenizer_path))
    (batch,) = taken(mixed, 1)
    own = CacheStream(other_cache, batch_size=2, **options(tokenizer_path))
    assert own._to_events is None
    sizes = batch.events.sizes.numpy()
    starts = sizes.cumsum() - sizes
    of_chunk = batch.source[starts]
    assert (sizes[of_chunk == 1] == 1).all() and (of_chunk == 0).any()
    batch.events.validate(310)
    run = dataclasses.replace(
        aligned_config(cache, tmp_path, tokenizer_path),
        cache="",
        mixture=[
            CacheShare(cache=str(cache), weight=1),
            CacheShare(cache=str(other_cache), weight=1, ce_weight=0.0),
        ],
        eval=EvalConfig(heldout_fraction=0.1),
    )
    summary = train(run)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert summary["heldout_ce"] < summary["before"]["heldout_ce"]
    assert {f"heldout_bits_per_byte/{name}" for name in ("cache-0", "cache-1")} <= summary.keys()


def test_labels_alone_train_a_student_of_either_tokenizer(
    dump_config: DumpConfig, tokenizer_path: Path, tmp_path: Path
) -> None:
    """The likelihoods of tokens, or of chunks, from a cache that keeps nothing else."""
    truncation = dataclasses.replace(dump_config.truncation, method="label", k=64)
    labels = dataclasses.replace(
        dump_config,
        output=str(tmp_path / "cache"),
        truncation=truncation,
        temperatures=[1.0],
        precision="compact",
    )
    dump(labels)
    loss = LossConfig(kind="tvd")
    train(config(tmp_path / "cache", tmp_path / "own", loss=loss))
    train(aligned_config(tmp_path / "cache", tmp_path / "other", tokenizer_path, loss=loss))
    for name in ("own", "other"):
        found = losses(tmp_path / name)
        assert found[-1] < found[0], name


def test_a_dry_run_says_what_is_aligned(cache: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """And writes nothing."""
    report = dry_run(aligned_config(cache, tmp_path / "run", tokenizer_path))
    for part in ("aligned", "from a sample", "1:N", "of it has an event", "sequences"):
        assert part in report
    assert not (tmp_path / "run").exists()


def test_a_temperature_is_refused(cache: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """Also one that the cache holds; and a selection, which would cut chunks."""
    hot = LossConfig(temperature=2.0)
    some = SelectionConfig(by="student_entropy")
    with pytest.raises(ValueError, match="a loss is taken on whole chunks"):
        train(aligned_config(cache, tmp_path, tokenizer_path, selection=some))
    with pytest.raises(
        ValueError, match="a product of tempered probabilities is that of no string"
    ):
        train(aligned_config(cache, tmp_path, tokenizer_path, loss=hot))


def test_too_many_sequences_left_out_stop_before_training(cache: Path, tmp_path: Path) -> None:
    """With the first of them; nothing is written."""
    changing = alignments.byte_level(300)
    changing.backend_tokenizer.normalizer = alignments.normalizers.Replace("o", "0")
    alignments.save(changing, tmp_path / "changing")
    with pytest.raises(ValueError, match=r"cannot be aligned.*first: text-\d+: .*changes the text"):
        train(aligned_config(cache, tmp_path / "run", tmp_path / "changing"))
    assert not (tmp_path / "run/metrics.jsonl").exists()
