"""Which loss is first in which measure, and AKL's mu: figures, intervals and reports."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from examples.reproduce import akl_mu, heldout_text, loss_order, loss_order_report


def test_figures_of_a_target_are_those_of_the_whole_distributions():
    """Both KLs and the overlap as sums over the vocabulary; agreement and confidence of the top."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, 30, generator=generator, dtype=torch.float64).softmax(2)
    labels = torch.arange(6)
    found = heldout_text.target_figures(p.log(), q.log(), labels)
    torch.testing.assert_close(found["ce"], -q[torch.arange(6), labels].log())
    torch.testing.assert_close(found["kl_forward"], (p * (p / q).log()).sum(1))
    torch.testing.assert_close(found["kl_reverse"], (q * (q / p).log()).sum(1))
    torch.testing.assert_close(found["acceptance"], 1 - 0.5 * (p - q).abs().sum(1))
    assert found["agreement"].tolist() == (p.argmax(1) == q.argmax(1)).float().tolist()


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [3, 2, 1], 1),
        ([1, 5, 2, 6], [1, 2, 6], 3),
        ([], [1], 0),
    ],
)
def test_longest_common_subsequence(ours: list[int], theirs: list[int], expected: int):
    """Tokens in the same order, with others between them."""
    assert heldout_text.common(ours, theirs) == expected


def order_lines(seeds: int, files: int = 12) -> list[dict]:
    """Runs in which AKL is 0.1 nats better than FKL on every file, and noise is far larger."""
    lines = []
    for seed in range(seeds):
        noise = torch.randn(files, generator=torch.Generator().manual_seed(seed)).tolist()
        for kind in loss_order_report.KINDS:
            sums = [50 * (4 + x + seed - 0.1 * (kind == "akl")) for x in noise]
            line = {"student": "narrow", "epochs": 1, "kind": kind, "rate": 1e-3, "seed": seed}
            line |= {"targets": [50] * files, "prompts": [2] * files, "cpu_s": 1.0}
            line |= {name: sums for name in loss_order_report.NAMES if name != "ece"}
            line["bins"] = [[0.5, -0.25, *[0.0] * 13]] * files
            lines.append(line)
    return lines


def test_paired_differences_are_surer_than_the_losses_they_are_of():
    """0.1 nats on every file are found between means whose own intervals are wide."""
    found = loss_order_report.values(order_lines(seeds=3))
    low, high = found["fkl"]["ce"].interval
    assert high - low > 0.5
    gap = found["akl"]["ce"] - found["fkl"]["ce"]
    assert gap.mean == pytest.approx(-0.1)
    assert gap.interval == pytest.approx((-0.1, -0.1))
    assert gap.is_sure
    assert not (found["rkl"]["ce"] - found["fkl"]["ce"]).is_sure
    assert found["fkl"]["ece"].mean == pytest.approx(0.75 / 50)


def test_the_order_of_losses_reports_from_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """--report makes tables and plot of what is finished, and runs nothing."""
    log = tmp_path / "runs.jsonl"
    log.write_text("".join(f"{json.dumps(line)}\n" for line in order_lines(2)))
    monkeypatch.setattr(
        sys, "argv", ["x", "--work", str(tmp_path), "--out", str(tmp_path), "--report"]
    )
    loss_order.main()
    printed = capsys.readouterr().out
    assert "| AKL  | -0.100*" in printed
    assert (tmp_path / "loss_order.png").stat().st_size > 5_000


def test_a_rate_is_searched_beyond_the_edge_of_its_grid(tmp_path: Path):
    """The grid grows while its best lies at an edge; every rate tried is a run of the log."""
    log = loss_order.Log(tmp_path / "runs.jsonl")
    best = 4e-3
    for rate in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
        run = loss_order.Run(student="narrow", epochs=1, kind="fkl", rate=rate, seed=-1)
        away = abs(math.log(rate / best))
        log.add({**vars_of(run), "kl_forward": [away], "targets": [1]})
    bench = object.__new__(loss_order.Bench)
    bench.work, bench.log = tmp_path, log
    assert bench.rate("narrow", 1, "fkl") == best
    assert len(loss_order.Log(log.path).lines) == 6


def vars_of(run: loss_order.Run) -> dict:
    return {name: getattr(run, name) for name in loss_order.Run.__annotations__}


def test_akls_mu_reports_from_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Differences are to mu 0.5 with the same seed, over the seeds that every setting has."""
    lines = [
        {"teacher": "demo", "text": "code", "setting": setting, "seed": seed}
        | {name: 3.0 + seed + 0.01 * place for name in akl_mu.NAMES}
        for place, setting in enumerate(akl_mu.SETTINGS)
        for seed in range(3 if setting == akl_mu.USUAL else 2)
    ]
    (tmp_path / "runs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.setattr(
        sys,
        "argv",
        ["x", "--work", str(tmp_path), "--out", str(tmp_path), "--seeds", "2", "--texts", "code"],
    )
    akl_mu.main()
    printed = capsys.readouterr().out
    assert "| AKL, mu 0.5 | 2     | 3.500 " in printed
    assert "| AKL, mu 0.3 | 2     | +0.040 ± 0.000" in printed
