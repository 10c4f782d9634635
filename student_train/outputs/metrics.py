"""What a run measures while it runs: throughput, memory, lines of metrics.jsonl, trackers."""

import dataclasses
import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from decant.storage.files.durable import naming, publish_bytes

METRICS = "metrics.jsonl"


@dataclasses.dataclass
class Recent:
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

    def __init__(
        self, output: Path, accelerator: Accelerator, resumed_at: int, *, is_trained: bool = False
    ) -> None:
        """Drop the lines after step `resumed_at`, which are to be written again; at 0 all.

        Where all steps `is_trained` by then, the line of the last evaluation is written again too.
        """
        self.path, self.accelerator = output / METRICS, accelerator
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            _truncate(self.path, resumed_at, is_trained=is_trained)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line; `values` has its step."""
        if self.accelerator.is_main_process:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        step = values["step"]
        self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=step)

    def of_step(self, step: int) -> dict[str, float]:
        """What was measured at a step, by the first line of it; empty where there is none."""
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                values = json.loads(line)
                if values.pop("step") == step:
                    return values
        return {}


def by_cache(sums: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """The means of a step over the targets of each cache that had any, as `kd/name`, `ce/name`.

    `sums` are, for one cache after the other: targets, and divergence and cross-entropy over them.
    """
    found: dict[str, float] = {}
    for i, name in enumerate(names[: len(sums) // 3]):
        targets, kd, ce = sums[3 * i : 3 * i + 3]
        if targets:
            found |= {f"kd/{name}": kd / targets, f"ce/{name}": ce / targets}
    return found


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _truncate(path: Path, step: int, *, is_trained: bool) -> None:
    """Drop the lines after a step and a torn last line; all lines if nothing was trained yet.

    What ends a run has its number of steps; if it `is_trained`, that of this step goes too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines() if step else []:
        try:
            values = json.loads(line)
        except ValueError:
            break
        is_last = is_trained and values["step"] == step and "steps" in values
        if values["step"] <= step and not is_last:
            kept.append(line + "\n")
    publish_bytes(path, "".join(kept).encode())
