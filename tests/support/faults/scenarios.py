"""Commands that write, each with what it starts from and what it must end with.

Another command joins by a `Scenario` in SCENARIOS: its arguments, what lies in its folder before,
and what of the folder must be the same after a fault and a rerun as without a fault.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from decant.schemas import Truncation
from decant.storage import CacheReader, verify
from decant.storage.edit.derived import make
from decant.storage.edit.subset import Choice, subset
from decant.storage.exchange.export import export
from decant.teacher_dump import DumpConfig, SequenceConfig, SourceConfig, TeacherConfig, dump
from decant.teacher_dump.inputs.config import GenerateConfig
from tests.support import FIXTURES, models
from tests.support.dumps import rows, save_config, save_records
from tests.support.faults import Result
from tests.support.rounds import rounds_config, save_prompts
from tests.support.trainings import STUDENT


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """What all scenarios start from; only read."""

    folder: Path

    @property
    def teacher(self) -> Path:
        """A tiny random model."""
        return self.folder / "teacher"

    @property
    def cache(self) -> Path:
        """A cache of several shards by it."""
        return self.folder / "cache"

    @property
    def config(self) -> Path:
        """What it was dumped with."""
        return self.folder / "dump" / "dump.yaml"


def save_given(folder: Path) -> Given:
    """Make what the scenarios start from."""
    given = Given(folder)
    models.save_teacher(given.teacher)
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(models.WORDS, 8)) for _ in range(12)]
    save_records(folder / "texts.jsonl", *({"id": f"t{i}", "text": t} for i, t in enumerate(texts)))
    save_records(
        folder / "more.jsonl", *({"id": f"m{i}", "text": t[::-1]} for i, t in enumerate(texts))
    )
    save_records(
        folder / "prompts.jsonl",
        *({"id": f"p{i}", "prompt": t[:20]} for i, t in enumerate(texts[:6])),
    )
    save_records(
        folder / "chats.jsonl",
        *(
            {
                "id": f"c{i}",
                "messages": [
                    {"role": "user", "content": t},
                    {"role": "assistant", "content": "the fox"},
                ],
            }
            for i, t in enumerate(texts)
        ),
    )
    config = DumpConfig(
        output=str(given.cache),
        teacher=TeacherConfig(path=str(given.teacher), dtype="float32", max_batch_tokens=512),
        source=SourceConfig(path=str(folder / "texts.jsonl")),
        sequences=SequenceConfig(max_length=64),
        truncation=Truncation(k=8),
        temperatures=[1.0],
        shard_targets=60,
    )
    _save(config, folder / "dump")
    dump(config)
    generate = GenerateConfig(n=2, temperature=0.9, max_new_tokens=6, part_prompts=2)
    prompts = SourceConfig(path=str(folder / "prompts.jsonl"), generate=generate)
    _save(dataclasses.replace(config, source=prompts), folder / "generate")
    more = SourceConfig(path=str(folder / "more.jsonl"))
    _save(dataclasses.replace(config, source=more), folder / "more")
    chats = SourceConfig(path=str(folder / "chats.jsonl"))
    _save(dataclasses.replace(config, source=chats), folder / "chats")
    with _failing_now_and_then():
        dump(dataclasses.replace(config, output=str(folder / "rejected"), max_rejected=1.0))
    cache, two = CacheReader(given.cache), ("t0", "t1")
    make(folder / "part", subset(cache, Choice(ids=two, invert=True))[0])
    make(folder / "others", subset(cache, Choice(ids=two))[0])
    export(given.cache, folder / "foreign", to="distillkit", file_format="parquet")
    base = {
        "cache": str(given.cache),
        "student": {"config": STUDENT},
        "loss": {"kind": "fkl", "kd_weight": 1.0, "ce_weight": 0.3},
        "steps": 3,
        "batch_size": 2,
        "optimizer": {"lr": 0.01, "warmup_steps": 1},
        "log_every_steps": 1,
    }
    (folder / "train.yaml").write_text(json.dumps({**base, "plots": False}))
    everything = {
        **base,
        "save_every_steps": 1,
        "keep_checkpoints": 1,
        "eval": {"cache": str(folder / "others"), "every_steps": 1, "keep_best": "heldout_ce"},
        "student": {"config": STUDENT, "qat": {"scheme": "int4"}},
    }
    models.save_teacher(folder / "student", seed=5, num_hidden_layers=1)
    save_prompts(folder / "asked.jsonl")
    rounds = rounds_config(
        folder / "unset", given.teacher, folder / "student", folder / "asked.jsonl"
    )
    (folder / "rounds.yaml").write_text(json.dumps(dataclasses.asdict(rounds)))
    (folder / "train-more.yaml").write_text(json.dumps(everything))
    return given


def _save(config: DumpConfig, folder: Path) -> None:
    folder.mkdir()
    save_config(config, folder)


@contextmanager
def _failing_now_and_then() -> Iterator[None]:
    """Every Llama of this process fails on sequences that begin as two of the texts do."""

    def fail(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and (arguments[0].sum(dim=1) % 5 == 0).any():
            raise RuntimeError("the kernel failed")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A command in a folder of its own."""

    name: str
    arguments: Callable[[Given, Path], list[str | Path]]
    """Of the command, in a folder."""
    found: Callable[[Path], Any]
    """What must be the same, of the folder; compared with ==."""
    before: Callable[[Given, Path], None] = lambda given, folder: None
    """Fills the folder."""
    made: str = ""
    """What a rerun may find there and refuse, once the command has done all: a command that makes
    something new, and was ended after it had its name."""
    share: float = 1.0
    """Of the trials of other scenarios, for one that takes long."""
    staging: str = ""
    """Where it leaves what the same command goes on from."""


def cache_in(name: str) -> Callable[[Path], Any]:
    """The rows of a whole cache, and that it is one."""

    def found(folder: Path) -> Any:
        report = verify(folder / name)
        return report.problems, rows(folder / name), CacheReader(folder / name).manifest.cache_id

    return found


def _tables(folder: Path) -> Any:
    return [pq.read_table(path).to_pydict() for path in sorted((folder / "out").rglob("*.parquet"))]


def _saved_dataset(folder: Path) -> Any:
    return datasets.load_from_disk(str(folder / "out")).to_dict()


def _bytes(folder: Path) -> Any:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _report(folder: Path) -> Any:
    kept = json.loads((folder / "cache" / "stats" / "inspect.json").read_text())
    return cache_in("cache")(folder), {**kept["report"], "url": ""}


def _training(folder: Path) -> Any:
    lines = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    timed = (
        "resumed_at",
        "targets_per_s",
        "tokens_per_s",
        "data_wait_share",
        "peak_memory_mb",
        "wall_s",
    )
    known = [
        {k: v for k, v in line.items() if k not in timed and not isinstance(v, dict)}
        for line in lines
    ]
    weights = [
        {name: value.tolist() for name, value in load_file(path).items()}
        for path in sorted((folder / "run").rglob("student*/*.safetensors"))
    ]
    return known, weights, (folder / "run" / "summary.json").exists()


def _rounds(folder: Path) -> Any:
    lines = [
        json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()
    ]
    students = sorted((folder / "run").rglob("student/model.safetensors"))
    weights = [{name: value.tolist() for name, value in load_file(p).items()} for p in students]
    return [line["round"] for line in lines], weights


def _a_cache(of: str) -> Callable[[Given, Path], None]:
    def copy(given: Given, folder: Path) -> None:
        shutil.copytree(given.folder / of, folder / "cache")

    return copy


def _dump(config: str, *more: str) -> Callable[[Given, Path], list[str | Path]]:
    def arguments(given: Given, folder: Path) -> list[str | Path]:
        file = given.folder / config / "dump.yaml"
        return ["dump", "--config", file, "--output", folder / "cache", *more]

    return arguments


def _train(config: str) -> Callable[[Given, Path], list[str | Path]]:
    return lambda given, folder: [
        "train",
        "--config",
        given.folder / config,
        "--output",
        folder / "run",
    ]


OLD = FIXTURES / "version-3" / "cache"
SCENARIOS = (
    Scenario(name="dump", arguments=_dump("dump"), found=cache_in("cache")),
    Scenario(name="generate", arguments=_dump("generate"), found=cache_in("cache")),
    Scenario(
        name="retry-rejected",
        before=_a_cache("rejected"),
        arguments=_dump("dump", "--max_rejected", "1.0", "--retry-rejected"),
        found=cache_in("cache"),
    ),
    Scenario(
        name="extend",
        before=_a_cache("cache"),
        arguments=_dump("more", "--extend"),
        found=cache_in("cache"),
    ),
    Scenario(
        name="migrate",
        arguments=lambda given, folder: ["migrate", OLD, folder / "out"],
        found=cache_in("out"),
        made="is not empty",
    ),
    Scenario(
        name="migrate-rewrite",
        arguments=lambda given, folder: ["migrate", OLD, folder / "out", "--rewrite"],
        found=cache_in("out"),
        staging=".out.edit.tmp",
        made="exists already",
    ),
    Scenario(
        name="export",
        arguments=lambda given, folder: ["export", given.cache, folder / "out"],
        found=_tables,
        made="exists already",
    ),
    Scenario(
        name="export-hf",
        arguments=lambda given, folder: ["export", given.cache, folder / "out", "--to", "hf"],
        found=_saved_dataset,
        made="exists already",
    ),
    Scenario(
        name="import",
        arguments=lambda given, folder: [
            *("import", given.folder / "foreign", folder / "out", "--format", "distillkit"),
            *("--teacher", "tiny", "--tokenizer", given.teacher, "--unknown-label", "skip"),
        ],
        found=cache_in("out"),
        made="exists already",
    ),
    Scenario(
        name="inspect",
        before=_a_cache("cache"),
        arguments=lambda given, folder: ["inspect", folder / "cache", "--json"],
        found=cache_in("cache"),
    ),
    Scenario(
        name="inspect-html",
        arguments=lambda given, folder: [
            *("inspect", given.cache, "--sample", "1"),
            *("--html", folder / "page.html"),
        ],
        found=_bytes,
    ),
    Scenario(
        name="subset",
        arguments=lambda given, folder: [
            *("subset", given.cache, folder / "out", "--share", "0.5", "--seed", "1"),
        ],
        found=cache_in("out"),
        staging=".out.edit.tmp",
        made="exists already",
    ),
    Scenario(
        name="merge",
        arguments=lambda given, folder: [
            *("merge", given.folder / "part", given.folder / "others", folder / "out"),
        ],
        found=cache_in("out"),
        staging=".out.edit.tmp",
        made="exists already",
    ),
    Scenario(
        name="dedupe",
        arguments=lambda given, folder: ["dedupe", given.cache, folder / "out"],
        found=cache_in("out"),
        staging=".out.edit.tmp",
        made="exists already",
    ),
    Scenario(
        name="rescore",
        arguments=lambda given, folder: ["rescore", given.cache, folder / "out", "--k", "4"],
        found=cache_in("out"),
    ),
    Scenario(
        name="add-temperature",
        arguments=lambda given, folder: [
            *("add-temperature", given.cache, folder / "out", "--temperature", "2"),
        ],
        found=cache_in("out"),
    ),
    Scenario(
        name="messages",
        arguments=lambda given, folder: [
            *("messages", "--config", given.folder / "chats" / "dump.yaml"),
            *("--out", folder / "messages.jsonl"),
        ],
        found=_bytes,
        made="exists already",
    ),
    Scenario(name="train", arguments=_train("train.yaml"), found=_training),
    Scenario(name="train-more", arguments=_train("train-more.yaml"), found=_training),
    Scenario(
        name="rounds",
        arguments=lambda given, folder: [
            *("rounds", "--config", given.folder / "rounds.yaml", "--output", folder / "run"),
        ],
        found=_rounds,
        share=0.25,
    ),
    Scenario(
        name="examples",
        arguments=lambda given, folder: ["examples", folder / "examples"],
        found=_bytes,
    ),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def names_in(folder: Path) -> set[str]:
    """All files and folders, without what a rewrite may number otherwise."""
    return {os.path.relpath(path, folder) for path in folder.rglob("*")}


def complaints(result: Result) -> list[str]:
    """What is wrong with how a command that failed said so."""
    if result.code == 0:
        return [] if "Traceback" not in result.stderr else ["a traceback"]
    wrong = [] if result.code in (1, 2) else [f"exit code {result.code}"]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if len(lines) != 1:
        return [*wrong, f"{len(lines)} lines with error"]
    if "Traceback" in result.stderr or "Exception ignored" in result.stderr:
        wrong.append("a traceback")
    line = lines[0]
    if "/" not in line:
        wrong.append("names no file")
    if not any(word in line for word in WAYS_OUT):
        wrong.append("no way out")
    return wrong


WAYS_OUT = ("again", "choose", "stay", "remove", "copy")
