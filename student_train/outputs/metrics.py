"""What a run tells while it runs: throughput, the bar, lines of metrics.jsonl, trackers."""

import dataclasses
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from decant.storage.files.durable import publish_bytes

METRICS = "metrics.jsonl"


@dataclasses.dataclass
class Window:
    """Throughput since the last logged line."""

    targets: float = 0.0
    tokens: float = 0.0
    waited_s: float = 0.0
    seconds: float = 0.0

    def add(self, targets: float, tokens: float, waited_s: float, seconds: float) -> None:
        """Count a step; targets and tokens of all processes."""
        self.targets += targets
        self.tokens += tokens
        self.waited_s += waited_s
        self.seconds += seconds

    @property
    def targets_per_s(self) -> float:
        """Of all processes together."""
        return self.targets / max(self.seconds, 1e-9)

    @property
    def tokens_per_s(self) -> float:
        """Of all processes together, padding not counted."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def wait_share(self) -> float:
        """Share of the time that this process waited for data."""
        return self.waited_s / max(self.seconds, 1e-9)

    def summary(self) -> dict[str, float]:
        """What a logged line says of it."""
        return {
            "targets_per_s": round(self.targets_per_s, 1),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "data_wait_share": round(self.wait_share, 4),
        }


class Metrics:
    """The lines of `metrics.jsonl`, which the trackers get too."""

    def __init__(self, output: Path, accelerator: Accelerator, resumed_at: int) -> None:
        """Drop the lines behind step `resumed_at`, which are to be written again."""
        self.path, self.accelerator = output / METRICS, accelerator
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            _truncate(self.path, resumed_at)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line; `values` has its step."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        step = values["step"]
        self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=step)


def bar_text(loss: float, kd: float, ce: float, window: Window) -> str:
    """What the bar says behind its steps, rate and time to go."""
    return (
        f"loss {loss:.3f} (kd {kd:.3f}, ce {ce:.3f}), {window.tokens_per_s:,.0f} tokens/s, "
        f"{peak_memory_bytes() / 1e9:.1f} GB"
    )


def progress_bar(steps: int, first: int, accelerator: Accelerator) -> tqdm:
    """A bar over the steps, on the main process of a terminal."""
    return tqdm(
        total=steps,
        initial=first,
        desc="train",
        unit=" steps",
        disable=not accelerator.is_main_process or None,
    )


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _truncate(path: Path, step: int) -> None:
    """Drop the lines behind a step and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break
        if values["step"] <= step:
            kept.append(line + "\n")
    publish_bytes(path, "".join(kept).encode())
