"""The reproduction of f-DISTILL: its prompts, its rates, and what it says of its runs."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from decant.student_train.config.presets import FIXED
from examples.reproduce import f_distill, f_distill_bench, f_distill_report


def runs_of(variants: dict[str, float], seeds: int = 2) -> list[dict]:
    """Runs whose figures are those given, plus the seed."""
    return [
        {"variant": variant, "seed": seed, "rate": 1e-4, "steps": 60, "scored": 100, "passes": 2.5}
        | {name: value + seed for name in f_distill_report.NAMES}
        for variant, value in variants.items()
        for seed in range(seeds)
    ]


def test_the_report_is_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """--report makes tables and plot of what is finished, and runs nothing."""
    lines = runs_of({"mle": 1.0, "seqkd": 1.5, "kl": 2.0, "rkl": 1.75})
    speed = {"variant": "speed", "seed": 0, "train_s": 0.02, "teacher_s": 0.06, "student_s": 0.01}
    lines.append(speed)
    (tmp_path / "runs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.setattr(
        sys, "argv", ["x", "--work", str(tmp_path), "--out", str(tmp_path), "--report"]
    )
    f_distill.main()
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in capsys.readouterr().out.splitlines()]
    found = {(row[0], row[1]): row[3:] for row in rows if len(row) == 5}
    assert found["seqkd, mle", "ROUGE-L, teacher: larger"] == ["+0.500 ± 0.000", "yes, 2 of 2"]
    assert found["rkl, kl", "likelihood risk: smaller"] == ["-0.250 ± 0.000", "yes, 2 of 2"]
    assert found["rkl, kl", "coverage risk: larger"] == ["-0.250 ± 0.000", "no, 0 of 2"]
    assert ["teacher", "20.0", "60.0", "4.00"] in rows
    assert (tmp_path / "f_distill.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("gaps", "sign", "expected"),
    [
        ([0.1, 0.2], 1, "yes"),
        ([0.1, 0.2], -1, "no"),
        ([0.1, -0.2], 1, "open"),
        ([0.1, -0.2], 0, "yes"),
        ([0.1, 0.2], 0, "no"),
        ([0.1], 0, "open"),
        ([0.1], 1, "open"),
    ],
)
def test_a_claim_holds_where_every_seed_agrees(gaps: list[float], sign: int, expected: str):
    """And fails where none does; an equality wants both signs."""
    assert f_distill_report.verdict(gaps, sign).split(",")[0] == expected


def test_claims_of_quality_are_those_that_the_papers_figures_bear():
    """No other is claimed; where two tables disagree, both orderings are."""
    pairs = {(c.a, c.b) for c in f_distill_report.claims() if c.figure == "rouge_l" and c.sign == 1}
    assert {("kl", "rkl"), ("rkl", "kl"), ("tvd", "js"), ("seqkd", "mle")} <= pairs
    for a, b in pairs:
        tables = [x for x in f_distill_report.PAPER.values() if a in x and b in x]
        assert any(x[a] > x[b] for x in tables)


def test_variants_of_f_distill_have_the_prefixes_that_their_presets_ask_for():
    """Each preset's caches are of the sides that it has, data standing in for the teacher's."""
    for loss, caches in f_distill_bench.VARIANTS.values():
        if loss.preset and caches:
            sides = {f_distill_bench.SIDES.get(name, name) for name in caches}
            assert sides == set(FIXED[loss.preset])


def test_prompts_and_responses_are_the_text():
    """One after the other they are the beginning of the text, in whole windows."""
    tokenizer = AutoTokenizer.from_pretrained(f_distill_bench.TEACHER)
    text = Path(f_distill_bench.__file__).read_text()
    found = list(f_distill_bench.windows(tokenizer, [("a.py", text)], tokens=64))
    assert len(found) > 10
    assert text.startswith("".join(x["prompt"] + x["response"] for x in found))
    assert len({x["id"] for x in found}) == len(found)


def test_a_rate_is_searched_beyond_the_edge_of_its_grid(tmp_path: Path):
    """Downwards as well; kl-anew takes the rate of kl, and a given one is taken as it is."""
    lines = [
        {"variant": "kl", "rate": rate, "steps": 60, "seed": -1}
        | {"sequence_kl": abs(math.log(rate / 1.25e-4))}
        for rate in (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)
    ]
    log = tmp_path / "runs.jsonl"
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    args = argparse.Namespace(teacher="", prompts="", rate=0.0, steps=60)
    runs = f_distill.Runs(f_distill_bench.Bench(tmp_path, args), log)
    assert f_distill.rate(runs, "kl-anew", math.inf) == 1.25e-4
    args.rate = 3e-4
    assert f_distill.rate(runs, "kl", math.inf) == 3e-4
