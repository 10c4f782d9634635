"""What leaves with a student: its card, generation config and tokenizer, and the way to the hub."""

import base64
import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, get_token
from transformers import AutoTokenizer, GenerationConfig

from decant.storage import CacheReader
from decant.student_train import (
    AdapterConfig,
    CacheShare,
    EvalConfig,
    OptimizerConfig,
    StudentConfig,
    train,
)
from tests.support import ROOT, models
from tests.support.trainings import STUDENT, config


def test_a_card_says_where_a_student_comes_from(cache: Path, tmp_path: Path) -> None:
    """Teacher, cache id, loss and the figures of the summary, as the hub reads them."""
    run = config(cache, tmp_path / "my-student", eval=EvalConfig(heldout_fraction=0.2))
    summary = train(run)
    card = ModelCard.load(tmp_path / "my-student/student/README.md")
    manifest = CacheReader(cache).manifest
    for text in (
        manifest.cache_id,
        manifest.teacher.name,
        manifest.teacher.fingerprint,
        manifest.tokenizer.fingerprint,
        '"kind": "fkl"',
        '"ce_weight": 0.3',
        "topk k=16, f32",
        "| sequences per step | 4: batch size 4 x accumulation 1 x processes 1 |",
        "| packing | none |",
        "| held-out targets | 0.2 of the sequences, never trained on |",
        f"{manifest.totals.targets:,}",
    ):
        assert text in card.text, text
    assert card.data.library_name == "transformers"
    figures = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert len(figures) == 12
    assert {r.metric_name for r in card.data.eval_results} == set(figures)
    for name, value in figures.items():
        assert value == pytest.approx(summary[name], abs=1e-6), name
        assert f"| `{name}` | {summary[name]:.4f} |" in card.text


def test_generation_config_and_tokenizer_leave_too(
    cache: Path, teacher_path: Path, tmp_path: Path
) -> None:
    """`generate` needs nothing else than the directory, and chats as the teacher does."""
    train(config(cache, tmp_path / "run", optimizer=OptimizerConfig(), steps=1))
    folder = tmp_path / "run/student"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 1
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, teacher_path))
    assert ours.chat_template == theirs.chat_template == models.CHAT_TEMPLATE


def test_the_card_of_an_adapter_and_of_a_mixture(cache: Path, tmp_path: Path) -> None:
    """The adapter says so, and every cache has a column."""
    models.save_teacher(tmp_path / "base", seed=3)
    shares = [CacheShare(cache=str(cache), weight=0.7), CacheShare(cache=str(cache), weight=0.3)]
    run = config(
        cache,
        tmp_path / "run",
        steps=1,
        optimizer=OptimizerConfig(),
        student=StudentConfig(path=str(tmp_path / "base")),
        adapter=AdapterConfig(r=2, merge=False),
    )
    train(dataclasses.replace(run, cache="", mixture=shares))
    card = ModelCard.load(tmp_path / "run/student/README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "| cache 1 | cache 2 |" in card.text and "weights 0.7, 0.3" in card.text
    assert card.data.eval_results is None


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files touches."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami-v2"):
            if self.headers.get("Authorization") != "Bearer hf_good":
                return self._reply({"error": "Invalid user token."}, 401)
            return self._reply({"type": "user", "name": "me"})
        return self._reply({"error": "not here"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        calls: dict[str, Any] = self.server.calls  # type: ignore[attr-defined]
        if self.path.startswith("/api/repos/create"):
            calls["create"] = json.loads(body)
            return self._reply(
                {"url": "https://huggingface.co/me/mine", "name": "mine", "id": "me/mine"}
            )
        if self.path.startswith("/api/validate-yaml"):
            return self._reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._reply({"files": files})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            for line in lines:
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    calls["files"][line["value"]["path"]] = content
            answer = {"commitOid": "0" * 40, "commitUrl": "https://huggingface.co/me/mine/commit/0"}
            return self._reply(answer | {"hookOutput": ""})
        return self._reply({"error": "not here"}, 404)

    def _reply(self, value: Any, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of a hub and what it was told."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls = {"files": {}}  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server.calls  # type: ignore[attr-defined]
    server.shutdown()


def run_with_hub(
    cache: Path, folder: Path, endpoint: str, token: str
) -> subprocess.CompletedProcess[str]:
    """Train a step with push_to_hub, as a process that knows this hub alone."""
    fields = {
        "cache": str(cache),
        "output": str(folder / "run"),
        "steps": 1,
        "batch_size": 2,
        "student": {"config": STUDENT},
        "push_to_hub": "me/mine",
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(fields))
    settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(folder / "home")}
    return subprocess.run(
        [sys.executable, "-m", "student_train", "--config", str(folder / "train.yaml")],
        cwd=ROOT,
        env={**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_finished_student_is_uploaded(
    cache: Path, tmp_path: Path, hub: tuple[str, dict[str, Any]]
) -> None:
    """Every file of its directory, to a private repository, over the hub's HTTP interface."""
    endpoint, calls = hub
    done = run_with_hub(cache, tmp_path, endpoint, "hf_good")
    assert done.returncode == 0, done.stderr[-2000:]
    assert calls["create"]["visibility"] == "private"
    student = tmp_path / "run/student"
    expected = {path.name: path.read_bytes() for path in student.iterdir()}
    assert calls["files"] == expected


def test_a_hub_that_does_not_know_us_stops_before_training(
    cache: Path, tmp_path: Path, hub: tuple[str, dict[str, Any]]
) -> None:
    """A token that is refused, and none at all: exit code 2, one line, nothing trained."""
    done = run_with_hub(cache, tmp_path, hub[0], "hf_bad")
    assert done.returncode == 2 and "does not know us" in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
    if get_token() is None:
        with pytest.raises(ValueError, match="needs a token"):
            train(config(cache, tmp_path / "none", push_to_hub="me/mine"))
