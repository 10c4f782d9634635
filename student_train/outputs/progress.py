"""What a run says while it runs: a bar on a terminal, lines elsewhere, what happens in both.

Everything goes to stderr: stdout is for what the run ends with.
"""

import logging
import sys
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from decant.student_train.outputs.metrics import Recent, peak_memory_bytes

log = logging.getLogger(__name__)

BAR = "{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
SHOWN = (
    ("heldout_ce", "held-out CE {heldout_ce:.3f} (teacher {teacher_ce:.3f})"),
    ("heldout_divergence", "divergence {heldout_divergence:.3f}"),
    ("top1_agreement", "agreement {top1_agreement:.1%}"),
    ("rougeL", "ROUGE-L {rougeL:.3f}"),
)
"""What a line says of an evaluation; all of it is in metrics.jsonl."""


class Progress:
    """Tells how far a run is, on the main process."""

    def __init__(self, steps: int, first: int, accelerator: Accelerator) -> None:
        """A run of `steps`, of which `first` are done."""
        self.steps, self.first = steps, first
        self._speaks = accelerator.is_main_process
        self._seconds = 0.0
        self.bar = tqdm(
            total=steps,
            initial=first,
            bar_format=BAR,
            dynamic_ncols=True,
            disable=not accelerator.is_main_process or None,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def stepped(self, loss: float, recent: Recent, seconds: float) -> None:
        """A step is done, which took so long."""
        self._seconds += seconds
        self.bar.update()
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, {recent.tokens_per_s:,.0f} tokens/s, {_memory()}", refresh=False
        )

    def logged(self, step: int, values: Mapping[str, Any], recent: Recent) -> None:
        """A line of the metrics was written; where there is a bar, that says as much."""
        if not self.bar.disable or not self._speaks:
            return
        left = self._seconds / max(1, step - self.first) * (self.steps - step)
        self.say(
            step,
            f"loss {values['loss']:.4f} (kd {values['kd']:.4f}, ce {values['ce']:.4f}), lr "
            f"{values['lr']:.2e}, {recent.tokens_per_s:,.0f} tokens/s, {_memory()}, "
            f"{duration(left)} left",
        )

    def evaluated(self, step: int, metrics: Mapping[str, float], note: str = "") -> None:
        """The student was evaluated."""
        said = [text.format(**metrics) for name, text in SHOWN if name in metrics]
        self.say(step, ", ".join([*said, *([note] if note else [])]))

    def say(self, step: int, text: str) -> None:
        """A line, above the bar if there is one."""
        width = len(f"{self.steps:,}")
        line = f"step {step:{width},}/{self.steps:,}: {text}"
        if not self._speaks:
            return
        if self.bar.disable:
            log.info(line)
        else:
            self.bar.write(line, file=sys.stderr)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _memory() -> str:
    return f"{peak_memory_bytes() / 1e9:.1f} GB"
