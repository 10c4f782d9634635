"""Which of the evaluated students is kept, and when it is time to stop."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from decant.storage.files.durable import publish
from decant.student_train.config.evaluation import HIGHER_IS_BETTER, ROUGE
from decant.student_train.outputs.metrics import METRICS
from decant.student_train.outputs.written import writing
from decant.student_train.runtime.distributed import of_first_process

BEST = "best"
WEIGHTS, RECORD = "weights.pt", "best.json"


class Best:
    """The trained weights of the best evaluation so far, in `OUTPUT/best`.

    Nothing but files: `metrics.jsonl` tells how many evaluations followed, so a run resumes.
    """

    def __init__(
        self,
        metric: str,
        patience: int,
        output: Path,
        accelerator: Accelerator,
        *,
        resumed_at: int,
    ) -> None:
        """`metric` is the one that counts; patience 0 = never stop early.

        At step 0 what another run, perhaps of another config, has left is removed.
        """
        self.metric, self.patience, self.accelerator = metric, patience, accelerator
        self.sign = -1.0 if metric.split("/")[0] in (*HIGHER_IS_BETTER, *ROUGE) else 1.0
        self.folder = output / BEST
        if not resumed_at:
            self.remove()
        # What the first process finds counts: it has dropped lines that others may still see.
        self.step, self.metrics, self.since = of_first_process(self._found(output))
        """Step and metrics of the best, and evaluations since."""

    def _found(self, output: Path) -> tuple[int, dict[str, float], int]:
        step, metrics, since = 0, {self.metric: self.sign * math.inf}, 0
        if (self.folder / RECORD).exists():
            record = json.loads((self.folder / RECORD).read_text())
            step, metrics = record["step"], record["figures"]
        if (output / METRICS).exists():
            lines = (json.loads(line) for line in (output / METRICS).read_text().splitlines())
            since = sum(1 for line in lines if self.metric in line and line["step"] > step)
        return step, metrics, since

    @property
    def should_stop(self) -> bool:
        """Whether as many evaluations as patience allows were no better."""
        return 0 < self.patience <= self.since

    def update(self, step: int, metrics: dict[str, float], model: nn.Module) -> None:
        """Keep the weights if they are better than any before; all processes call it.

        Raises ValueError if `metrics` lacks the one that counts.
        """
        if self.metric not in metrics:
            raise ValueError(
                f"eval.keep_best {self.metric!r} is not among the metrics: {', '.join(metrics)}"
            )
        # A step that is repeated after a resume is the best again, not a further evaluation.
        if not self.sign * (metrics[self.metric] - self.metrics[self.metric]) < 0:  # NaN is worse
            self.since += step > self.step
            return
        self.step, self.metrics, self.since = step, metrics, 0
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        weights = get_model_state_dict(model, options=options)
        if self.accelerator.is_main_process:
            with writing(self.folder, "Older checkpoints stay"):
                self._save(weights, {"step": step, "figures": metrics})
        self.accelerator.wait_for_everyone()

    def _save(self, weights: dict[str, Any], record: dict[str, Any]) -> None:
        temporary = self.folder.with_name(f".{BEST}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save(weights, temporary / WEIGHTS)
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        publish(temporary, self.folder)

    def remove(self) -> None:
        """Drop the files, once the student is saved."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, model: nn.Module) -> None:
        """Put the weights back into the model; all processes call it."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the outermost unit stays gathered after a forward
        weights: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            weights = torch.load(self.folder / WEIGHTS, weights_only=True)
        several = self.accelerator.num_processes > 1
        options = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=several)
        missing = set_model_state_dict(model, weights, options=options)
        assert not missing.unexpected_keys, missing
        self.accelerator.wait_for_everyone()
