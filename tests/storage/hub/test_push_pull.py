"""A cache travels through the hub whole, or not at all."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi

from decant.schemas import FormatError
from decant.storage import CacheReader, verify
from decant.storage.cache import paths
from decant.storage.hub.pull import plan_pull, pull
from decant.storage.hub.push import plan_push, push
from decant.student_train import CacheStream
from tests.support import ROOT, caches
from tests.support.hub_server import Hub, hub_server

REPO = "me/demo-cache"
LICENSE = "apache-2.0"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, spoken to in plain HTTP."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.utils.disable_progress_bars()
    with hub_server() as running:
        yield running


def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_test")


def cache(path: Path, **options: Any) -> Path:
    """A cache of two shards, with something in its directory that is no part of it."""
    settings = caches.Settings(**options)
    caches.write_cache(path, settings, caches.random_shards(settings))
    (path / "notes.txt").write_text("my own")
    (path / "shards" / ".left.tmp").write_text("left by a killed writer")
    return path


def assert_equal(a: CacheReader, b: CacheReader) -> None:
    assert a.manifest == b.manifest and len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.input_ids, y.input_ids)
        np.testing.assert_array_equal(x.logprobs, y.logprobs)


def test_what_was_pushed_is_pulled(hub: Hub, tmp_path: Path) -> None:
    """Private, with a card; verified; equal; and nothing but the cache travels."""
    source = cache(tmp_path / "cache")
    pushed = push(str(source), REPO, license_id=LICENSE, api=api(hub))
    there = hub.repositories[REPO]
    assert there.private and pushed.address == f"{hub.url}/datasets/{REPO}"
    assert pushed.files == len(there.files)
    assert pushed.bytes == sum(len(data) for data in there.files.values())
    assert not {"notes.txt", "shards/.left.tmp"} & set(there.files)
    planned, card = plan_push(str(source), REPO, LICENSE)
    assert planned == {name: len(data) for name, data in there.files.items()}
    assert there.files["README.md"].decode() == card
    files, commit = plan_pull(REPO, api=api(hub))
    assert files == {name: size for name, size in planned.items() if name != "README.md"}
    pulled = pull(REPO, tmp_path / "pulled", api=api(hub))
    assert pulled.report.ok and pulled.revision == commit == there.sha
    assert_equal(CacheReader(tmp_path / "pulled"), CacheReader(source))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "pulled"]
    assert not (tmp_path / "pulled/.cache").exists()


def test_a_push_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    """Sent files are not sent again, and the manifest is not there before all of them are."""
    source = cache(tmp_path / "cache")
    hub.fails_after = 1
    with pytest.raises(RuntimeError, match=rf"{REPO}: the upload was not finished: .*goes on"):
        push(str(source), REPO, license_id=LICENSE, api=api(hub))
    assert paths.MANIFEST not in hub.repositories[REPO].files
    with pytest.raises(ValueError, match=f"{REPO} holds no cache: there is no manifest"):
        pull(REPO, tmp_path / "pulled", api=api(hub))
    hub.fails_after = None
    push(str(source), REPO, license_id=LICENSE, api=api(hub))
    assert len(hub.uploads) == len(set(hub.uploads))
    commits, sent = hub.repositories[REPO].commits, len(hub.uploads)
    push(str(source), REPO, license_id=LICENSE, api=api(hub))
    assert (hub.repositories[REPO].commits, len(hub.uploads)) == (commits, sent)


def test_a_pull_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    """What was fetched before the interruption is not fetched again."""
    source = cache(tmp_path / "cache")
    push(str(source), REPO, license_id=LICENSE, api=api(hub))
    shard = paths.shard(1)
    kept = hub.repositories[REPO].files.pop(shard)
    pulled = pull(REPO, tmp_path / "pulled", api=api(hub))
    assert not pulled.report.ok and "is missing" in " ".join(pulled.report.problems)
    assert not (tmp_path / "pulled").exists() and list(tmp_path.iterdir()) == [source]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    hub.repositories[REPO].files[shard] = kept
    hub.repositories[REPO].commits += 1
    with pytest.raises(KeyboardInterrupt):
        pull(REPO, tmp_path / "pulled", progress=interrupt, api=api(hub))
    before = len(hub.downloads)
    assert pull(REPO, tmp_path / "pulled", api=api(hub)).report.ok
    assert len(hub.downloads) == before
    assert_equal(CacheReader(tmp_path / "pulled"), CacheReader(source))


def test_hf_urls_are_read_in_ranges(hub: Hub, tmp_path: Path) -> None:
    """A reader and a training stream open the repository; they fetch what they use and no more."""
    source = cache(tmp_path / "cache")
    push(str(source), REPO, license_id=LICENSE, public=True, api=api(hub))
    fsspec.config.conf["hf"] = {"endpoint": hub.url, "token": "hf_test"}
    try:
        url = f"hf://datasets/{REPO}"
        hub.downloads.clear()
        assert_equal(CacheReader(url), CacheReader(source))
        shards = [asked for name, asked in hub.downloads if name.startswith("shards/")]
        assert shards and all(shards)
        spans = [asked.removeprefix("bytes=").split("-") for asked in shards]
        size = sum(f.stat().st_size for f in (source / "shards").glob("*.parquet"))
        assert sum(int(end) - int(start) + 1 for start, end in spans) <= size
        assert verify(url).ok
        here = next(iter(CacheStream(str(source), batch_size=2)))
        there = next(iter(CacheStream(url, batch_size=2)))
        assert (here.input_ids == there.input_ids).all()
        with pytest.raises(FormatError, match="hf://datasets/me/nothing"):
            CacheReader("hf://datasets/me/nothing")
    finally:
        del fsspec.config.conf["hf"]


def test_a_repository_of_something_else_is_refused(hub: Hub, tmp_path: Path) -> None:
    """Another cache, a part of another one, or any other files stay as they are."""
    first, second = cache(tmp_path / "a"), cache(tmp_path / "b", precision="f16")
    push(str(first), REPO, license_id=LICENSE, api=api(hub))
    there = dict(hub.repositories[REPO].files)
    ids = [CacheReader(path).manifest.cache_id for path in (first, second)]
    with pytest.raises(ValueError, match=f"holds another cache, '{ids[0]}'; this one is {ids[1]}"):
        push(str(second), REPO, license_id=LICENSE, api=api(hub))
    assert hub.repositories[REPO].files == there
    del hub.repositories[REPO].files[paths.MANIFEST]
    with pytest.raises(ValueError, match=f"holds another cache, '{ids[0]}'"):
        push(str(second), REPO, license_id=LICENSE, api=api(hub))
    hub.repositories[REPO].private = False
    with pytest.raises(ValueError, match=f"{REPO} is public: give --public"):
        push(str(first), REPO, license_id=LICENSE, api=api(hub))
    hub.repositories[REPO].private = True
    hub.repositories[REPO].files = {".gitattributes": b"", "data.csv": b"a,b"}
    with pytest.raises(ValueError, match=r"holds other files, first 'data\.csv'"):
        push(str(first), REPO, license_id=LICENSE, api=api(hub))
    assert list(hub.repositories[REPO].files) == [".gitattributes", "data.csv"]


def test_what_cannot_be_pushed_is_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No licence, name or token, a URL, an unfinished or damaged cache: the hub has nothing."""
    source = cache(tmp_path / "cache")

    def refuse(message: str, url: str = str(source), repo: str = REPO, name: str = LICENSE) -> None:
        with pytest.raises(ValueError, match=message):
            push(url, repo, license_id=name, api=api(hub))

    refuse("--license '' is no identifier of a licence", name="")
    refuse("is no identifier of a licence", name="my licence\ninjected: true")
    refuse("'demo' is not the name of a repository: expected OWNER/NAME", repo="demo")
    refuse("is a URL: copy the cache into a local directory", url="memory://cache")
    settings = caches.Settings()
    caches.start_cache(tmp_path / "started", settings, caches.random_shards(settings))
    refuse("is not complete", url=str(tmp_path / "started"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(ValueError, match="pushing needs a token: run `hf auth login`"):
        push(str(source), REPO, license_id=LICENSE, api=HfApi(endpoint=hub.url))
    file = source / paths.shard(1)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    pushed = push(str(source), REPO, license_id=LICENSE, api=api(hub))
    assert pushed.problems and "part-000001.parquet" in pushed.problems[0]
    assert not hub.repositories


def test_what_cannot_be_pulled_is_refused(hub: Hub, tmp_path: Path) -> None:
    """No such repository or revision, no cache in it, a place that is taken."""
    with pytest.raises(ValueError, match="me/nothing: no such dataset repository or revision"):
        pull("me/nothing", tmp_path / "out", api=api(hub))
    push(str(cache(tmp_path / "cache")), REPO, license_id=LICENSE, api=api(hub))
    with pytest.raises(ValueError, match="no such dataset repository or revision"):
        pull(REPO, tmp_path / "out", revision="v9", api=api(hub))
    with pytest.raises(FileExistsError, match="exists already"):
        pull(REPO, tmp_path / "cache", api=api(hub))
    with pytest.raises(ValueError, match="is a URL"):
        pull(REPO, "memory://out", api=api(hub))
    del hub.repositories[REPO].files[paths.MANIFEST]
    with pytest.raises(ValueError, match="holds a cache that is not completely pushed"):
        pull(REPO, tmp_path / "out", api=api(hub))
    assert not (tmp_path / "out").exists()


def test_a_damaged_download_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    """A repository whose files are not those of its manifest gives problems, and no directory."""
    push(str(cache(tmp_path / "cache")), REPO, license_id=LICENSE, api=api(hub))
    files = hub.repositories[REPO].files
    data = bytearray(files[paths.shard(0)])
    data[len(data) // 2] ^= 1
    files[paths.shard(0)] = bytes(data)
    pulled = pull(REPO, tmp_path / "out", api=api(hub))
    assert not pulled.report.ok and "part-000000.parquet" in pulled.report.problems[0]
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_the_commands_list_push_and_pull(tmp_path: Path) -> None:
    """As processes, with HF_ENDPOINT: a list of files and bytes, an address, a verified copy."""
    source = cache(tmp_path / "cache")
    with hub_server() as hub:
        env = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "decant", *arguments]
            return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

        done = run("push", str(source), REPO)
        assert done.returncode == 2 and "--license" in done.stderr
        listed = run("push", str(source), REPO, "--license", LICENSE, "--dry-run")
        assert listed.returncode == 0 and not hub.repositories
        assert "manifest.json" in listed.stdout and "bytes in " in listed.stdout
        done = run("push", str(source), REPO, "--license", LICENSE)
        files = hub.repositories[REPO].files
        expected = f"{hub.url}/datasets/{REPO}: {len(files)} files, "
        assert (done.returncode, done.stdout.startswith(expected)) == (0, True), done.stderr
        done = run("pull", REPO, str(tmp_path / "out"))
        assert (
            done.returncode == 0 and done.stderr == "" and "targets in 8 sequences" in done.stdout
        )
    assert verify(tmp_path / "out").ok


def test_the_cards_metadata_is_yaml(tmp_path: Path) -> None:
    """What the hub reads: licence, where the data are, and whose cache it is."""
    source = cache(tmp_path / "cache")
    _, card = plan_push(str(source), REPO, LICENSE)
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == LICENSE and metadata["size_categories"] == ["n<1K"]
    assert metadata["configs"][0]["data_files"] == "shards/part-*.parquet"
    assert metadata["decant_cache_id"] == CacheReader(source).manifest.cache_id


def test_a_link_that_leads_out_does_not_travel(tmp_path: Path) -> None:
    """A stranger's cache cannot have other files of this machine pushed."""
    path = cache(tmp_path / "cache")
    (tmp_path / "secret").write_text("mine")
    (path / "generated").mkdir()
    (path / "generated" / "part-000000.parquet").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="outside of"):
        plan_push(str(path), REPO, LICENSE)
