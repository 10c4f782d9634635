"""A dataset repository of the hub as a place for one cache: names, listings, errors.

Knows nothing of what a cache holds but which of its files travel.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from decant.schemas import FormatError
from decant.storage.cache import paths
from decant.storage.files.links import leads_out

KIND = "dataset"
FOLDERS = (
    paths.SHARDS,
    paths.PLAN,
    paths.RECORDS,
    paths.TOKENIZER,
    paths.GENERATED,
    paths.KEPT_REPORT.split("/")[0],
)
"""The folders of a cache that travel, beside its manifest. Nothing else in its directory does."""
PATTERNS = (paths.MANIFEST, *(f"{folder}/*" for folder in FOLDERS))
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
OWN = (".gitattributes",)
"""Files that the hub itself puts into a new repository."""


def quiet_off_terminals() -> None:
    """Let the hub's client draw its bars on terminals alone."""
    if not sys.stderr.isatty():
        disable_progress_bars()


def check_name(repo: str) -> None:
    """Raise ValueError unless it is OWNER/NAME."""
    if not NAME.fullmatch(repo):
        raise ValueError(f"{repo!r} is not the name of a repository: expected OWNER/NAME")


def check_token(api: HfApi) -> None:
    """Raise ValueError unless there is a token to write with."""
    if not (api.token or get_token()):
        raise ValueError("pushing needs a token: run `hf auth login`, or set HF_TOKEN")


@contextlib.contextmanager
def reaching(repo: str, what: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line that names the repository."""
    try:
        yield
    except (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{repo}: no such dataset repository or revision, or no access to it; `hf auth whoami` "
            f"says who asks ({reason[0] if reason else type(error).__name__})"
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises
        of_client = isinstance(error, HfHubHTTPError | RuntimeError)
        if not of_client and not type(error).__module__.startswith("httpx"):
            raise
        reasons = [" ".join(str(e).split()) for e in (error, error.__cause__) if e and str(e)]
        raise RuntimeError(
            f"{repo}: {what} was not finished: {'; '.join(reasons) or type(error).__name__}; the "
            "same command goes on from there"
        ) from error


def remote_sizes(api: HfApi, repo: str, revision: str | None = None) -> dict[str, int]:
    """Name and bytes of every file in a repository."""
    entries = api.list_repo_tree(repo, recursive=True, repo_type=KIND, revision=revision)
    return {entry.path: int(entry.size) for entry in entries if isinstance(entry, RepoFile)}


def remote_bytes(api: HfApi, repo: str, name: str, folder: Path) -> bytes:
    """A small file of a repository, fetched anew into a folder."""
    path = api.hf_hub_download(repo, name, repo_type=KIND, local_dir=folder, force_download=True)
    return Path(path).read_bytes()


def local_files(folder: Path) -> dict[str, int]:
    """Name and bytes of the files of a cache that travel, in order; nothing that is hidden.

    Raises FormatError on a link that leads out of the cache: what it leads to is not the cache's.
    """
    every = [folder / paths.MANIFEST]
    for name in FOLDERS:
        every += sorted((folder / name).rglob("*"))
    for file in every:
        if place := leads_out(str(file), str(folder)):
            raise FormatError(f"{file} is a link to {place}, outside of {folder}")
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in every
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }


def cache_id_of(manifest: bytes) -> str:
    """The id that a manifest states; "" if it is none."""
    try:
        value: Any = json.loads(manifest)
    except ValueError:
        return ""
    return str(value.get("cache_id", "")) if isinstance(value, dict) else ""
