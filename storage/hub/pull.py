"""Copy a cache out of a dataset repository; it goes on after interruptions, and is verified."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from decant.storage.cache import paths
from decant.storage.cache.integrity import VerifyReport, verify
from decant.storage.files.durable import move, sync_tree
from decant.storage.hub.repository import (
    KIND,
    PATTERNS,
    check_name,
    reaching,
    remote_sizes,
)

CLIENTS_OWN = ".cache"
"""Where the hub's client keeps what it has of unfinished files; no part of a cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """What was copied."""

    revision: str
    """Commit of the repository."""
    report: VerifyReport


def plan_pull(
    repo: str, *, revision: str | None = None, api: HfApi | None = None
) -> tuple[dict[str, int], str]:
    """The files that would be copied with their bytes, and the commit they are of.

    Raises ValueError if there is no such repository, or no cache in it.
    """
    check_name(repo)
    api = api or HfApi()
    with reaching(repo, "the listing"):
        commit = api.dataset_info(repo, revision=revision).sha
        every = remote_sizes(api, repo, commit)
    folders = tuple(pattern.removesuffix("*") for pattern in PATTERNS[1:])
    files = {n: s for n, s in every.items() if n == paths.MANIFEST or n.startswith(folders)}
    if paths.MANIFEST not in files:
        what = "a cache that is not completely pushed" if files else "no cache"
        raise ValueError(f"{repo} holds {what}: there is no {paths.MANIFEST}")
    return files, str(commit)


def pull(
    repo: str,
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    api: HfApi | None = None,
) -> Pulled:
    """Copy a cache into a new local directory, and verify every byte; DIR appears if it is whole.

    What an interrupted pull has fetched stays beside DIR, and the next goes on from there.
    `progress` is of the verification, in shards. Raises as `plan_pull`; FileExistsError if `target`
    exists; RuntimeError if the hub cannot be reached.
    """
    if "://" in str(target):
        raise ValueError(f"{target} is a URL: pull into a local directory, then copy it there")
    final = Path(target).expanduser().absolute()
    if os.path.lexists(final):
        raise FileExistsError(f"{target} exists already: remove it, or choose another place")
    api = api or HfApi()
    _, commit = plan_pull(repo, revision=revision, api=api)
    partial = final.with_name(f".{final.name}.pull")
    partial.mkdir(parents=True, exist_ok=True)
    with reaching(repo, "the download"):
        api.snapshot_download(
            repo,
            repo_type=KIND,
            revision=commit,
            local_dir=partial,
            allow_patterns=list(PATTERNS),
        )
    report = verify(partial, progress)
    if not report.ok:
        shutil.rmtree(partial)
        return Pulled(revision=commit, report=report)
    shutil.rmtree(partial / CLIENTS_OWN, ignore_errors=True)
    sync_tree(partial)
    move(partial, final)
    return Pulled(revision=commit, report=report)
