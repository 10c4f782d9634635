"""Claims about where a teacher's files are looked for, which are fetched, and what they hash to."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from decant.storage import CacheReader
from decant.teacher_dump import DumpConfig
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.weights import fingerprint, locate, weight_files
from tests.support import models
from tests.support.commands import Command, Result
from tests.support.dumps import save_config
from tests.support.hub import hub

INDEX = {
    "model.safetensors.index.json": ["model-1.safetensors", "model-2.safetensors"],
    "pytorch_model.bin.index.json": ["pytorch_model-1.bin", "pytorch_model-2.bin"],
}


SAFE, BIN = INDEX
CHOICES = {
    "model.safetensors pytorch_model.bin model.fp16.safetensors": ["model.safetensors"],
    "pytorch_model.bin onnx/model.onnx a.gguf training_args.bin": ["pytorch_model.bin"],
    f"consolidated.safetensors model-1.safetensors {SAFE}": INDEX[SAFE],
    "consolidated.00.pth original/consolidated.safetensors model.safetensors": [
        "model.safetensors"
    ],
    f"{BIN} pytorch_model-1.bin": INDEX[BIN],
    f"model-1.safetensors pytorch_model.bin {BIN}": ["pytorch_model.bin"],
    "gptq_model-4bit.safetensors consolidated.safetensors": ["gptq_model-4bit.safetensors"],
    "model.q4.gguf optimizer.bin adapter_model.safetensors": [],
}


@pytest.mark.parametrize("names", CHOICES)
def test_one_copy_of_the_weights_is_chosen(names: str) -> None:
    """The one that transformers loads, whatever other formats lie beside it."""
    assert weight_files(names.split(), INDEX.__getitem__) == CHOICES[names]


def online(url: str, home: Path) -> None:
    """Ask this hub; for a forked process, in which the library is imported already."""
    from huggingface_hub import constants

    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_CACHE = str(home)
    os.environ["HF_ENDPOINT"] = url


def dumped_from(url: str, home: Path, config: DumpConfig, folder: Path) -> Result:
    """A dump in a process of its own, which fetches from the hub at `url`."""
    arguments = ("run", "--config", save_config(config, folder))
    first = functools.partial(online, url, home)
    return Command("teacher_dump", *arguments, first=first).result()


def test_a_repository_of_bin_files_is_a_teacher(
    dump_config: DumpConfig, teacher_path: Path, tmp_path: Path
) -> None:
    """It is fetched and scores as the same weights elsewhere do; duplicates stay where they are."""
    repository = tmp_path / "hub" / "someone" / "old"
    shutil.copytree(teacher_path, repository)
    model = models.build_model()
    torch.save(model.state_dict(), repository / "pytorch_model.bin")
    (repository / "model.safetensors").unlink()
    duplicates = ["consolidated.00.pth", "original/params.json", "onnx/model.onnx", "m.Q4_0.gguf"]
    for name in (*duplicates, "training_args.bin", "README.md"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"{}")
    teacher = dataclasses.replace(dump_config.teacher, path="someone/old")
    config = dataclasses.replace(dump_config, teacher=teacher, output=str(tmp_path / "cache"))
    with hub(tmp_path / "hub") as (url, fetched):
        done = dumped_from(url, tmp_path / "home", config, tmp_path)
        assert done.code == 0, done.stderr
        assert "pytorch_model.bin" in fetched and "config.json" in fetched
        assert not set(fetched) & {*duplicates, "training_args.bin", "README.md"}
        absent = dataclasses.replace(
            config, teacher=dataclasses.replace(teacher, path="someone/else")
        )
        refused = dumped_from(url, tmp_path / "home", absent, tmp_path)
        assert refused.code == 2 and "teacher.path someone/else is neither here" in refused.stderr
    again = dataclasses.replace(config, output=str(tmp_path / "again"))
    done = dumped_from(url, tmp_path / "home", again, tmp_path)  # the hub is gone
    assert done.code == 0, done.stderr
    caches = [CacheReader(tmp_path / name).manifest for name in ("cache", "again")]
    assert caches[0].teacher == caches[1].teacher


def test_sharded_weights_are_fetched_by_their_index(
    dump_config: DumpConfig, teacher_path: Path, tmp_path: Path
) -> None:
    """Of a repository that holds them whole in another layout too, in `consolidated`."""
    repository = tmp_path / "hub" / "someone" / "new"
    models.build_model().save_pretrained(repository, max_shard_size="60KB")
    models.build_tokenizer().save_pretrained(repository)
    shards = {file.name for file in repository.glob("model-*.safetensors")}
    assert len(shards) > 1
    shutil.copy(teacher_path / "model.safetensors", repository / "consolidated.safetensors")
    teacher = dataclasses.replace(dump_config.teacher, path="someone/new")
    config = dataclasses.replace(dump_config, teacher=teacher, output=str(tmp_path / "cache"))
    with hub(tmp_path / "hub") as (url, fetched):
        done = dumped_from(url, tmp_path / "home", config, tmp_path)
    assert done.code == 0, done.stderr
    assert shards < set(fetched) and "consolidated.safetensors" not in fetched


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "config.json"], "so it is an adapter: set teacher.path"),
        (["b.gguf", "a.gguf"], r"holds GGUF files and no config.json: .*\(a.gguf\)"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    """With what to name in its place."""
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        locate(TeacherConfig(path=str(tmp_path)))


def test_paths_that_cannot_be_a_teacher_are_refused(tmp_path: Path) -> None:
    """A file of another kind, a GGUF file for vLLM, and what is not there."""
    (tmp_path / "weights.pt").write_bytes(b"")
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file, expected a model's directory or a \.gguf"):
        locate(TeacherConfig(path=str(tmp_path / "weights.pt")))
    with pytest.raises(ValueError, match="engine vllm cannot run a GGUF file"):
        locate(TeacherConfig(path=str(tmp_path / "weights.gguf"), engine="vllm"))
    part = tmp_path / "weights-00001-of-00002.gguf"
    part.write_bytes(b"")
    with pytest.raises(ValueError, match="is one part of a GGUF file: join"):
        locate(TeacherConfig(path=str(part)))
    with pytest.raises(ValueError, match="does not exist"):
        locate(TeacherConfig(path="absent.gguf"))
    with pytest.raises(ValueError, match="revision has no effect"):
        locate(TeacherConfig(path=str(tmp_path), revision="main"))


def test_a_fingerprint_covers_what_the_teacher_is_made_of(tmp_path: Path) -> None:
    """Weights, config, adapter, and code if it runs; not names of folders, nor other files."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "a" / "model.py").write_text("x = 1")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    plain = fingerprint(tmp_path / "a")
    (tmp_path / "b" / "notes.txt").write_text("other")
    assert fingerprint(tmp_path / "b") == plain
    coded = fingerprint(tmp_path / "b", with_code=True)
    assert coded != plain
    (tmp_path / "b" / "model.py").write_text("x = 2")
    assert fingerprint(tmp_path / "b") == plain
    assert fingerprint(tmp_path / "b", with_code=True) != coded
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 4}))
    (adapter / "adapter_model.safetensors").write_bytes(b"delta")
    adapted = fingerprint(tmp_path / "a", adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 8}))
    assert len({plain, adapted, fingerprint(tmp_path / "a", adapter)}) == 3
