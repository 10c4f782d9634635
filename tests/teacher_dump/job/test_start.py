"""Claims about a dump's beginning: what is refused before any work, and what may start over."""

import dataclasses
import json
from pathlib import Path

import pytest

from decant.storage import CacheReader, Store
from decant.teacher_dump import ConfigChanged, DumpConfig, EngineError, dump
from decant.teacher_dump.job.run import Worker
from decant.teacher_dump.job.start import open_or_create
from decant.teacher_dump.teacher import describe_teacher, hash_weights
from tests.support import models
from tests.support.dumps import assert_whole, change, files, save_records


@pytest.fixture
def config(dump_config: DumpConfig, tmp_path: Path) -> DumpConfig:
    """The config of `cache`, into a directory that is not there yet."""
    return dataclasses.replace(dump_config, output=str(tmp_path / "cache"))


def start(config: DumpConfig) -> None:
    """Leave what a dump leaves that ends before its first shard is committed."""
    teacher = hash_weights(describe_teacher(config.teacher))
    open_or_create(config, Store(config.output), teacher, lambda _: None)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("truncation.k", 15),
        ("temperatures", [1.0]),
        ("precision", "compact"),
        ("shard_targets", 250),
        ("sequences.max_length", 40),
        ("source.limit", 30),
        ("teacher.dtype", "bfloat16"),
    ],
)
def test_a_start_that_scored_nothing_does_not_block_another_config(
    config: DumpConfig, cache: Path, path: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache is the one of the config that is right, as if nothing had been there."""
    start(change(config, path, value))
    output = Path(config.output)
    (output / "shards").mkdir(exist_ok=True)
    (output / "shards" / ".part-000000.parquet.abc.partial").write_bytes(b"cut short")
    (output / "stats").mkdir()
    (output / "stats" / "inspect.json").write_text("{}")
    dump(config)
    assert_whole(config.output, cache)
    assert "of which no shard is committed; starting over" in caplog.text
    assert path.split(".")[-1] in caplog.text or path == "source.limit"


def test_one_of_several_workers_does_not_start_over(config: DumpConfig) -> None:
    """Others may be at work on the config that is there."""
    start(change(config, "truncation.k", 15))
    before = files(Path(config.output))
    with pytest.raises(ConfigChanged, match=r"truncation\.k: the cache has 15"):
        dump(config, Worker(0, 2))
    assert files(Path(config.output)) == before


def test_one_committed_shard_is_not_thrown_away(config: DumpConfig, cache: Path) -> None:
    """Not even for the right config: it was scored."""
    dump(change(config, "shard_targets", 10**6))
    before = files(Path(config.output))
    with pytest.raises(ConfigChanged, match="shard_targets"):
        dump(config)
    assert files(Path(config.output)) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "toaster"}, "teacher.device toaster is not a device"),
        ({"device": "cuda:99"}, r"teacher.device cuda:99: there (is no cuda here|are \d)"),
        ({"device": "xpu"}, "teacher.device xpu: there is no xpu here"),
        ({"attention": "none"}, "teacher.attention none: "),
        ({"attention": "flash_attention_2"}, "teacher.attention flash_attention_2: "),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_the_source_is_read(
    config: DumpConfig, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    """A source of which the first record is broken would be an error of its own."""
    source = tmp_path / "broken.jsonl"
    source.write_text("{")
    teacher = dataclasses.replace(config.teacher, **options)
    config = dataclasses.replace(change(config, "source.path", str(source)), teacher=teacher)
    with pytest.raises(EngineError, match=message):
        dump(config)
    assert not Path(config.output).exists()


def test_saved_quantisation_is_checked_before_the_source_is_read(
    config: DumpConfig, tmp_path: Path
) -> None:
    """A model quantised by a package that is not installed here."""
    models.save_teacher(tmp_path / "teacher")
    file = tmp_path / "teacher" / "config.json"
    quantised = {"quant_method": "aqlm", "in_group_size": 8}
    settings = json.loads(file.read_text()) | {"quantization_config": quantised}
    file.write_text(json.dumps(settings))
    source = tmp_path / "broken.jsonl"
    source.write_text("{")
    config = change(change(config, "teacher.path", str(tmp_path / "teacher")), "source.path", "x")
    config = change(config, "source.path", str(source))
    with pytest.raises(EngineError, match=r"is quantised, which cannot work: .*aqlm"):
        dump(config)


def test_float16_on_a_cpu_is_warned_of(
    config: DumpConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it is asked for or how the weights are saved; nothing is said of float32."""
    models.build_model().half().save_pretrained(tmp_path / "teacher")
    models.build_tokenizer().save_pretrained(tmp_path / "teacher")
    source = save_records(tmp_path / "source.jsonl", {"text": "the quick fox"})
    config = change(change(config, "source.path", str(source)), "teacher.device", "cpu")
    dump(change(config, "output", str(tmp_path / "a")))
    assert "float16 on a CPU" not in caplog.text
    for name, changed in (
        ("b", change(config, "teacher.dtype", "float16")),
        (
            "c",
            change(
                change(config, "teacher.path", str(tmp_path / "teacher")), "teacher.dtype", "auto"
            ),
        ),
    ):
        caplog.clear()
        dump(change(changed, "output", str(tmp_path / name)))
        assert "float16 on a CPU, which takes 3 to 4 times as long" in caplog.text
        assert len(CacheReader(tmp_path / name)) == 1
