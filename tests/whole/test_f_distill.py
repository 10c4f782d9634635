"""f-DISTILL again: what is claimed, by which runs, and the way from prompts to figures."""

import json
import sys
from pathlib import Path

import pytest

from examples.reproduce import f_distill, f_distill_report
from examples.reproduce.f_distill_bench import VARIANTS, Run


def lines(seeds: int) -> list[dict]:
    """Runs in which rkl has the smaller likelihood risk with every seed, js with some."""
    found = []
    for seed in range(seeds):
        for place, variant in enumerate(VARIANTS):
            line = {"variant": variant, "rate": 5e-4, "steps": 60, "seed": seed, "passes": 2.5}
            line |= {name: 4.0 + 0.1 * place + seed for name in f_distill_report.NAMES}
            line["likelihood_risk"] -= 2.0 * (variant == "rkl")
            found.append(line)
    return found


def test_claims_are_those_that_the_papers_figures_make():
    """An ordering of quality is there in the direction of its figures, and only once."""
    found = f_distill_report.claims()
    beats = [(claim.a, claim.b) for claim in found if claim.figure == "rouge_l" and claim.sign]
    assert len(beats) == len(set(beats))
    for a, b in beats:
        assert any(
            its.get(a, 0) > its[b]
            for what, its in f_distill_report.PAPER.items()
            if b in its and "risk" not in what
        )
    assert ("seqkd", "mle") in beats and ("mle", "seqkd") not in beats
    assert {("kl", "rkl"), ("rkl", "kl")} <= set(beats)  # DART says one, XSum the other


def test_a_claim_holds_where_every_seed_says_so():
    """Differences are of the same seed; one seed against the others leaves it open."""
    runs = f_distill_report.of_seeds(lines(3))
    likelihood = next(c for c in f_distill_report.claims() if c.figure == "likelihood_risk")
    gaps = f_distill_report.differences(runs, likelihood)
    assert gaps == pytest.approx([-1.9] * 3)
    assert f_distill_report.verdict(gaps, likelihood.sign) == "yes, 3 of 3"
    assert f_distill_report.verdict([-0.1, 0.2, -0.1], -1) == "open, 2 of 3"
    assert f_distill_report.verdict([0.1, 0.2, 0.1], -1) == "no, 0 of 3"
    assert f_distill_report.verdict([0.1, -0.2, 0.1], 0) == "yes"
    assert f_distill_report.verdict([0.1, 0.2, 0.1], 0) == "no: every seed on one side"


def test_a_rate_is_searched_beyond_the_edge_of_its_grid(tmp_path: Path):
    """By the variant's own objective, each rate tried being a run that is kept."""
    args = type("Args", (), {"rate": 0.0, "steps": 60})()
    runs = f_distill.Runs(type("Bench", (), {"args": args})(), tmp_path / "runs.jsonl")
    for rate, kl in ((1.25e-4, 1.1), (2.5e-4, 1.0), (5e-4, 1.2), (1e-3, 1.5)):
        run = Run(variant="kl", rate=rate, steps=60, seed=-1)
        runs.add(vars(run) | {"sequence_kl": kl})
    assert f_distill.rate(runs, "kl-anew", float("inf")) == 2.5e-4


@pytest.mark.slow
def test_f_distill_goes_from_prompts_to_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Tiny: two variants learn from samples of both models; a rerun runs nothing."""
    arguments = ["x", "--fast", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--variants", "kl", "rkl"])
    f_distill.main()
    first = capsys.readouterr().out
    assert "likelihood risk: smaller" in first
    assert (tmp_path / "f_distill.png").stat().st_size > 5_000
    kept = [json.loads(x) for x in (tmp_path / "work/runs.jsonl").read_text().splitlines()]
    assert [x["variant"] for x in kept] == ["speed", "warm", "kl", "rkl"]
    assert all(0 < x[name] < 20 for x in kept[1:] for name in ("likelihood_risk", "coverage_risk"))
    f_distill.main()
    assert first.endswith(capsys.readouterr().out)
