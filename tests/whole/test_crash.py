"""Whatever ends a dump, whenever, a rerun completes it: nothing lost, twice, or left lying about.

Commands are killed by SIGKILL at random times and before random steps on the file system;
CRASH_SEED chooses which. Two dumps in one directory, and a full disk, are here too.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from decant.storage import CacheReader, Store, verify
from decant.storage.cache import paths
from decant.storage.cache.records import read_manifest
from decant.teacher_dump import DumpConfig
from tests.support.commands import Command, Result, command, end_before
from tests.support.dumps import (
    MODULE,
    assert_same,
    change,
    committed,
    files,
    save_config,
    save_records,
    temporaries,
)

SEED = int(os.environ.get("CRASH_SEED", "0"))
STEPS_PER_SHARD = 24
"""Steps of `end_before` that a dump takes for a shard, tokenising included; a bit more."""
RUN = (MODULE, "run", "--config")


@pytest.fixture(scope="module")
def small_shards(dump_config: DumpConfig) -> DumpConfig:
    """Many small shards, so that a kill strikes anything."""
    config = change(change(dump_config, "source.limit", 60), "teacher.max_batch_tokens", 64)
    return dataclasses.replace(config, shard_targets=30)


@dataclasses.dataclass(frozen=True, slots=True)
class Undisturbed:
    """A dump that nothing happened to."""

    cache: Path
    seconds: float
    """How long its command took."""
    shards: int


@pytest.fixture(scope="module")
def undisturbed(small_shards: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The cache of `small_shards`; never write to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = dataclasses.replace(small_shards, output=str(folder / "cache"))
    command(MODULE, "run", "--help")  # imports what every command needs
    start = time.monotonic()
    result = command(*RUN, save_config(config, folder))
    seconds = time.monotonic() - start
    assert result.code == 0, result.stderr
    return Undisturbed(folder / "cache", seconds, CacheReader(folder / "cache").manifest.num_shards)


@pytest.fixture
def config(small_shards: DumpConfig, tmp_path: Path) -> DumpConfig:
    """`small_shards` into a directory that is not there yet."""
    return dataclasses.replace(small_shards, output=str(tmp_path / "cache"))


def workers(count: int, *arguments: str) -> list[Command]:
    """Start all workers of one dump."""
    return [start_worker(index, count, *arguments) for index in range(count)]


def start_worker(index: int, count: int, *arguments: str) -> Command:
    return Command(*RUN, *arguments, "--worker-index", str(index), "--num-workers", str(count))


def phase(output: Path) -> str:
    """What a dump that ended here was at."""
    if not (output / paths.MANIFEST).exists():
        if (output / paths.TOKENIZER).exists() or (output / paths.PLAN).exists():
            return "plan"
        return "tokenising" if (output / paths.INPUTS).exists() else "start"
    if read_manifest(Store(output)).is_final:
        return "removing inputs" if (output / paths.INPUTS).exists() else "end"
    if (output / paths.RECORDS).exists():
        return "sealing"
    names = Store(output).names(paths.SHARDS)
    stems = {name.split(".")[0] for name in names if name.endswith(".json")}
    if any(name.startswith(".") and ".parquet." in name for name in names):
        return "in a shard"
    if any(name.split(".")[0] not in stems for name in names):
        return "before a record"
    return "between shards" if names else "loading the teacher"


def assert_sound(output: Path, done: dict[str, bytes]) -> dict[str, bytes]:
    """Nothing committed is lost or damaged; shards may be missing. Returns what is committed."""
    if (output / paths.MANIFEST).exists():
        for problem in verify(output).problems:
            assert "shards missing" in problem or "is not final" in problem, problem
    now = committed(output)
    assert now.items() >= done.items()
    return now


def assert_refused(result: Result, *texts: str) -> None:
    """Exit code 2, as nothing is damaged, and one line that says all this."""
    assert result.code == 2, result
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert all(text in line for text in texts), line


# Kills.


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_dumps_complete(
    config: DumpConfig, undisturbed: Undisturbed, tmp_path: Path, kills: int
):
    """Each run goes on where the last was killed, until one lives to the end; then all anew."""
    random_ = random.Random(SEED)
    seen: collections.Counter[str] = collections.Counter()
    for trial in range(kills):
        output = tmp_path / f"cache-{trial}"
        file = save_config(dataclasses.replace(config, output=str(output)), tmp_path)
        done: dict[str, bytes] = {}
        while seen.total() < kills:
            if random_.random() < 0.5:
                seconds = random_.uniform(0.1, 1) * undisturbed.seconds
                running, how = Command(*RUN, file), f"after {seconds:.2f} s"
                running.kill_after(seconds)
            else:
                number = random_.randint(1, STEPS_PER_SHARD * undisturbed.shards)
                first = functools.partial(end_before, number, str(output))
                running, how = Command(*RUN, file, first=first), f"before step {number}"
            result = running.result()
            if result.code == 0:
                break
            assert result.code == -signal.SIGKILL, result
            seen[phase(output)] += 1
            print(f"CRASH_SEED={SEED} {output.name} killed {how}: {phase(output)}")
            done = assert_sound(output, done)
        else:
            assert command(*RUN, file).code == 0
        assert committed(output).items() >= done.items()
        assert_same(output, undisturbed.cache)
        if seen.total() == kills:
            break
    print(f"CRASH_SEED={SEED}: {kills} kills of one process, {dict(seen)}")
    assert seen.total() == kills


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_workers_complete(
    config: DumpConfig, undisturbed: Undisturbed, tmp_path: Path, kills: int
):
    """Three at a time, each killed or not; those that live end cleanly, the dead come again."""
    random_ = random.Random(SEED)
    seen: collections.Counter[str] = collections.Counter()
    trial = 0
    while seen.total() < kills:
        output = tmp_path / f"cache-{trial}"
        file = save_config(dataclasses.replace(config, output=str(output)), tmp_path)
        done: dict[str, bytes] = {}
        dead = {0, 1, 2}
        while dead:
            running = {}
            for index in dead:
                number = random_.randint(1, STEPS_PER_SHARD * undisturbed.shards // 2)
                first = functools.partial(end_before, number, str(output))
                arguments = (file, "--worker-index", str(index), "--num-workers", "3")
                running[index] = Command(*RUN, *arguments, first=first)
            if random_.random() < 0.7 and seen.total() < kills:
                victim = random_.choice(sorted(dead))
                running[victim].kill_after(random_.uniform(0.1, 1.5) * undisturbed.seconds)
            for index, one in running.items():
                result = one.result()
                assert result.code in (0, -signal.SIGKILL), (SEED, result)
                if result.code == 0:
                    dead.remove(index)
                else:
                    seen[phase(output)] += 1
            print(f"CRASH_SEED={SEED} {output.name}: {sorted(dead)} died, {phase(output)}")
            done = assert_sound(output, done)
        assert committed(output).items() >= done.items()
        assert_same(output, undisturbed.cache)
        trial += 1
    print(f"CRASH_SEED={SEED}: {seen.total()} kills of workers, {dict(seen)}")


@pytest.mark.parametrize("step", [3, 4])
def test_an_interrupt_of_the_start_is_no_loss(config: DumpConfig, tmp_path: Path, step: int):
    """Before the manifest appears, nothing stays; from then on, everything does."""
    config = change(config, "source.limit", 4)
    output = Path(config.output)
    file = save_config(config, tmp_path)
    first = functools.partial(end_before, step, f"{output}/.{paths.MANIFEST}", signal.SIGTERM)
    result = Command(*RUN, file, first=first).result()
    assert result.code == 130 and "Traceback" not in result.stderr, result
    assert temporaries(output) == []
    assert phase(output) == ("loading the teacher" if step == 4 else "start")
    assert command(*RUN, file).code == 0
    assert verify(output).ok


def test_a_worker_that_never_comes_back_is_made_up_for(
    config: DumpConfig, undisturbed: Undisturbed, tmp_path: Path
):
    """The others end with 0 and say what is left; a plain rerun does it and clears up."""
    output = Path(config.output)
    file = save_config(config, tmp_path)
    running = workers(3, file)
    running[1].signal_when(
        lambda: bool(list(output.glob(f"{paths.SHARDS}/.*.tmp"))), signal.SIGKILL
    )
    results = [one.result() for one in running]
    assert [result.code for result in results] == [0, -signal.SIGKILL, 0]
    for result in (results[0], results[2]):
        assert "are other workers'" in result.stderr and "not all of them" in result.stdout
    done = committed(output)
    missing = [
        index for index in range(undisturbed.shards) if not (output / paths.record(index)).exists()
    ]
    assert missing and all(index % 3 == 1 for index in missing)
    assert_sound(output, done)
    assert command(*RUN, file).code == 0
    assert committed(output).items() >= done.items()
    assert_same(output, undisturbed.cache)


# Several at a time.


@pytest.mark.parametrize("twins", [1, 2])
def test_workers_started_together_fill_one_cache(
    config: DumpConfig, undisturbed: Undisturbed, tmp_path: Path, twins: int
):
    """One starts it, one makes it final, each shard is of one; the same worker twice is safe."""
    file = save_config(config, tmp_path)
    running = [one for _ in range(twins) for one in workers(3, file)]
    for one in running:
        result = one.result()
        assert result.code == 0, result.stderr
    if twins == 1:
        writers = [record.worker for record in CacheReader(config.output).index]
        for index in range(3):
            assert len(set(writers[index::3])) == 1
    assert command(*RUN, file).code == 0
    assert_same(Path(config.output), undisturbed.cache)


def test_workers_that_cannot_start_leave_nothing_that_blocks(config: DumpConfig, tmp_path: Path):
    """Each names the bad record; with it mended the same commands work."""
    source = save_records(tmp_path / "a.jsonl", *[{"text": "the fox runs"}] * 9, {"text": 5})
    file = save_config(change(config, "source.path", str(source)), tmp_path)
    for one in workers(3, file):
        assert_refused(one.result(), "line 10: text is 5")
    assert files(Path(config.output)) == {}
    save_records(source, *[{"text": "the fox runs"}] * 9)
    assert [one.result().code for one in workers(3, file)] == [0, 0, 0]
    assert verify(config.output).ok and temporaries(Path(config.output)) == []


@pytest.mark.parametrize("second", ["the same", "another config", "a worker"])
def test_two_dumps_at_the_same_time_are_safe(
    config: DumpConfig, undisturbed: Undisturbed, tmp_path: Path, second: str
):
    """The one that comes late is refused, or, if the first has ended, finds it complete."""
    file = save_config(config, tmp_path)
    other = {
        "the same": [],
        "another config": ["--truncation.k", "15"],
        "a worker": ["--worker-index", "0", "--num-workers", "1000"],
    }[second]
    results = [one.result() for one in (Command(*RUN, file), Command(*RUN, file, *other))]
    codes = [result.code for result in results]
    assert 0 in codes and set(codes) <= {0, 2}, results
    for result in results:
        if result.code == 2:
            known = "holds another cache" in result.stderr
            assert_refused(result, "" if known else "is being written by another process")
    if codes == [2, 0] and second != "the same":
        if second == "another config":
            assert verify(config.output).ok
            return
        assert command(*RUN, file).code == 0
    assert_same(Path(config.output), undisturbed.cache)


# A full disk.


class SmallDisk:
    """A tmpfs in a mount namespace of its own, which goes when the process that holds it does."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._holder = subprocess.Popen(
            ["unshare", "-m", "sh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._folder = folder
        self.refusal = self._tell(f"mount -t tmpfs -o size=32k small {folder}")
        self.path = Path(f"/proc/{self._holder.pid}/root{folder}")

    def resize(self, kilobytes: int) -> None:
        """Make it larger or smaller."""
        problem = self._tell(f"mount -o remount,size={kilobytes}k {self._folder}")
        assert not problem, problem

    def _tell(self, line: str) -> str:
        assert self._holder.stdin is not None and self._holder.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._holder.stdin.write(f"{line}; echo done\n")
            self._holder.stdin.flush()
        said = list(itertools.takewhile("done\n".__ne__, self._holder.stdout))
        return "".join(said)

    def close(self) -> None:
        """Let it go, with what is on it."""
        self._holder.kill()
        self._holder.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """32 KiB, to begin with."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, of util-linux")
    disk = SmallDisk(tmp_path / "disk")
    try:
        if disk.refusal:
            pytest.skip(f"this machine mounts nothing for us: {disk.refusal.strip()}")
        yield disk
    finally:
        disk.close()


@pytest.mark.parametrize("step", [240, pytest.param(8, marks=pytest.mark.slow)])
def test_a_full_disk_is_a_clean_end_and_more_space_completes(
    small_disk: SmallDisk,
    config: DumpConfig,
    undisturbed: Undisturbed,
    tmp_path: Path,
    step: int,
):
    """Wherever it strikes: exit code 2, the file by name, a cache that lacks only shards."""
    output = small_disk.path / "cache"
    file = save_config(dataclasses.replace(config, output=str(output)), tmp_path)
    seen: collections.Counter[str] = collections.Counter()
    done: dict[str, bytes] = {}
    kilobytes = 32
    while (result := command(*RUN, file)).code != 0:
        assert_refused(result, "No space left on device", f"'{output}/")
        assert temporaries(output) == []
        done = assert_sound(output, done)
        seen[phase(output)] += 1
        kilobytes += step
        small_disk.resize(kilobytes)
    print(f"{kilobytes} KiB in steps of {step}: {dict(seen)}")
    assert seen["start"] and seen["between shards"] + seen["before a record"], seen
    assert_same(output, undisturbed.cache)
