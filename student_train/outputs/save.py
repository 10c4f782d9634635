"""What a finished run leaves: the student's directory and the summary, each complete or absent."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from decant.storage.files.durable import publish, publish_bytes
from decant.student_train.model.adapters import merged, save_adapter

STUDENT = "student"
SUMMARY = "summary.json"


def save_student(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: Any,
    output: Path,
    *,
    card: str,
    adapter: Any = None,
    load_base: Callable[[], PreTrainedModel] | None = None,
) -> None:
    """Publish the student's directory; all processes call it, as each may hold a shard.

    `card` is its README.md. An `adapter`, peft's model, is merged into the base that `load_base`
    gives, or saved alone.
    """
    prefix = "student."
    whole = accelerator.get_state_dict(model) or {}  # ZeRO-3 gives it to the first process alone
    weights = {
        name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)
    }
    if accelerator.is_main_process:
        temporary, target = output / f".{STUDENT}.tmp", output / STUDENT
        shutil.rmtree(temporary, ignore_errors=True)
        if adapter is None:
            accelerator.unwrap_model(model).student.save_pretrained(temporary, state_dict=weights)
        elif load_base is None:
            save_adapter(adapter, weights, temporary)
        else:
            merged(adapter, weights, load_base).save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card)
        publish(temporary, target)
    accelerator.wait_for_everyone()


def save_summary(record: dict[str, Any], output: Path) -> None:
    """Publish `summary.json`, whose presence says that the run is complete."""
    publish_bytes(output / SUMMARY, (json.dumps(record, indent=2) + "\n").encode())
