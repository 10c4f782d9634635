"""Configurations from files and the command line: what is taken, and how a mistake is told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from decant.storage.cli.config import parse_config, printed_config
from decant.storage.cli.options import field_texts, groups, options


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A value over time."""

    values: list[float]
    """The values."""
    shape: str = "linear"
    """Between them."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How it is done."""

    rate: float = 0.1
    """Speed of it."""
    curve: float | Curve = 1.0
    """A number, or a curve."""
    kind: Literal["slow", "fast"] = "slow"
    """Which."""
    names: list[str] = field(default_factory=list)
    """Some names."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done."""

    output: str
    """Where to."""
    engine: Engine = field(default_factory=Engine)
    """How."""
    curves: list[Curve] = field(default_factory=list)
    """Several."""
    count: int = 3
    """How often."""
    is_quick: bool = False
    """Whether it is
    quick."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Of one run."""

    dry: bool = False
    """Write nothing."""


def parsed(*arguments: str) -> Job:
    job, _ = parse_config([Job, Run], arguments)
    return job


def refused(*arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        parsed(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "job.yaml").write_text(text)
    return str(tmp_path / "job.yaml")


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    """Key by key; what neither says has its default."""
    file = write(tmp_path, "output: a\nengine: {rate: 0.5, names: [x]}\n")
    job = parsed("--config", file, "--engine.rate=0.25", "--count", "4")
    assert job == Job(output="a", engine=Engine(rate=0.25, names=["x"]), count=4)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--is-quick"], {"is_quick": True}),
        (["--is_quick"], {"is_quick": True}),
        (["--is-quick", "false"], {"is_quick": False}),
        (["--is_quick=true"], {"is_quick": True}),
        (["--engine.names", "a", "b"], {"engine": Engine(names=["a", "b"])}),
        (["--engine.names", "a"], {"engine": Engine(names=["a"])}),
        (["--engine.names", "[a, b]"], {"engine": Engine(names=["a", "b"])}),
        (["--engine.names+", "a"], {"engine": Engine(names=["a"])}),
        (["--engine.rate", "-1"], {"engine": Engine(rate=-1.0)}),
        (["--engine.rate", "1e-3"], {"engine": Engine(rate=1e-3)}),
        (["--engine", "{rate: 2}"], {"engine": Engine(rate=2.0)}),
        (["--engine.settings.depth", "3"], {"engine": Engine(settings={"depth": 3})}),
        (["--engine.curve", "{values: [1, 2]}"], {"engine": Engine(curve=Curve(values=[1, 2]))}),
        (["--curves", "[{values: [1]}]"], {"curves": [Curve(values=[1.0])]}),
    ],
)
def test_options_are_written_as_people_write_them(
    words: list[str], changes: dict[str, Any]
) -> None:
    """Dashes for underscores, switches without a value, lists as several words."""
    assert parsed("--output", "o", *words) == Job(output="o", **changes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--otuput", "x"], "--otuput is not an option: did you mean --output?"),
        (["--engine.rte", "1"], "--engine.rte is not an option: did you mean --engine.rate?"),
        (["--rate", "1"], "--rate is not an option: did you mean --engine.rate?"),
        (["--is-quik"], "--is-quik is not an option: did you mean --is_quick?"),
        (["--zzz", "1"], "--zzz is not an option"),
        (["--count", "many"], "--count many: expected a whole number"),
        (["--count=many"], "--count many: expected a whole number"),
        (["--count"], "--count needs a value: a whole number"),
        (["--engine.rate", "fast"], "--engine.rate fast: expected a number"),
        (["--engine.kind", "medium"], "--engine.kind medium: expected one of slow, fast"),
        (["--engine.curve", "{values: 1}"], "values is 1: expected a list"),
        (["--engine.curve", "{shape: step}"], "has no values"),
        (["--engine", "3"], "--engine 3: expected a YAML file with keys of engine"),
        (["--is-quick", "--count", "x"], "--count x: expected a whole number"),
        (["--curves", "[{value: [1]}]"], "[0].value is not a key: did you mean [0].values?"),
        (["stray"], "'stray' is not an option"),
        (["--config"], "--config needs a value"),
        (["--config", "absent.yaml"], "absent.yaml: no such file"),
        (["--config", "{coutn: 3}"], "--config line 1: coutn is not a key: did you mean count?"),
    ],
)
def test_a_mistake_on_the_command_line_is_blamed_on_it(
    tmp_path: Path, words: list[str], said: str
) -> None:
    """Whatever the file says; what was meant is named where it is close."""
    file = write(tmp_path, "output: a\n")
    assert said in refused("--config", file, *words)
    assert file not in refused("--config", file, *words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("otuput: x", " line 1: otuput is not a key: did you mean output?"),
        (
            "output: x\nengine:\n  rte: 1",
            " line 3: engine.rte is not a key: did you mean engine.rate?",
        ),
        ("output: x\nrate: 1", " line 2: rate is not a key: did you mean engine.rate?"),
        ("output: x\ncount: many", " line 2: count is many: expected a whole number"),
        ("output: x\ncount: 1.5", " line 2: count is 1.5: expected a whole number"),
        ("output: 3", " line 1: output is 3: expected a text, in quotes: '3'"),
        ("output: x\nis_quick: maybe", " line 2: is_quick is maybe: expected true or false"),
        ("output: x\nengine: {names: a}", " line 2: engine.names is a: expected a list"),
        ("output: x\nengine: 3", " line 2: engine is 3: expected keys with values"),
        ("output: x\nengine: [1]", " line 2: engine is a list: expected keys with values"),
        ("output: x\nengine: {settings: 3}", " line 2: engine.settings is 3: expected keys"),
        ("output: x\nengine: {kind: quick}", " line 2: engine.kind is quick: expected one of"),
        ("output: x\nengine: {curve: abc}", " line 2: engine.curve is abc: expected a number"),
        ("output: x\ncurves:\n- {values: [1]}\n- {value: [1]}", " line 4: curves[1].value is not"),
        ("output: x\ncurves: [{}]", " line 2: curves[0] has no values"),
        ("output: [x", " line 1 is not YAML: "),
        ("? [a, b]\n: 3", " line 1: expected the name of a key"),
        ("a: &a {count: x}\n<<: *a", " line 1: a is not a key"),
        ("- output", " line 1: found a list: expected keys with values, such as {output: ...}"),
        ("output", " line 1: output: expected keys with values"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    """File, line, key, what was found and what was expected."""
    file = write(tmp_path, text)
    assert file + said in refused("--config", file)


def test_what_is_missing_is_named() -> None:
    """With both ways of giving it."""
    assert refused() == "output is missing: set in the YAML, or as --output ..."


def test_the_first_of_several_mistakes_is_told(tmp_path: Path) -> None:
    """The command line's before the file's."""
    file = write(tmp_path, "otuput: x")
    assert refused("--config", file, "--cuont", "3").startswith("--cuont")


def test_the_printed_configuration_is_read_back(tmp_path: Path) -> None:
    """With comments too, which are the text of every key; required keys may be missing."""
    words = ["--output", "o", "--engine.names", "a", "b", "--engine.settings", "{depth: 3}"]
    plain = printed_config([Job, Run], [*words, "--print_config"])
    explained = printed_config([Job, Run], ["--print_config=comments", *words])
    for text in (plain, explained):
        job, _ = parse_config([Job, Run], ["--config", write(tmp_path, text)])
        assert job == parsed(*words)
    lines = explained.splitlines()
    known = {option.key: option.text for option in options(Job, Run).values()}
    for key, text in {**known, **{g.key: g.text for g in groups(Job) if g.key}}.items():
        name = key.rpartition(".")[2]
        place = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{name}:"))
        assert lines[place - 1].strip() == f"# {text}"
    short = printed_config([Job], ["--output", "o", "--print_config=skip_default"])
    assert yaml.safe_load(short) == {"output": "o"}
    assert "count: 3" in printed_config([Job], ["--print_config"])


def test_the_text_of_a_field_is_what_is_written_below_it() -> None:
    """On one line; of the classes that a class is made from as well."""
    assert field_texts(Job)["is_quick"] == "Whether it is quick."

    @dataclass(frozen=True, kw_only=True)
    class More(Run):
        """With another."""

        seed: int = 0
        """Of the choice."""

    assert field_texts(More) == {"dry": "Write nothing.", "seed": "Of the choice."}
