"""A bucket is as good as a directory: the same commands, the same cache, the same training.

Everything goes over HTTP to a server of the S3 protocol that runs in this process (moto); the
commands are processes of their own and find it as users would point them at theirs: by AWS_*
variables.

One file, as the tests share one server and the dumps in it.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from decant.schemas import FormatError
from decant.storage import CacheReader, CacheWriter, Store, verify
from decant.storage.cache import paths
from decant.student_train import CacheStream
from decant.teacher_dump import DumpConfig, dump
from tests.support import FIXTURES, ROOT, caches
from tests.support.commands import DEADLINE_SECONDS, Command, Result, command, setting

BUCKET = "decant"
SETTINGS = caches.Settings()
STUDENT = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
}


@dataclass
class Server:
    """A running S3 server with one bucket."""

    environment: dict[str, str]
    """What points a client at it."""
    client: Any
    """boto3's, to look behind our back."""
    lines: list[str] = field(default_factory=list)
    """"METHOD target" of every request so far."""
    before_answers: list[Callable[[str], None]] = field(default_factory=list)
    """Called with every such line once the request is done and before its answer is sent."""

    def objects(self, prefix: str = "") -> list[str]:
        """The objects below a prefix of the bucket."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for entry in found.get("Contents", [])]

    def take(self) -> list[str]:
        """The requests since the last call, as METHOD and last part of the key."""
        taken = [re.sub(r"\S*/(\S+)$", r"\1", line) for line in self.lines if "?list" not in line]
        taken += ["LIST" for line in self.lines if "?list" in line]
        self.lines.clear()
        return taken


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Started on a free port of this machine; this process's environment points at it too."""
    from moto.server import ThreadedMotoServer

    lines: list[str] = []
    before_answers: list[Callable[[str], None]] = []

    def note(handler: Any, *_: object) -> None:
        lines.append(f"{handler.command} {handler.path}")
        for call in list(before_answers):
            call(lines[-1])

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("werkzeug.serving.WSGIRequestHandler.log_request", note)
        moto.start()
        yield from _serve(moto, patch, lines, before_answers)
    moto.stop()


def _serve(
    moto: Any, patch: pytest.MonkeyPatch, lines: list[str], before_answers: list
) -> Iterator[Server]:
    import boto3  # here, as child processes import this file too

    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{moto.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in environment.items():
        patch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield Server(environment, client, lines, before_answers)


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    """Where this test may put its cache."""
    return f"s3://{BUCKET}/{request.node.name}/cache"


@pytest.fixture(scope="module")
def remote(
    server: Server, dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The cache of the fixture `cache`, dumped into the bucket by the command. Only to be read."""
    url = f"s3://{BUCKET}/remote/cache"
    config = dataclasses.replace(dump_config, output=url)
    done = run(server, "teacher_dump", "run", "--config", saved(config, tmp_path_factory))
    assert done.code == 0, done.stderr
    return url


def run(server: Server, module: str, *arguments: str, **environment: str) -> Result:
    """A command to its end, pointed at the server."""
    return command(module, *arguments, first=setting({**server.environment, **environment}))


def saved(config: DumpConfig, factory: pytest.TempPathFactory) -> str:
    """The config as a file; JSON is YAML."""
    path = factory.mktemp("config") / "dump.yaml"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    return str(path)


def small_steps(config: DumpConfig, url: str) -> DumpConfig:
    """Batches so small that there is time to interrupt."""
    teacher = dataclasses.replace(config.teacher, max_batch_tokens=64)
    return dataclasses.replace(config, output=url, teacher=teacher)


def assert_same(found: str, expected: str | Path, *, exact: bool = True) -> None:
    """The same sequences; bit for bit, or as far as the batches they were scored in allow."""
    ours, theirs = CacheReader(found), CacheReader(expected)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if exact:
            caches.assert_equal(one, other)
        else:
            assert one.sample_id == other.sample_id
            assert (one.input_ids == other.input_ids).all()
            assert abs(one.label_logprob - other.label_logprob).max() < 1e-3


def assert_clean(result: Result, *words: str) -> None:
    """Exit code 2, as nothing is damaged, one line that holds these words, and no traceback."""
    assert result.code == 2, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert all(word in line for word in words), line


# The commands


def test_a_dump_into_a_bucket_is_the_one_into_a_directory(
    server: Server, remote: str, cache: Path
) -> None:
    """Row for row; no temporary, no input and nothing else is left behind."""
    assert_same(remote, cache)
    ours = {key.removeprefix("remote/cache/") for key in server.objects("remote/")}
    theirs = {p.relative_to(cache) for p in cache.rglob("*") if p.is_file()}
    assert ours == {str(path) for path in theirs if path.parts[0] != "stats"}  # kept by `inspect`


def test_a_rerun_leaves_a_complete_cache_alone(
    server: Server,
    remote: str,
    dump_config: DumpConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Exit code 0, and no request that writes."""
    config = dataclasses.replace(dump_config, output=remote)
    server.take()
    done = run(server, "teacher_dump", "run", "--config", saved(config, tmp_path_factory))
    assert done.code == 0 and "complete already" in done.stderr
    assert {line.split()[0] for line in server.take()} == {"GET", "HEAD", "LIST"}


def test_verify_says_that_a_bucket_holds_a_whole_cache(server: Server, remote: str) -> None:
    """Exit code 0, one line, and no chatter of the libraries."""
    done = run(server, "storage", "verify", remote)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{remote} is whole")


def test_inspect_says_the_same_of_a_bucket(server: Server, remote: str, cache: Path) -> None:
    """But for the place and the time it took; quantiles of many values are drawn, so not equal."""

    def comparable(value: Any) -> Any:
        if isinstance(value, list):
            return [comparable(item) for item in value]
        if isinstance(value, dict):
            drawn = re.compile(r"p\d\d|url|dump_seconds|dump_speed|targets_per_second")
            return {k: comparable(v) for k, v in value.items() if not drawn.fullmatch(k)}
        return value

    reports = [
        json.loads(run(server, "storage", "inspect", str(place), "--json").stdout)
        for place in (remote, cache)
    ]
    assert reports[0]["url"] == remote and reports[0].keys() == reports[1].keys()
    assert comparable(reports[0]) == comparable(reports[1])


def test_an_old_cache_can_be_migrated_into_a_bucket_and_exported_from_it(
    server: Server, url: str, tmp_path: Path
) -> None:
    """From a directory to a bucket, and from there to plain lists."""
    cache = FIXTURES / "version-1/compact"
    done = run(server, "storage", "migrate", str(cache), url)
    assert done.code == 0, done.stderr
    assert verify(url).problems == ()
    assert_same(url, cache)
    done = run(server, "storage", "export", url, str(tmp_path / "lists"))
    assert done.code == 0, done.stderr
    assert list((tmp_path / "lists").glob("*.parquet"))


def test_a_kill_loses_one_shard(
    server: Server,
    url: str,
    cache: Path,
    dump_config: DumpConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """SIGKILL in the middle: every commit record has its whole shard, and a rerun completes."""
    config = saved(small_steps(dump_config, url), tmp_path_factory)
    folder = url.removeprefix(f"s3://{BUCKET}/") + "/shards/"
    running = Command("teacher_dump", "run", "--config", config, first=setting(server.environment))
    server.take()

    def sent() -> int:
        return sum(line.startswith("PUT") and folder in line for line in server.lines)

    running.signal_when(lambda: sent() >= 3, signal.SIGKILL)
    assert running.result().code == -signal.SIGKILL
    done = {key: head(server, key) for key in server.objects(folder)}
    records = [key for key in done if key.endswith(".json")]
    planned = CacheWriter(url).manifest.num_shards
    assert 1 <= len(records) < planned
    for record in records:
        said = json.loads(server.client.get_object(Bucket=BUCKET, Key=record)["Body"].read())
        assert done[record.removesuffix("json") + "parquet"]["ContentLength"] == said["bytes"]
    found = run(server, "storage", "verify", url)
    assert found.code == 1 and f"{url} is not complete" in found.stdout
    again = run(server, "teacher_dump", "run", "--config", config)
    assert again.code == 0, again.stderr
    for key in records:
        assert head(server, key)["LastModified"] == done[key]["LastModified"], "was written again"
    assert verify(url).problems == ()
    assert_same(url, cache, exact=False)


def head(server: Server, key: str) -> dict[str, Any]:
    return server.client.head_object(Bucket=BUCKET, Key=key)


def test_workers_fill_a_bucket_together(
    server: Server,
    url: str,
    cache: Path,
    dump_config: DumpConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Three at once, the one that starts the cache last: each shard by one, sealed by the last."""
    config = saved(dataclasses.replace(dump_config, output=url), tmp_path_factory)
    workers = [
        Command(
            *("teacher_dump", "run", "--config", config),
            *("--worker-index", str(index), "--num-workers", "3"),
            first=setting(server.environment),
        )
        for index in (2, 1, 0)
    ]
    for worker in workers:
        result = worker.result()
        assert result.code == 0, result.stderr
    assert verify(url).problems == ()
    assert_same(url, cache)
    assert len({record.worker for record in CacheReader(url).index}) == 3


def test_training_from_a_bucket_is_training_from_a_directory(
    server: Server, remote: str, cache: Path, tmp_path: Path
) -> None:
    """The same loss at every step, though the run from the bucket is killed and resumed."""

    def arguments(source: str | Path, name: str) -> list[str]:
        config = {
            "cache": str(source),
            "output": str(tmp_path / name),
            "student": {"config": STUDENT},
            "steps": 12,
            "batch_size": 4,
            "log_every_steps": 1,
            "save_every_steps": 4,
            "eval": {"heldout_fraction": 0.1, "every_steps": 6},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
        return ["student_train", "--config", str(tmp_path / f"{name}.yaml")]

    killed = Command(*arguments(remote, "remote"), first=setting(server.environment))
    killed.signal_when(
        lambda: any((tmp_path / "remote/checkpoints").glob("step-*")), signal.SIGKILL
    )
    assert killed.result().code == -signal.SIGKILL
    resumed = run(server, *arguments(remote, "remote"))
    assert resumed.code == 0 and "resumed from" in resumed.stderr, resumed.stderr
    done = command(*arguments(cache, "local"))
    assert done.code == 0, done.stderr
    curves = [
        [
            {k: v for k, v in json.loads(line).items() if "divergence" in k or "loss" in k}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("remote", "local")
    ]
    assert len(curves[0]) >= 12 and curves[0][0]
    assert curves[0] == curves[1]


# What goes wrong


def test_a_damaged_object_is_found(server: Server, url: str) -> None:
    """By verify, with exit code 1 and the URL of the object; and by who reads it."""
    caches.write_cache(url, SETTINGS, caches.random_shards(SETTINGS))
    where = f"{url}/{paths.shard(1)}"
    key = where.removeprefix(f"s3://{BUCKET}/")
    good = server.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    at = len(good) // 3
    flipped = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
    for body in (flipped, good[:-9], b"", None):
        if body is None:
            server.client.delete_object(Bucket=BUCKET, Key=key)
        else:
            server.client.put_object(Bucket=BUCKET, Key=key, Body=body)
        found = f"{where} is missing" if body is None else f"{where} is damaged"
        (problem,) = verify(url).problems
        assert problem.startswith(found)
        with pytest.raises(FormatError, match=found):
            list(CacheReader(url))
    done = run(server, "storage", "verify", url)
    assert (done.code, done.stdout.strip()) == (1, problem)


def test_an_empty_object_is_no_manifest(server: Server, url: str) -> None:
    """A zero-byte manifest is damage, not an error of the store."""
    key = f"{url}/{paths.MANIFEST}".removeprefix(f"s3://{BUCKET}/")
    server.client.put_object(Bucket=BUCKET, Key=key, Body=b"")
    with pytest.raises(FormatError, match=r"manifest\.json is damaged"):
        CacheReader(url)


def test_a_bucket_or_cache_that_is_not_there_is_one_clean_line(
    server: Server, dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Exit code 2 with the URL, for who reads and for who writes."""
    for place in ("s3://no-such-bucket/cache", "s3://no-such-bucket", f"s3://{BUCKET}/nothing"):
        assert not Store(place).exists("")
    assert_clean(run(server, "storage", "verify", place), f"{place}: no such directory")
    config = dataclasses.replace(dump_config, output="s3://no-such-bucket/cache")
    done = run(server, "teacher_dump", "run", "--config", saved(config, tmp_path_factory))
    assert_clean(done, "s3://no-such-bucket/cache/", "bucket does not exist")


def test_wrong_credentials_are_one_clean_line(server: Server, remote: str) -> None:
    """Exit code 2 with the URL and what the store says; no guess that nothing is there."""
    set_authentication(server, "0")
    try:
        done = run(server, "storage", "verify", remote, AWS_ACCESS_KEY_ID="wrong")
    finally:
        set_authentication(server, "inf")
    assert_clean(done, remote, "Forbidden")


def set_authentication(server: Server, after: str) -> None:
    """Have the server look at signatures after so many requests."""
    place = f"{server.environment['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    request = urllib.request.Request(place, after.encode(), {"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()


def test_no_credentials_are_one_clean_line(server: Server, remote: str) -> None:
    """Exit code 2 with the URL; also for a profile that no file describes."""
    done = run(server, "storage", "inspect", remote, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert_clean(done, remote, "credentials")
    assert_clean(run(server, "storage", "inspect", remote, AWS_PROFILE="nope"), remote, "nope")


def test_a_store_that_does_not_answer_is_one_clean_line(server: Server, tmp_path: Path) -> None:
    """Exit code 2 with URL and endpoint, after the attempts that AWS_MAX_ATTEMPTS allows."""
    place = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    done = run(server, "storage", "verify", f"s3://{BUCKET}", **place)
    assert_clean(done, f"s3://{BUCKET}: Could not connect", "http://127.0.0.1:9")
    config = {"cache": f"s3://{BUCKET}/cache", "output": str(tmp_path / "run")}
    (tmp_path / "train.yaml").write_text(
        json.dumps({**config, "steps": 1, "student": {"config": STUDENT}})
    )
    done = run(server, "student_train", "--config", str(tmp_path / "train.yaml"), **place)
    assert_clean(done, f"s3://{BUCKET}/cache/manifest.json: Could not connect")


@pytest.mark.parametrize(
    ("variables", "waits"),
    [({"AWS_MAX_ATTEMPTS": "1"}, 2), pytest.param({}, 6, marks=pytest.mark.slow)],
)
def test_a_mute_store_is_given_up(server: Server, variables: dict[str, str], waits: int) -> None:
    """One that accepts and never answers: after six waits, or as many as the variables say."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        held: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    held.append(mute.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        place = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{mute.getsockname()[1]}",
            "FSSPEC_S3": '{"config_kwargs": {"read_timeout": 0.3}}',
            **variables,
        }
        done = run(server, "storage", "verify", f"s3://{BUCKET}/cache", **place)
        assert_clean(done, f"s3://{BUCKET}/cache", "Read timeout", place["AWS_ENDPOINT_URL"])
        assert len(held) == waits
        for connection in held:
            connection.close()


def test_without_s3fs_the_message_says_what_to_install(server: Server) -> None:
    """Exit code 2."""
    script = "import runpy, sys; sys.modules['s3fs'] = None; sys.argv = ['storage', *sys.argv[1:]]"
    script += "; runpy.run_module('storage', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script, "verify", "s3://bucket/cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert_clean(Result(done.returncode, done.stdout, done.stderr), "s3://bucket/cache", "s3fs")


def test_the_variables_of_fsspec_work_too(server: Server, remote: str) -> None:
    """FSSPEC_S3_* give any option of s3fs by name."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environment |= {
        "FSSPEC_S3_ENDPOINT_URL": server.environment["AWS_ENDPOINT_URL"],
        "FSSPEC_S3_KEY": "testing",
        "FSSPEC_S3_SECRET": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", f"import storage; storage.CacheReader('{remote}')[7]"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# Requests


def test_opening_takes_two_requests_and_a_row_group_one(server: Server, url: str) -> None:
    """However many shards there are; the first group of a shard takes one more, for its footer."""
    shards = caches.random_shards(SETTINGS, num_shards=7)
    writer = caches.start_cache(url, SETTINGS, shards)
    server.take()
    for index, sequences in enumerate(shards):
        caches.write_shard(writer, index, sequences, row_group_rows=20)
    names = [f"part-{i:06d}" for i in range(7)]
    written = [line for line in server.take() if line.startswith("PUT")]
    assert written == [f"PUT {name}.{end}" for name in names for end in ("parquet", "json")]
    assert writer.missing() == []
    none_renewed = ["LIST", "LIST"]  # s3fs looks twice for a folder that is not there
    assert server.take() == ["LIST", *none_renewed]
    assert len(list(writer.committed())) == 7
    assert sorted(server.take()) == sorted(
        ["LIST", *none_renewed, *(f"GET {name}.json" for name in names)]
    )
    writer.finalize()
    server.take()
    reader = CacheReader(url)
    assert server.take() == ["GET manifest.json", "GET records-000000.parquet"]
    groups = reader.row_groups()
    assert len(groups) > 7
    for group in groups:
        reader.read(group)
        expected = ["GET " + names[group.shard] + ".parquet"] * (2 if group.index == 0 else 1)
        assert server.take() == expected
    assert verify(url).ok
    of_shard = 1 + 1 + 2  # its record, its size, its footer and the magic before the row groups
    of_cache = 3 + 2  # its manifest, records and plan; a look for an extension's manifest
    assert len(server.take()) == of_cache + 2 + 7 * of_shard + len(groups)  # two listings


def test_what_others_write_is_seen_at_once(server: Server, url: str) -> None:
    """No listing is remembered: presence, size and content are asked of the store every time."""
    watching, writing = Store(url), Store(url)
    assert watching.names("shards") == [] and not watching.exists("shards/a")
    writing.publish("shards/a", b"12")
    assert watching.names("shards") == ["a"] and watching.exists("shards/a")
    writing.publish("shards/a", b"123")
    assert watching.size("shards/a") == 3 and watching.sizes("shards") == {"a": 3}
    assert watching.read("shards/a") == b"123"
    writing.remove("shards/a")
    assert not watching.exists("shards/a") and watching.names("shards") == []


def test_the_object_that_shows_a_folder_is_no_file(server: Server, url: str) -> None:
    """Consoles make an empty object with a slash at the end; a dump may start there."""
    key = url.removeprefix(f"s3://{BUCKET}/")
    for folder in ("", "shards/"):
        server.client.put_object(Bucket=BUCKET, Key=f"{key}/{folder}", Body=b"")
    store = Store(url)
    assert store.names("") == ["shards"] and store.names("shards") == []
    assert store.sizes("shards") == {}


def test_a_folder_is_removed_by_its_name_alone(server: Server, url: str) -> None:
    """What other tools would take for a pattern is a name here."""
    for name in ("run[1]", "run1", "run*"):
        Store(f"{url}/{name}").publish("inputs/file", b"")
    Store(f"{url}/run[1]").remove_folder("inputs")
    Store(f"{url}/run*").remove_folder("inputs")
    left = [Store(f"{url}/{name}").names("inputs") for name in ("run[1]", "run1", "run*")]
    assert left == [[], ["file"], []]


def test_ranges_and_whole_reads_are_what_was_written(server: Server, url: str) -> None:
    """Ranges are cut at the end of the file; behind it there is nothing."""
    store = Store(url)
    store.publish("file", b"0123456789")
    assert store.read("file") == b"0123456789"
    assert [store.read_range("file", a, n) for a, n in [(0, 3), (8, 5), (10, 1), (99, 4)]] == [
        *(b"012", b"89", b"", b"")
    ]
    for read in (store.read, store.size, store.hash, lambda name: store.read_range(name, 0, 1)):
        with pytest.raises(FileNotFoundError, match=f"{url}/nothing"):
            read("nothing")


# Writing together


def test_of_two_different_caches_on_one_prefix_one_is_started(server: Server, url: str) -> None:
    """Whoever comes second gets a clean error, and the first cache is whole."""
    shards = {v: caches.random_shards(caches.Settings(vocab_size=v)) for v in range(50, 56)}
    barrier = threading.Barrier(len(shards))

    def start(vocab_size: int) -> int | None:
        settings = caches.Settings(vocab_size=vocab_size)
        plan = caches.plan_of(shards[vocab_size][: vocab_size - 48])
        barrier.wait()
        try:
            CacheWriter.create(url, settings.draft(), plan)
        except FileExistsError:
            return None
        return vocab_size

    with ThreadPoolExecutor(len(shards)) as pool:
        (winner,) = [v for v in pool.map(start, shards) if v is not None]
    writer = CacheWriter(url)
    assert writer.manifest.shared_vocab_size == winner


def test_the_same_cache_may_be_started_twice(server: Server, url: str) -> None:
    """An upload that is repeated because its answer was lost finds its own work: no error."""
    store = Store(url)
    for _ in range(2):
        store.publish("file", b"mine", new=True)
    with pytest.raises(FileExistsError, match=f"{url}/file"):
        store.publish("file", b"other", new=True)
    assert store.read("file") == b"mine"


def test_a_start_that_lost_the_race_leaves_the_winner_alone(
    server: Server, url: str, dump_config: DumpConfig
) -> None:
    """A dump that finds another plan where it wants to put its own removes nothing of it."""
    plan = paths.segment(paths.PLAN)

    def rival(line: str) -> None:
        if line.endswith(paths.inputs(0)):
            key = f"{url}/{plan}".removeprefix(f"s3://{BUCKET}/")
            server.client.put_object(Bucket=BUCKET, Key=key, Body=b"another's plan")

    server.before_answers.append(rival)
    try:
        with pytest.raises(FileExistsError, match="another process is starting a different cache"):
            dump(dataclasses.replace(dump_config, output=url))
    finally:
        server.before_answers.remove(rival)
    assert Store(url).read(plan) == b"another's plan"


def test_a_shard_that_another_process_committed_is_left_alone(
    server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower of two writers drops its own, and no temporary file stays behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (sequences,) = caches.random_shards(SETTINGS, num_shards=1)
    writer = caches.start_cache(url, SETTINGS, [sequences])
    with writer.shard(0) as slower:
        caches.write_shard(CacheWriter(url), 0, sequences)
        first = {key: head(server, key)["LastModified"] for key in server.objects()}
        server.take()
        for sequence in sequences:
            slower.write(sequence)
    assert not [line for line in server.take() if line.startswith("PUT")]
    assert {key: head(server, key)["LastModified"] for key in server.objects()} == first
    writer.finalize()
    assert verify(url).ok
    assert list(tmp_path.iterdir()) == []


def test_temporaries_are_removed_when_anything_fails(
    server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether filling the file fails or sending it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError), Store(url).staged("file") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert not Store(url).exists("file")
    with pytest.raises(FileNotFoundError, match=r"s3://no-such-bucket/file: .*bucket"):
        Store("s3://no-such-bucket").publish("file", b"")
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=f"{tmp_path}.* to be {url}/file"), Store(url).staged("file"):
        raise full
    assert list(tmp_path.iterdir()) == []


def send(url: str, environment: dict[str, str], size: int, folder: Path) -> None:
    """Publish a file of zeros, made in this folder."""
    os.environ.update(environment)
    tempfile.tempdir = str(folder)
    with Store(url).staged("large") as temporary:
        os.truncate(temporary, size)


def test_of_a_killed_upload_in_parts_nothing_is_visible(
    server: Server, url: str, tmp_path: Path
) -> None:
    """SIGKILL while parts are sent: no object, only parts that a lifecycle rule removes."""
    size = 101 << 20
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    arrived, killed = threading.Event(), threading.Event()

    def hold(line: str) -> None:
        if "partNumber" in line:
            arrived.set()
            killed.wait(DEADLINE_SECONDS)

    server.before_answers.append(hold)
    try:
        sender = get_context("forkserver").Process(
            target=send, args=(url, server.environment, size, tmp_path)
        )
        sender.start()
        while not arrived.wait(1):
            assert sender.is_alive(), f"the sender ended with {sender.exitcode}"
        sender.kill()
        sender.join()
    finally:
        killed.set()
        server.before_answers.remove(hold)
    assert server.objects(prefix) == [] and Store(url).names("") == []
    left = server.client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert [upload["Key"] for upload in left] == [f"{prefix}/large"]


# Reading together


def test_forked_loader_workers_and_threads_read_a_bucket(remote: str, cache: Path) -> None:
    """A stream that was opened, and read from, before the fork: the same batches as locally."""

    def batches(source: str | Path, workers: int) -> list[torch.Tensor]:
        stream = CacheStream(source, batch_size=4, threads=4)
        stream.reader.read(stream.reader.row_groups()[0])
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        found = []
        for batch in loader:
            found.append(batch.input_ids)
            if len(found) == 12:
                return found
        raise AssertionError("a stream has no end")

    expected = batches(cache, 0)
    for workers in (0, 2):
        for ours, theirs in zip(batches(remote, workers), expected, strict=True):
            assert torch.equal(ours, theirs)
    reader = CacheReader(remote)
    groups = list(reader.row_groups())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda g: CacheReader(remote).read(g).input_ids.tobytes(), groups))
    assert found == [reader.read(group).input_ids.tobytes() for group in groups]
