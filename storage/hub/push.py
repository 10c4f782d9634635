"""Put a cache into a dataset repository: verified first, its manifest last, compared afterwards."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from decant.schemas.strict import UnfitError
from decant.storage.cache import paths
from decant.storage.cache.integrity import verify
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.renewal import unsettled
from decant.storage.files.scratch import scratch_folder
from decant.storage.files.store import Store
from decant.storage.hub.card import CARD, check_license, dataset_card, stated_cache_id
from decant.storage.hub.repository import (
    FOLDERS,
    KIND,
    OWN,
    cache_id_of,
    check_name,
    check_token,
    local_files,
    reaching,
    remote_bytes,
    remote_sizes,
)
from decant.storage.inspect.collect import inspect


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """What a repository holds now."""

    address: str
    files: int
    bytes: int
    problems: tuple[str, ...] = ()
    """Why nothing was pushed: the cache is damaged."""


def plan_push(url: str, repo: str, license_id: str) -> tuple[dict[str, int], str]:
    """The files that travel with their bytes, and the card; the hub is not asked.

    Raises ValueError for an impossible name or licence, FormatError if the cache is not complete.
    """
    check_name(repo)
    check_license(license_id)
    folder = _local(url)
    reader = CacheReader(url)
    card = dataset_card(reader.manifest, inspect(url, keep=True), repo, license_id)
    return {CARD: len(card.encode()), **local_files(folder)}, card


def push(
    url: str,
    repo: str,
    *,
    license_id: str,
    public: bool = False,
    progress: Callable[[int, int], None] | None = None,
    api: HfApi | None = None,
) -> Pushed:
    """Upload a complete cache into a dataset repository, which is made, private, if need be.

    An interrupted upload is continued by the next: what the hub has is not sent again. The manifest
    goes last, so that a repository never looks like a cache before it is one. `progress` is of the
    verification, in shards. Raises as `plan_push`; ValueError if the repository is public unasked,
    or holds another cache or other files; RuntimeError if the hub cannot be reached.
    """
    check_name(repo)
    check_license(license_id)
    folder, reader = _local(url), CacheReader(url)
    cache_id = reader.manifest.cache_id
    api = api or HfApi()
    check_token(api)
    report = verify(url, progress)
    if not report.ok:
        return Pushed(address="", files=0, bytes=0, problems=report.problems)
    if unsettled(Store(url), reader.manifest):
        raise UnfitError(
            f"{url} has shards in {paths.RENEWAL}/ that have no places yet, as a run was ended "
            "before it was done: run the dump again, which completes it, then push"
        )
    files, card = plan_push(url, repo, license_id)
    with reaching(repo, "the upload"):
        api.create_repo(repo, repo_type=KIND, private=not public, exist_ok=True)
        if not (public or api.dataset_info(repo).private):
            raise ValueError(f"{repo} is public: give --public if everyone may read this cache")
        _refuse_other(api, repo, cache_id)
        _commit(api, repo, {CARD: card.encode()}, "Describe the cache")
        api.upload_folder(
            repo_id=repo,
            repo_type=KIND,
            folder_path=folder,
            allow_patterns=[f"{name}/*" for name in FOLDERS],
            ignore_patterns=[".*", "*/.*"],
            commit_message="Add the cache",
        )
        manifest = (folder / paths.MANIFEST).read_bytes()
        reader.refuse_rewritten()  # then what was sent before is of this manifest
        _commit(api, repo, {paths.MANIFEST: manifest}, "Complete the cache")
        found = remote_sizes(api, repo)
    wrong = [name for name, size in files.items() if found.get(name) != size]
    if wrong:
        raise RuntimeError(
            f"{repo}: {len(wrong)} files are not there as they were sent, first {wrong[0]} with "
            f"{found.get(wrong[0], 'no')} bytes, expected {files[wrong[0]]}: push again"
        )
    address = f"{api.endpoint}/datasets/{repo}"
    return Pushed(address=address, files=len(files), bytes=sum(files.values()))


def _local(url: str) -> Path:
    if "://" in url:
        raise ValueError(f"{url} is a URL: copy the cache into a local directory, and push that")
    return Path(url).expanduser().absolute()


def _commit(api: HfApi, repo: str, files: Mapping[str, bytes], message: str) -> None:
    """Commit small files; nothing happens if they are there already."""
    operations = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=d) for n, d in files.items()]
    api.create_commit(repo, operations, commit_message=message, repo_type=KIND)


def _refuse_other(api: HfApi, repo: str, cache_id: str) -> None:
    """Raise ValueError unless a repository is empty, or holds this cache or a part of it."""
    names = remote_sizes(api, repo)
    with scratch_folder() as scratch:
        theirs = ""
        if paths.MANIFEST in names:
            manifest = remote_bytes(api, repo, paths.MANIFEST, Path(scratch))
            theirs = cache_id_of(manifest) or "that cannot be read"
        elif CARD in names:
            card = remote_bytes(api, repo, CARD, Path(scratch))
            theirs = stated_cache_id(card.decode(errors="replace"))
    if theirs and theirs != cache_id:
        raise ValueError(
            f"{repo} holds another cache, {theirs!r:.60}; this one is {cache_id}: push it into a "
            "repository of its own"
        )
    others = sorted(set(names) - {*OWN, CARD})
    if others and not theirs:
        raise ValueError(
            f"{repo} holds other files, first {others[0]!r:.80}: push the cache into a repository "
            "of its own"
        )
