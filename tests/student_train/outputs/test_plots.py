"""The picture of a run: drawn from its metrics, and never in the way."""

import json
import sys
from pathlib import Path

import pytest
from matplotlib import image
from matplotlib.axes import Axes

from decant.student_train import EvalConfig, train
from decant.student_train.outputs.plots import draw
from tests.support.trainings import config


def test_a_run_is_drawn(cache: Path, tmp_path: Path) -> None:
    """A readable PNG with ink in it beside metrics.jsonl, unless it is switched off."""
    evaluation = EvalConfig(heldout_fraction=0.2, every_steps=2)
    train(config(cache, tmp_path / "run", eval=evaluation))
    pixels = image.imread(tmp_path / "run/metrics.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] > 1200
    assert pixels[..., :3].min() < 0.2 < 0.99 < pixels[..., :3].mean() + 0.1
    train(config(cache, tmp_path / "plain", plots=False))
    assert not (tmp_path / "plain/metrics.png").exists()


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_any_number_of_lines_draws(tmp_path: Path, count: int) -> None:
    """None draws nothing; one is a point; many are smoothed."""
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"step": i, "loss": 1 / (i + 1), "grad_norm": float(i % 7)}
        | ({"heldout_ce": 1.0} if i % 5 == 0 else {})
        for i in range(count)
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw(metrics, tmp_path / "m.png") == (count > 0)
    assert (tmp_path / "m.png").exists() == (count > 0)
    assert not list(tmp_path.glob(".*"))


def test_without_matplotlib_there_is_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And no picture and no error."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # so that importing them fails
    caplog.set_level("INFO")
    assert not draw(tmp_path / "metrics.jsonl", tmp_path / "metrics.png")
    assert "matplotlib is not installed" in caplog.text
    assert not (tmp_path / "metrics.png").exists()


def test_every_scheduled_number_is_drawn_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the loss calls its options; one alone has a legend too."""
    legends = []
    legend = Axes.legend

    def kept(axes: Axes, **options: float) -> None:
        legends.append([text.get_text() for text in legend(axes, **options).get_texts()])

    monkeypatch.setattr(Axes, "legend", kept)
    line = {"step": 1, "epoch": 0.1, "loss": 1.0, "lr": 0.1, "alpha": 0.5, "tokens_per_s": 9.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert draw(tmp_path / "metrics.jsonl", tmp_path / "m.png")
    assert legends == [["alpha"]]
