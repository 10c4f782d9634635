"""A run goes on from what another one left, or says in one line why it cannot."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from decant.student_train import (
    AdapterConfig,
    CacheShare,
    EvalConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
    train,
)
from decant.student_train.dry_run import dry_run
from decant.teacher_dump import DumpConfig, dump
from tests.support import models
from tests.support.trainings import config, losses, weights


@pytest.fixture(scope="session")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A complete run of 6 steps with checkpoints after 2, 4 and 6; copy its output to go on."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run = config(cache, output, save_every_steps=2, keep_checkpoints=3)
    train(run)
    return run


def copied(run: TrainConfig, output: Path, *, complete: bool = False) -> TrainConfig:
    """The same run in an output of its own, as a kill in the final save would leave it."""
    shutil.copytree(run.output, output)
    if not complete:
        (output / "summary.json").unlink()
        shutil.rmtree(output / "student")
    return dataclasses.replace(run, output=str(output))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "decant.json"])
def test_an_older_checkpoint_is_taken_where_the_newest_is_damaged(
    whole: TrainConfig, tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever file is torn: one line names it, and the run ends with the same weights."""
    run = copied(whole, tmp_path / "run")
    for step in (4, 6):
        (tmp_path / f"run/checkpoints/step-0000000{step}" / file).write_bytes(b"torn")
    caplog.set_level("WARNING", logger="decant")
    assert train(run)["resumed_at"] == 2
    named = [line for line in caplog.messages if "is damaged, or not a checkpoint" in line]
    assert [
        "\n" not in line and f"step-0000000{s}" in line
        for line, s in zip(named, (6, 4), strict=True)
    ]
    assert losses(tmp_path / "run") == losses(Path(whole.output))
    theirs = weights(Path(whole.output))
    assert all(torch.equal(v, theirs[name]) for name, v in weights(tmp_path / "run").items())


def test_checkpoints_that_are_all_damaged_or_foreign_are_refused(
    whole: TrainConfig, tmp_path: Path
) -> None:
    """A run that was paid for is not begun anew in silence."""
    run = copied(whole, tmp_path / "run")
    for step in (2, 4, 6):
        folder = tmp_path / f"run/checkpoints/step-0000000{step}"
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "decant.json").write_text(json.dumps({"another": "program's"}))
    with pytest.raises(ValueError, match=r"none of 3 checkpoints can be read, .*Remove the folder"):
        train(run)


def test_a_cache_and_a_student_may_have_moved(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache is known by its id, the student is in the checkpoint."""
    models.save_teacher(tmp_path / "base", seed=3)
    run = config(cache, tmp_path / "run", student=StudentConfig(path=str(tmp_path / "base")))
    run = dataclasses.replace(run, save_every_steps=4, keep_checkpoints=3)
    train(run)
    run = copied(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000006")
    shutil.copytree(cache, tmp_path / "moved")
    (tmp_path / "base").rename(tmp_path / "student")
    moved = dataclasses.replace(
        run,
        cache=f"{tmp_path}/./moved/",
        student=StudentConfig(path=str(tmp_path / "student")),
    )
    assert train(moved)["resumed_at"] == 4
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_a_cache_of_another_id_is_refused(
    whole: TrainConfig, dump_config: DumpConfig, tmp_path: Path
) -> None:
    """Also of the same shape: the samples that were seen are others."""
    run = copied(whole, tmp_path / "run")
    dump(dataclasses.replace(dump_config, output=str(tmp_path / "other"), temperatures=[1.0]))
    with pytest.raises(ValueError, match=r"cannot resume the stream .*cache_id"):
        train(dataclasses.replace(run, cache=str(tmp_path / "other")))


def test_an_adapter_goes_on_with_its_own_base_alone(cache: Path, tmp_path: Path) -> None:
    """Wherever it lies; other weights under the same adapter would be another student."""
    models.save_teacher(tmp_path / "base", seed=3)
    models.save_teacher(tmp_path / "other", seed=4)
    student = StudentConfig(path=str(tmp_path / "base"))
    run = config(cache, tmp_path / "run", student=student, adapter=AdapterConfig(r=2))
    run = dataclasses.replace(run, save_every_steps=4)
    train(run)
    (tmp_path / "run/summary.json").unlink()
    other = dataclasses.replace(run, student=StudentConfig(path=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"is of an adapter on other weights .*student\.path"):
        train(other)
    (tmp_path / "base").rename(tmp_path / "moved")
    moved = dataclasses.replace(run, student=StudentConfig(path=str(tmp_path / "moved")))
    assert train(moved)["resumed_at"] == 6


def test_more_steps_at_another_rate_go_on_from_a_complete_run(
    whole: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What changes is said; what was trained stays; a run of the same steps is still complete."""
    run = copied(whole, tmp_path / "run", complete=True)
    slower = dataclasses.replace(run.optimizer, lr=1e-3)
    caplog.set_level("INFO", logger="decant")
    more = dataclasses.replace(run, steps=9, optimizer=slower)
    assert train(more)["resumed_at"] == 6
    assert "steps was 6, is 9 from here on" in caplog.text
    assert "optimizer.lr was 0.01, is 0.001 from here on" in caplog.text
    assert losses(tmp_path / "run")[:6] == losses(Path(whole.output))
    assert len(losses(tmp_path / "run")) == 9
    assert train(more)["steps"] == 9
    with pytest.raises(ValueError, match=r"complete after 9 steps, and optimizer\.lr was 0\.001"):
        train(dataclasses.replace(more, optimizer=run.optimizer))


def test_more_steps_need_a_checkpoint(cache: Path, tmp_path: Path) -> None:
    """Without one the way out is named: the student is a beginning for another run."""
    run = config(cache, tmp_path / "run", steps=2)
    train(run)
    assert not [*(tmp_path / "run").glob("checkpoints/*")]
    more = dataclasses.replace(run, steps=4)
    for begin in (train, dry_run):
        with pytest.raises(ValueError, match=r"of which no checkpoint is left.*student\.path: "):
            begin(more)


def test_fewer_steps_than_are_done_are_refused(whole: TrainConfig, tmp_path: Path) -> None:
    """An unfinished run cannot take steps back."""
    run = copied(whole, tmp_path / "run")
    fewer = dataclasses.replace(run, steps=3, optimizer=OptimizerConfig(warmup_steps=2))
    with pytest.raises(ValueError, match="6 steps are done, and this config has 3"):
        train(fewer)


def test_evaluation_may_change_and_a_mixture_may_move(cache: Path, tmp_path: Path) -> None:
    """Another place to evaluate on trains nothing else; shares of a mixture keep their weights."""
    shutil.copytree(cache, tmp_path / "copy")
    shares = [CacheShare(cache=str(cache), weight=1.0), CacheShare(cache=str(cache), weight=2.0)]
    run = dataclasses.replace(config(cache, tmp_path / "run"), cache="", mixture=shares)
    run = dataclasses.replace(run, save_every_steps=4, keep_checkpoints=2)
    train(run)
    (tmp_path / "run/summary.json").unlink()
    moved = [dataclasses.replace(share, cache=str(tmp_path / "copy")) for share in shares]
    run = dataclasses.replace(run, mixture=moved, eval=EvalConfig())
    assert train(run)["resumed_at"] == 6
    (tmp_path / "run/summary.json").unlink()
    moved[0] = dataclasses.replace(moved[0], weight=3.0)
    with pytest.raises(ValueError, match=r"mixture\.0\.weight: was 1\.0, this run gives 3\.0"):
        train(dataclasses.replace(run, mixture=moved))
