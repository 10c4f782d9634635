"""Where a teacher's files are, which of them are its weights, and what those hash to.

A teacher is a directory, a repository of the hub, of which only what is loaded is fetched, or one
GGUF file; a PEFT adapter may lie on top. Reads bytes and names; never loads a model.
"""

import functools
import glob
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import xxhash

from decant.teacher_dump.engines.config import TeacherConfig

WEIGHTS = ("*.safetensors", "*.bin")
LEFT_OUT = ("training_args.bin", "optimizer.bin", "scheduler.bin")
GGUF = ".gguf"
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
UNREADABLE_GGUF = (
    "a GGUF file that transformers cannot read has no way here: take the weights it was made from"
)
SMALL = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""Suffixes of what a repository holds beside its weights."""
TEMPLATES = "additional_chat_templates"
"""The one folder of a repository that a tokenizer reads."""
SINGLE = ("model.safetensors", "pytorch_model.bin")
"""Whole weights, in the order in which transformers looks for them; an index may stand for each."""


def locate(config: TeacherConfig) -> Path:
    """The teacher's directory or GGUF file, fetched from the hub where it is neither.

    Raises ValueError if there is none, or if it is not what `teacher.path` may name.
    """
    path = Path(config.path).expanduser()
    if path.exists() and config.revision:
        raise ValueError(f"teacher.revision has no effect: {path} is here, not on the hub")
    if path.is_file() and path.suffix == GGUF:
        if SPLIT.search(path.name):
            raise ValueError(
                f"teacher.path {config.path} is one part of a GGUF file: join all of them with "
                "llama.cpp's `llama-gguf-split --merge`"
            )
        if config.engine != "transformers":
            raise ValueError(
                f"teacher.path {config.path}: engine {config.engine} cannot run a GGUF file here: "
                "use teacher.engine: transformers"
            )
        return path
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"teacher.path {config.path} is a file, expected a model's directory or a {GGUF} file"
        )
    if not path.exists():
        refuse_missing("teacher.path", os.path.expanduser(config.path))
        path = _fetch(config.path, config.revision, config.trust_remote_code)
    if (path / ADAPTER[0]).exists():
        raise ValueError(
            f"teacher.path {config.path} holds {ADAPTER[0]}, so it is an adapter: set teacher.path "
            "to the model that it was trained on, and teacher.adapter to a folder with the "
            "adapter's files alone"
        )
    if not (path / "config.json").exists() and (files := sorted(path.glob(f"*{GGUF}"))):
        raise ValueError(
            f"teacher.path {config.path} holds GGUF files and no config.json: set teacher.path to "
            f"one of them ({files[0].name})"
        )
    return path


def locate_adapter(adapter: str) -> Path | None:
    """The directory of the adapter, fetched from the hub if need be; None for none.

    Raises ValueError if it holds no adapter.
    """
    if not adapter:
        return None
    path = Path(adapter).expanduser()
    if not path.is_dir():
        refuse_missing("teacher.adapter", os.path.expanduser(adapter))
        path = _snapshot("teacher.adapter", adapter, "", ADAPTER)
    if not (path / ADAPTER[0]).exists() or not any((path / name).exists() for name in ADAPTER[1:]):
        raise ValueError(
            f"teacher.adapter {adapter} holds no PEFT adapter: expected {ADAPTER[0]} and "
            f"{ADAPTER[1]}"
        )
    return path


def refuse_missing(option: str, path: str) -> None:
    """Raise ValueError if this can only be a local path and nothing is there."""
    if (path.startswith((".", "/")) or path.endswith(GGUF)) and not Path(path).exists():
        raise ValueError(f"{option} {path} does not exist (seen from {os.getcwd()})")


def custom_code(config: TeacherConfig) -> str:
    """What to do about a model that brings code."""
    return (
        f"teacher.path {config.path} brings Python code of its own, which is not run: read it, "
        "then set teacher.trust_remote_code: true"
    )


def require_gguf(path: str) -> None:
    """Raise ValueError unless GGUF files can be read here."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"teacher.path {path} needs the package gguf: pip install '.[gguf]'")


def gguf_label(path: Path) -> str:
    """How the weights of a GGUF file are quantised: "gguf-q4_k_m"; they are computed with whole."""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(path).get_field("general.file_type")
    if field is None:
        return "gguf"
    try:
        kind = LlamaFileType(int(field.contents())).name
    except ValueError:
        return "gguf"
    return "gguf-" + kind.removeprefix("ALL_").removeprefix("MOSTLY_").lower()


def fingerprint(path: Path, adapter: Path | None = None, *, with_code: bool = False) -> str:
    """Hash of config.json and every weight file, or of a GGUF file, and of the adapter.

    `with_code` covers the Python files beside them, which are part of the teacher if they run.
    Raises ValueError if there are no weights.
    """
    digests = {}
    if path.suffix == GGUF:
        digests[GGUF] = _hash(path)
    else:
        weights = sorted(
            file for pattern in WEIGHTS for file in path.glob(pattern) if file.name not in LEFT_OUT
        )
        if not weights:
            raise ValueError(f"{path} holds no weights ({', '.join(WEIGHTS)})")
        digests["config.json"] = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
        code = sorted(path.rglob("*.py")) if with_code else []
        for file in (*weights, *code):
            digests[file.relative_to(path).as_posix()] = _hash(file)
    if adapter is not None:
        for name in ADAPTER:
            if (adapter / name).exists():
                digests[f"adapter/{name}"] = _hash(adapter / name)
    text = json.dumps(digests, sort_keys=True).encode()
    return "sha256:" + hashlib.sha256(text).hexdigest()


def weight_files(names: Iterable[str], index_of: Callable[[str], list[str]]) -> list[str]:
    """Which files of a repository transformers loads, of several copies in other formats.

    `index_of` gives the files that an index of that name lists.
    """
    top = sorted(name for name in names if "/" not in name)
    for single in SINGLE:
        if single in top:
            return [single]
        if (index := f"{single}.index.json") in top:
            return index_of(index)
    for pattern in WEIGHTS:
        found = [
            name
            for name in top
            if PurePosixPath(name).match(pattern)
            and name not in (*LEFT_OUT, *ADAPTER)
            and not name.startswith("consolidated")
        ]
        if found:
            return found
    return []


def _fetch(name: str, revision: str, with_code: bool) -> Path:
    """The snapshot of a model of the hub: its small files and one copy of its weights."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        listed = HfApi().model_info(name, revision=revision or None).siblings or []
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _not_there("teacher.path", name, error) from error
    except Exception:  # no connection, however that is said: what was fetched before may do
        listed = None
    if listed is None:
        return _fetched_before(name, revision)
    names = [file.rfilename for file in listed]
    suffixes = (*SMALL, ".py") if with_code else SMALL
    small = [
        file
        for file in names
        if file.endswith(suffixes) and ("/" not in file or file.startswith(f"{TEMPLATES}/"))
    ]
    path = _snapshot("teacher.path", name, revision, small)

    weights = weight_files(names, functools.partial(_listed, path))
    if not weights:
        files = [file for file in names if file.endswith(GGUF)]
        hint = (
            f"it holds GGUF files: download one, such as {files[0]}, and set teacher.path to it"
            if files
            else f"expected one of {', '.join(WEIGHTS)}"
        )
        raise ValueError(f"teacher.path {name} has no weights that transformers reads; {hint}")
    if _snapshot("teacher.path", name, revision, weights) != path:
        raise ValueError(f"teacher.path {name} was changed on the hub meanwhile: run it again")
    return path


def _fetched_before(name: str, revision: str) -> Path:
    """The snapshot of a model that is here already."""
    path = _snapshot("teacher.path", name, revision, ("config.json",), offline=True)
    names = {file.name for file in path.iterdir()}
    for file in weight_files(names, functools.partial(_listed, path)):
        if file not in names:
            raise _not_there("teacher.path", name, f"no connection, and {file} is missing here")
    return path


def _listed(folder: Path, index: str) -> list[str]:
    """The files that an index names."""
    listed = json.loads((folder / index).read_text())["weight_map"].values()
    return sorted({str(file) for file in listed})


def _snapshot(
    option: str, name: str, revision: str, files: Iterable[str], *, offline: bool = False
) -> Path:
    """The local folder of a repository's snapshot with these files."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                local_files_only=offline,
                allow_patterns=[glob.escape(file) for file in files],
            )
        )
    except (OSError, ValueError) as error:  # all of huggingface_hub's are one or the other
        raise _not_there(option, name, error) from error


def _not_there(option: str, name: str, error: object) -> ValueError:
    return ValueError(
        f"{option} {name} is neither here (seen from {os.getcwd()}) nor a repository that the hub "
        f"gives: {error}"
    )


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as source:
        while block := source.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
