"""Every configuration is taken by all commands that it is for; the examples are among them."""

import dataclasses
import json
from pathlib import Path

import pytest

from decant.copy_examples import SHIPPED, copy_examples
from decant.schemas import PRECISIONS
from decant.schemas.truncation import METHODS
from decant.storage.cli.config import parse_config
from decant.storage.cli.options import options
from decant.storage.exchange.config import UNKNOWN_LABEL, ImportConfig
from decant.teacher_dump import DumpConfig
from decant.teacher_dump.config import ServeConfig
from decant.teacher_dump.engines.config import DTYPES, ENGINES, QUANTIZATIONS
from decant.teacher_dump.inputs.config import FORMATS
from decant.teacher_dump.job.command import DUMP
from decant.teacher_dump.job.config import RayConfig, ShareConfig
from decant.teacher_dump.planning.command import PLAN, PlanArguments
from tests.support import ROOT
from tests.support.commands import command
from tests.support.dumps import save_config

DUMPS = sorted((ROOT / "examples/dump").glob("*.yaml"))


@pytest.mark.parametrize("path", DUMPS, ids=lambda path: path.stem)
def test_the_examples_of_dumps_are_taken(path: Path) -> None:
    """By `dump` and by `plan`, or by `serve`."""
    if path.stem == "service":
        (config,) = parse_config([ServeConfig], ["--config", str(path)])
        assert config.teacher.engine == "vllm"
        return
    found = [parse_config([c.config, c.arguments], ["--config", str(path)]) for c in (DUMP, PLAN)]
    assert found[0][0] == found[1][0]
    assert isinstance(found[0][0], DumpConfig)


def test_plan_takes_what_run_takes(tmp_path: Path) -> None:
    """Every key of the sharing of shards, in the file and on the command line."""
    assert set(options(ShareConfig)) <= set(options(PlanArguments))
    config = {
        "output": "o",
        "teacher": {"path": "t"},
        "source": {"path": "s"},
        "executor": "ray",
        "ray": {"num_gpus": 2, "address": "auto"},
        "retry_rejected": True,
    }
    (tmp_path / "dump.yaml").write_text(json.dumps(config))
    words = ["--config", str(tmp_path / "dump.yaml"), "--ray.num_cpus", "3"]
    for kind in (ShareConfig, PlanArguments):
        _, share = parse_config([DumpConfig, kind], words)
        assert share.executor == "ray" and share.retry_rejected
        assert share.ray == RayConfig(num_gpus=2, num_cpus=3, address="auto")
        with pytest.raises(ValueError, match=r"ray\.\* have no effect with executor local"):
            parse_config([DumpConfig, kind], [*words, "--executor", "local"])


def test_plan_predicts_from_the_config_of_a_cluster(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    """One that `dump` gives to Ray: the sample is scored here."""
    path = save_config(dataclasses.replace(dump_config, output=str(tmp_path / "c")), tmp_path)
    content = {**json.loads(Path(path).read_text()), "executor": "ray", "ray": {"num_cpus": 2}}
    Path(path).write_text(json.dumps(content))
    done = command("teacher_dump", "plan", "--config", path, "--sample", "4", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] > 0


def test_the_texts_of_options_name_the_allowed_values() -> None:
    """Each value that the code takes stands in the text that help shows."""
    dumped, imported = options(DumpConfig), options(ImportConfig)
    for option, values in (
        (dumped["teacher.engine"], ENGINES),
        (dumped["teacher.dtype"], DTYPES),
        (dumped["teacher.quantization"], QUANTIZATIONS),
        (dumped["source.format"], FORMATS),
        (dumped["truncation.method"], METHODS),
        (dumped["precision"], PRECISIONS),
        (imported["unknown_label"], UNKNOWN_LABEL),
        (imported["precision"], PRECISIONS),
    ):
        assert all(value in option.text for value in values), option.key


def test_examples_are_copied_once(tmp_path: Path) -> None:
    """All of the folders that are shipped; what is there stays as it is."""
    written, kept = copy_examples(tmp_path / "a")
    assert kept == [] and {path.relative_to(tmp_path / "a").parts[0] for path in written} == {
        *SHIPPED
    }
    (tmp_path / "a/dump/text.yaml").write_text("mine")
    again, kept = copy_examples(tmp_path / "a")
    assert again == [] and set(kept) == set(written)
    assert (tmp_path / "a/dump/text.yaml").read_text() == "mine"
