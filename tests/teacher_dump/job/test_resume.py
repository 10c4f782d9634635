"""Claims about a dump that is interrupted, or run again.

Interruptions run as processes (`tests.support.commands`), the rest in this one.
"""

import dataclasses
import shutil
import signal
from pathlib import Path

import pytest

from decant.schemas import FormatError
from decant.storage import Busy, CacheReader, Store, verify
from decant.teacher_dump import (
    DumpConfig,
    EngineError,
    dump,
)
from tests.support.commands import Command, command
from tests.support.dumps import (
    HALF,
    LOADING,
    MODULE,
    assert_whole,
    change,
    committed,
    failing_after,
    files,
    save_config,
    temporaries,
)

# Interruptions.


@pytest.fixture(scope="module")
def small_steps(dump_config: DumpConfig) -> DumpConfig:
    """Batches and shards so small that there is time to interrupt."""
    config = change(dump_config, "teacher.max_batch_tokens", 64)
    return dataclasses.replace(config, shard_targets=100)


@pytest.fixture(scope="module")
def undisturbed(small_steps: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `small_steps`."""
    path = tmp_path_factory.mktemp("undisturbed") / "cache"
    dump(dataclasses.replace(small_steps, output=str(path)))
    return path


def test_a_failure_loses_one_shard(config: DumpConfig, cache: Path):
    """Committed shards survive byte for byte, nothing half-done is left, a rerun completes."""
    with failing_after(HALF), pytest.raises(RuntimeError, match="off the bus"):
        dump(config)
    output = Path(config.output)
    done = committed(output)
    assert 0 < len(done) < len(committed(cache))
    assert files(output / "shards") == done
    assert temporaries(output) == []
    with pytest.raises(FormatError, match="not complete"):
        CacheReader(output)
    dump(config)
    assert committed(output).items() >= done.items()
    assert_whole(output, cache)


def test_a_kill_loses_one_shard(small_steps: DumpConfig, undisturbed: Path, tmp_path: Path):
    """SIGKILL in the middle of a shard: a rerun clears what it left and completes."""
    config = dataclasses.replace(small_steps, output=str(tmp_path / "cache"))
    output = Path(config.output)
    running = Command(MODULE, "run", "--config", save_config(config, tmp_path))
    running.signal_when(
        lambda: bool(committed(output) and list(output.glob("shards/.*.tmp"))), signal.SIGKILL
    )
    assert running.result().code == -signal.SIGKILL
    assert temporaries(output)
    done = committed(output)
    dump(config)
    assert committed(output).items() >= done.items()
    assert_whole(output, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_clean(
    small_steps: DumpConfig, undisturbed: Path, tmp_path: Path, number: signal.Signals
):
    """Ctrl-C and a batch system's SIGTERM: exit code 130, nothing half-published, resumable."""
    config = dataclasses.replace(small_steps, output=str(tmp_path / "cache"))
    output = Path(config.output)
    running = Command(MODULE, "run", "--config", save_config(config, tmp_path))
    running.signal_when(lambda: bool(committed(output)), number)
    result = running.result()
    assert result.code == 130
    assert "goes on from there" in result.stderr and "Traceback" not in result.stderr
    done = committed(output)
    assert temporaries(output) == []
    assert len(done) < len(committed(undisturbed))
    dump(config)
    assert committed(output).items() >= done.items()
    assert_whole(output, undisturbed)


def test_a_start_that_was_cut_off_is_begun_anew(config: DumpConfig, cache: Path):
    """Killed before the manifest: the leftovers of tokenising are cleared."""
    output = Path(config.output)
    (output / "inputs").mkdir(parents=True)
    (output / "tokenizer").mkdir()
    for name in ("inputs/part-000000.parquet", "inputs/part-000777.parquet", "tokenizer/old.json"):
        (output / name).write_text("cut off")
    (output / "inputs" / ".part-000001.parquet.1234.tmp").touch()
    (output / ".manifest.json.1234.tmp").touch()
    dump(config)
    assert_whole(output, cache)
    assert not (output / "tokenizer" / "old.json").exists()


def test_temporaries_of_a_dead_writer_are_removed(config: DumpConfig, cache: Path):
    """At the next run, even of a complete cache."""
    output = Path(config.output)
    shutil.copytree(cache, output)
    for name in ("shards/.part-000001.parquet.1234.tmp", ".manifest.json.1234.tmp"):
        (output / name).touch()
    dump(config)
    assert_whole(output, cache)


def test_two_dumps_do_not_share_a_directory(config: DumpConfig, cache: Path, tmp_path: Path):
    """The second is refused at once, by one clean line, while the first holds it."""
    with Store(config.output).lock():
        with pytest.raises(Busy, match="another process"):
            dump(config)
        result = command(MODULE, "run", "--config", save_config(config, tmp_path))
    assert result.code == 2
    assert f"error: {config.output} is being written by another process" in result.stderr
    assert not list(Path(config.output).iterdir())


# Repair.


@pytest.mark.parametrize(
    "lost",
    [
        ["shards/part-000001.parquet"],
        ["shards/part-000002.json"],
        ["shards/part-000000.parquet", "shards/part-000000.json", "shards/part-000002.parquet"],
        ["records/records-000000.parquet"],
        ["tokenizer/tokenizer.json"],
    ],
    ids=lambda names: names[0].split("/")[1],
)
def test_a_rerun_refills_what_was_lost_of_a_complete_cache(
    config: DumpConfig, cache: Path, lost: list[str]
):
    """Lost shards are scored again, from inputs made from the source again; others are kept."""
    output = Path(config.output)
    shutil.copytree(cache, output)
    before = files(output)
    for name in lost:
        (output / name).unlink()
    kept = committed(output)
    dump(config)
    assert committed(output).items() >= kept.items()
    assert_whole(output, cache)
    (old,) = (name for name in before if name.startswith("records/"))
    (new,) = (name for name in files(output) if name.startswith("records/"))
    assert files(output).keys() - {new} == before.keys() - {old}


def test_a_shard_that_was_cut_short_is_scored_again(config: DumpConfig, cache: Path):
    """As a full disk elsewhere or a broken copy leaves it."""
    shutil.copytree(cache, config.output)
    shard = Path(config.output) / "shards" / "part-000001.parquet"
    shard.write_bytes(shard.read_bytes()[:1000])
    dump(config)
    assert_whole(config.output, cache)


def test_a_failure_while_refilling_can_be_resumed(config: DumpConfig, cache: Path):
    """A complete cache that lost two shards, and broke again after the first of them."""
    output = Path(config.output)
    shutil.copytree(cache, output)
    for index in (0, 3):
        (output / "shards" / f"part-00000{index}.parquet").unlink()
    with failing_after(LOADING + 1), pytest.raises(EngineError):
        dump(config)
    assert not verify(output).ok
    assert not (output / "shards" / "part-000003.json").exists()  # nothing says it is whole
    assert (output / "inputs").exists()
    dump(config)
    assert_whole(output, cache)


def test_lost_inputs_are_made_again(config: DumpConfig, cache: Path, half_done: Path):
    """The folder a hasty user deletes from a half-done cache."""
    shutil.copytree(half_done, config.output)
    shutil.rmtree(Path(config.output) / "inputs")
    dump(config)
    assert_whole(config.output, cache)


@pytest.mark.parametrize(
    ("name", "damage", "way_out"),
    [
        ("manifest.json", "flip", "restore it from a copy"),
        ("manifest.json", "empty", "restore it from a copy"),
        ("plan/plan-000000.jsonl.zst", "flip", "restore it from a copy"),
        ("shards/part-000000.json", "flip", "delete it, and the same command scores its shard"),
        ("inputs/part-000005.parquet", "flip", "delete it, and the same command makes it"),
        ("inputs/part-000005.parquet", "foreign", "delete it, and the same command makes it"),
        ("inputs/part-000005.parquet", "another", "delete it, and the same command makes it"),
    ],
)
def test_damage_to_a_half_done_cache_is_named_with_the_way_out(
    config: DumpConfig, cache: Path, half_done: Path, name: str, damage: str, way_out: str
):
    """The file, what is wrong, what to do; and doing it works."""
    shutil.copytree(half_done, config.output)
    file = Path(config.output) / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    other = (cache / "shards" / "part-000001.parquet").read_bytes()
    file.write_bytes(
        {
            "flip": whole[:middle] + bytes([whole[middle] ^ 8]) + whole[middle + 1 :],
            "empty": b"",
            "foreign": other,
            "another": (half_done / "inputs" / "part-000004.parquet").read_bytes(),
        }[damage]
    )
    with pytest.raises(FormatError) as caught:
        dump(config)
    assert str(file) in str(caught.value) and way_out in str(caught.value)
    assert committed(Path(config.output)).keys() >= committed(half_done).keys()
    if "delete" in way_out:
        file.unlink()
        dump(config)
        assert_whole(config.output, cache)
