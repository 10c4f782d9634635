"""Shards filled by actors of a real Ray cluster of several nodes, some of which are killed."""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from decant.storage import CacheReader
from decant.teacher_dump import DumpConfig, dump
from decant.teacher_dump.job.config import RayConfig
from tests.support import models
from tests.support.commands import Command, command, setting
from tests.support.dumps import (
    MODULE,
    assert_same,
    change,
    committed,
    save_config,
    save_records,
    temporaries,
)

pytestmark = pytest.mark.xdist_group("ray")

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
NODE = {"object_store_memory": 80 << 20}
HEALTH = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,
}
"""Ray sees within a few seconds that a node is gone; by default it takes half a minute."""
DEADLINE_S = 200


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    """A head that runs nothing itself; tests add the nodes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.getcwd())
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH, **NODE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def settings(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> DumpConfig:
    """Four shards that take long enough to be struck in the middle."""
    path = tmp_path_factory.mktemp("records") / "texts.jsonl"
    generator = np.random.default_rng(0)
    sizes = generator.integers(2, 24, 500)
    save_records(path, *({"text": " ".join(generator.choice(models.WORDS, n))} for n in sizes))
    config = change(change(dump_config, "source.path", str(path)), "teacher.max_batch_tokens", 64)
    return dataclasses.replace(config, shard_targets=3500)


@pytest.fixture(scope="module")
def alone(settings: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `settings` from a single process."""
    path = tmp_path_factory.mktemp("alone") / "cache"
    assert dump(dataclasses.replace(settings, output=str(path))).num_shards == 4
    return path


def start(config: DumpConfig, folder: Path, address: str, *arguments: str) -> Command:
    """`teacher_dump run --executor ray` on this cluster."""
    return Command(
        MODULE,
        *("run", "--config", save_config(config, folder), "--executor", "ray"),
        *("--ray.address", address, *arguments),
        first=setting(ENVIRONMENT),
    )


def until(ready: Callable[[], object], running: Command) -> None:
    """Wait for something to happen while the command runs."""
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert running.is_running, running.result()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def actors() -> dict[int, int]:
    """Process id of every actor, and of the raylet that is its parent."""
    found = {}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and b"ray::ShardActor" in (process / "cmdline").read_bytes():
                status = (process / "stat").read_text().rsplit(")", 1)[1].split()
                found[int(process.name)] = int(status[1])
    return found


def open_shards(pid: int, output: Path) -> list[str]:
    """The unfinished shard files that a process has open."""
    found = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                path = os.readlink(file)
                if path.startswith(f"{output}/shards/.part-") and path.endswith(".tmp"):
                    found.append(path)
    return found


def stopped_in_a_shard(output: Path, running: Command) -> tuple[int, int]:
    """Stop an actor in the middle of a shard; its process id and that of its raylet."""
    struck: list[tuple[int, int]] = []

    def strike() -> bool:
        if not any(path.name.endswith(".tmp") for path in temporaries(output)):
            return False
        for pid, parent in actors().items():
            os.kill(pid, signal.SIGSTOP)
            if open_shards(pid, output):
                struck.append((pid, parent))
                return True
            os.kill(pid, signal.SIGCONT)
        return False

    until(strike, running)
    return struck[0]


def test_a_killed_worker_and_a_killed_node_lose_only_their_shards(
    cluster, settings: DumpConfig, alone: Path, tmp_path: Path
):
    """Struck in mid-shard, one after the other; the rows are those of a single process."""
    config = dataclasses.replace(settings, output=str(tmp_path / "cache"))
    nodes = [cluster.add_node(num_cpus=1, **NODE) for _ in range(2)]
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
    running = start(config, tmp_path, cluster.address)
    output = tmp_path / "cache"

    worker, _ = stopped_in_a_shard(output, running)
    os.kill(worker, signal.SIGKILL)
    until(lambda: worker not in actors(), running)
    before = committed(output)
    other, raylet = stopped_in_a_shard(output, running)
    cluster.remove_node(raylets[raylet], allow_graceful=False)
    os.kill(other, signal.SIGKILL)  # as a machine takes its processes with it

    result = running.result()
    for node in nodes:
        if node is not raylets[raylet]:
            cluster.remove_node(node)
    assert result.code == 0, result.stderr
    assert result.stderr.count("lost the actor on node") >= 2, result.stderr
    assert result.stderr.count("is scored again") == 2, result.stderr
    assert committed(output).items() >= before.items()
    assert_same(output, alone)
    writers = {int(record.worker.rsplit(":", 1)[1]) for record in CacheReader(output).index}
    assert not writers & {worker, other, os.getpid()}


@pytest.mark.slow
def test_an_interrupted_run_is_completed_without_ray(
    cluster, settings: DumpConfig, alone: Path, tmp_path: Path
):
    """Ctrl-C ends it with exit code 130 and no actor; what was committed stays."""
    config = dataclasses.replace(settings, output=str(tmp_path / "cache"))
    output = tmp_path / "cache"
    node = cluster.add_node(num_cpus=1, **NODE)
    running = start(config, tmp_path, cluster.address, "--ray.num_actors", "1")
    running.signal_when(lambda: len(committed(output)) >= 2, signal.SIGINT)
    result = running.result()
    assert result.code == 130, result.stderr
    assert "Traceback" not in result.stderr
    deadline = time.monotonic() + DEADLINE_S
    while actors():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    done = committed(output)
    assert 2 <= len(done) < 4

    teacher = Path(config.teacher.path)
    again = dump(config)
    assert again.is_final and committed(output).items() >= done.items()
    assert_same(output, alone)

    # A node that lacks the teacher: the run ends and says which.
    config = dataclasses.replace(config, output=str(tmp_path / "other"))
    weights, away = teacher / "model.safetensors", teacher / "away"
    running = start(config, tmp_path, cluster.address)
    until(lambda: (tmp_path / "other" / "manifest.json").exists(), running)
    weights.rename(away)
    try:
        result = running.result()
    finally:
        away.rename(weights)
    cluster.remove_node(node)
    assert result.code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: node ") and "holds no weights" in line, line


def test_ray_options_need_ray(settings: DumpConfig, tmp_path: Path):
    """Without the executor they are refused, and without the package it says how to get it."""
    file = save_config(dataclasses.replace(settings, output=str(tmp_path / "cache")), tmp_path)
    run = (MODULE, "run", "--config", file)
    result = command(*run, "--ray.num_actors", "2")
    assert result.code == 2 and "add --executor ray" in result.stderr
    result = command(*run, "--executor", "ray", "--num-workers", "2")
    assert result.code == 2 and "num_workers has no effect with executor ray" in result.stderr
    result = command(*run, "--executor", "ray", "--ray.num_cpus", "0", "--ray.num_gpus", "0")
    assert result.code == 2 and "both 0" in result.stderr
    result = command(*run, "--executor", "ray", first=without_ray)
    assert result.code == 2 and "pip install 'decant[ray]'" in result.stderr
    assert not (tmp_path / "cache").exists()
    result = command(*run, "--executor", "ray", "--ray.address", "127.0.0.1:1")
    assert result.code == 2 and "no Ray cluster at 127.0.0.1:1" in result.stderr
    with pytest.raises(ValueError, match=r"ray\.max_restarts is -2: expected at least -1"):
        RayConfig(max_restarts=-2)


def without_ray() -> None:
    """As if the package were not installed."""
    sys.modules["ray"] = None  # type: ignore[assignment]
