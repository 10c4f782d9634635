"""What the configuration of rounds refuses, before anything runs."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from decant.schemas import Truncation
from decant.storage.cli.config import parse_config
from decant.student_train.rounds.blocks import Replay, dump_block, replay, train_block
from decant.student_train.rounds.config import RoundsConfig
from decant.student_train.rounds.processes import training_words
from decant.student_train.rounds.run import check
from tests.support import ROOT, caches
from tests.support.rounds import rounds_config
from tests.support.trainings import STUDENT


@pytest.fixture
def config(tmp_path: Path) -> RoundsConfig:
    """Rounds whose files need not exist."""
    places = [tmp_path / name for name in ("out", "teacher", "student", "prompts.jsonl")]
    places[2].mkdir()
    return rounds_config(*places)


def changed(config: RoundsConfig, block: str, path: str, value: Any) -> dict[str, Any]:
    """The arguments of a config with a (dotted) key of a block set."""
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    *groups, last = path.split(".")
    place = fields[block]
    for name in groups:
        place = place.setdefault(name, {})
    place[last] = value
    return fields


@pytest.mark.parametrize(
    ("block", "path", "value", "message"),
    [
        ("dump", "output", "c", "dump.output must be left out"),
        ("dump", "num_workers", 2, "dump.num_workers must be left out"),
        ("dump", "extend", True, "dump.extend must be left out"),
        ("dump", "source.generate.by", "x", "dump.source.generate.by must be left out"),
        ("dump", "source.generate.n", 0, "dump.source.generate.n is missing"),
        ("dump", "source.generate.n", "two", "'two': expected a whole number"),
        ("dump", "source", "path", "dump.source is 'path': expected a group of keys"),
        ("train", "output", "o", "train.output must be left out"),
        ("train", "cache", "c", "train.cache must be left out"),
        ("train", "epochs", 1, "train.epochs must be left out"),
        ("train", "steps", 0, "train.steps is missing"),
        ("train", "student.path", "", "first_sampler: teacher"),
        ("train", "adapter.merge", False, "saves no whole student"),
    ],
)
def test_keys_that_rounds_cannot_have_are_named(
    config: RoundsConfig, block: str, path: str, value: Any, message: str
) -> None:
    """With the block they stand in, and the way out."""
    with pytest.raises(ValueError, match=message):
        RoundsConfig(**changed(config, block, path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("steeps", 5, "train: .*steeps.*steps"),
        ("loss.kind", "fkkl", "train: .*fkkl"),
        ("loss.temperature", 2.0, "train.loss.temperature 2 is not among dump.temperatures"),
        ("optimizer.lr", "fast", "train.optimizer.lr is 'fast'"),
        ("loss", {"kind": "opd", "clip": -0.1}, r"train: .*clip must be in \[0, 1\)"),
        ("loss.preset", "jss", "train: .*loss.preset 'jss' is not one of"),
        ("loss.kd_weight", 0.0, "train: .*not both 0"),
        ("mixture", [{"cache": "no/such", "weight": 1.0}], "no/such is no cache"),
        ("mixture", [{"cache": "c", "weight": 0.0}], "train: .*weight of c must be > 0"),
        ("mixture", [{"cache": "c", "weight": -1}], "train: .*weight of c must be > 0"),
        ("eval.cache", "no/such", "train.eval.cache: no/such is no cache"),
        ("student.path", "/no/such/student", "/no/such/student is not there"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_the_dump(
    config: RoundsConfig, path: str, value: Any, message: str
) -> None:
    """Its block is read as the command reads it, before anything is sampled."""
    with pytest.raises(ValueError, match=message):
        check(RoundsConfig(**changed(config, "train", path, value)))


def test_what_a_round_s_cache_will_lack_is_told_before_it_is_made(config: RoundsConfig) -> None:
    """A kind that labels or draws cannot serve; a ratio to a sampler that is the teacher."""
    for truncation, kind, message in (
        ({"method": "label"}, "hinge", r"hinge compares several .*round's cache .*topk"),
        ({"method": "sample", "draws": 5}, "rkl", r"a round's cache .*5 draws.* not rkl"),
    ):
        dump = {**config.dump, "truncation": truncation}
        train = {**config.train, "loss": {"kind": kind}}
        with pytest.raises(ValueError, match=message):
            check(dataclasses.replace(config, dump=dump, train=train))
    train = {**config.train, "loss": {"kind": "opd", "clip": 0.2}}
    assert check(dataclasses.replace(config, train=train)).loss.clip == 0.2
    with pytest.raises(ValueError, match=r"train.loss.clip needs .*first_sampler: teacher"):
        check(dataclasses.replace(config, train=train, first_sampler="teacher"))


def test_a_cache_of_the_mixture_that_lacks_what_its_loss_needs_is_named(
    config: RoundsConfig, tmp_path: Path
) -> None:
    """Its temperature, or entries: read off its manifest before anything is sampled."""
    warm, labels = str(tmp_path / "warm"), str(tmp_path / "labels")
    for path, truncation in ((warm, Truncation(k=8)), (labels, Truncation(method="label", k=64))):
        settings = caches.Settings(truncation=truncation, temperatures=(1.0,))
        caches.write_cache(path, settings, caches.random_shards(settings, num_shards=1))
    for cache, loss, message in (
        (warm, {"temperature": 2.0}, r"temperature 2 is not stored in .*warm, which has 1\."),
        (labels, {"kind": "logistic"}, r"logistic compares several .*labels holds"),
        (warm, {"kind": "opd", "clip": 0.2}, r"opd with clip needs .*warm keeps none"),
    ):
        share = {"cache": cache, "weight": 1.0, "loss": loss}
        with pytest.raises(ValueError, match=message):
            check(RoundsConfig(**changed(config, "train", "mixture", [share])))


def test_a_launcher_is_found_before_anything_runs(
    config: RoundsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside this Python, whatever the path; one that is nowhere, or no words, is refused."""
    monkeypatch.setenv("PATH", "")
    words = training_words("accelerate launch --num_processes 2", Path("train.yaml"))
    assert words[0] == str(Path(sys.executable).with_name("accelerate"))
    assert words[1:] == [
        *("launch", "--num_processes", "2"),
        *("-m", "decant.student_train", "--config", "train.yaml"),
    ]
    with pytest.raises(ValueError, match="launcher: no-such is neither beside this Python"):
        check(dataclasses.replace(config, launcher="no-such --option"))
    with pytest.raises(ValueError, match=r"launcher .* is no command: No closing quotation"):
        check(dataclasses.replace(config, launcher="torchrun 'x"))


def test_numbers_out_of_range_are_refused(config: RoundsConfig) -> None:
    """Rounds, decays, parts."""
    for name, value in (
        ("rounds", 0),
        ("prompt_parts", 0),
        ("keep_rounds", -1),
        ("replay_decay", 1.5),
        ("lr_decay", 0.0),
        ("output", "s3://bucket/rounds"),
    ):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(config, **{name: value})


def test_rounds_take_the_prompts_in_turn(config: RoundsConfig, tmp_path: Path) -> None:
    """Part by part, with another seed each; each but the first with the student before it."""
    config = dataclasses.replace(config, prompt_parts=2, first_sampler="teacher")
    sources = [dump_block(config, number, tmp_path)["source"] for number in (1, 2, 3)]
    assert [(one["part"], one["parts"]) for one in sources] == [(0, 2), (1, 2), (0, 2)]
    assert [one["generate"]["seed"] for one in sources] == [0, 1, 2]
    assert [one["generate"].get("by") for one in sources] == [
        None,
        *(f"{config.output}/round-00{number}/training/student" for number in (1, 2)),
    ]


def test_rates_fall_and_seeds_move_from_round_to_round(config: RoundsConfig) -> None:
    """A training without a warmup gets one, as its optimizer begins anew."""
    config = dataclasses.replace(
        config,
        lr_decay=0.5,
        first_sampler="teacher",
        train={**config.train, "student": {"config": STUDENT}, "seed": 7},
    )
    first, third = (train_block(config, n, Path("c"), Path("o"), []) for n in (1, 3))
    assert first["optimizer"] == {"lr": 1e-2, "warmup_ratio": 0.1}
    assert third["optimizer"]["lr"] == 2.5e-3
    assert (first["seed"], third["seed"]) == (7, 9)
    assert "config" in first["student"]
    assert third["student"] == {"path": f"{config.output}/round-002/training/student"}


def test_older_caches_weigh_less_and_end(config: RoundsConfig) -> None:
    """Powers of the decay, of as many rounds as are kept and are there."""
    five = [1, 2, 3, 4]
    assert [(r.number, r.weight) for r in replay(config, 5, five)] == [
        (4, 0.5),
        (3, 0.25),
        (2, 0.125),
        (1, 0.0625),
    ]
    kept = dataclasses.replace(config, keep_rounds=3)
    assert [r.number for r in replay(kept, 5, five)] == [4, 3]
    assert [r.number for r in replay(kept, 5, [1, 2, 3])] == [3]
    assert replay(dataclasses.replace(config, replay_decay=0.0), 5, five) == []
    fixed = {**config.train, "mixture": [{"cache": "given", "weight": 2.0}]}
    config = dataclasses.replace(config, train=fixed)
    block = train_block(config, 2, Path("new"), Path("o"), [Replay(1, 0.5)])
    assert block["mixture"] == [
        {"cache": "new", "weight": 1.0},
        {"cache": f"{config.output}/round-001/cache", "weight": 0.5},
        {"cache": "given", "weight": 2.0},
    ]


def test_a_preset_is_told_whose_prefixes_a_round_has(config: RoundsConfig) -> None:
    """Of the student, or of the teacher where that answered; the preset says what it lacks."""
    train = {**config.train, "loss": {"preset": "rkl"}}
    alone = dataclasses.replace(config, train=train)
    assert check(alone).mixture[0].prefixes == "student"
    with pytest.raises(ValueError, match="rkl is a loss of student prefixes"):
        check(dataclasses.replace(alone, first_sampler="teacher"))
    both = dataclasses.replace(config, train={**train, "loss": {"preset": "js"}})
    with pytest.raises(ValueError, match="js needs caches of teacher prefixes and student"):
        check(both)
    warmed = dataclasses.replace(both, first_sampler="teacher")
    block = train_block(warmed, 2, Path("new"), Path("o"), [Replay(1, 0.5)])
    assert [one["prefixes"] for one in block["mixture"]] == ["student", "teacher"]


def test_the_example_is_taken() -> None:
    """All but its paths, which are the reader's."""
    (config,) = parse_config([RoundsConfig], ["--config", str(ROOT / "examples/train/rounds.yaml")])
    here = {"student": {"path": str(ROOT)}, "eval": {}}
    config = dataclasses.replace(config, train={**config.train, **here})
    assert check(config).loss.kind == "rkl"
