"""What a finished run leaves: the student's directory and the summary, each complete or absent.

A student is published when it has been read back and is, name by name and bit by bit, the one that
was trained.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from decant.storage.files.durable import filling, publish, publish_bytes
from decant.student_train.config.student import QatConfig
from decant.student_train.model.adapters import adapter_file_name, merged, save_adapter
from decant.student_train.model.fake_quantise import save_quantised
from decant.student_train.model.student import absent_weights, plain_name
from decant.student_train.outputs.written import NotWritten, writing

STUDENT = "student"
QUANTISED = "student-quantised"
SUMMARY = "summary.json"
PREFIX = "student."
"""Of the student's weights among those of the `Distiller`."""
STAYS = "The checkpoint of the last step stays: the same command saves the student from it"


def save_student(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: Any,
    output: Path,
    *,
    card: str,
    adapter: Any = None,
    load_base: Callable[[], PreTrainedModel] | None = None,
    qat: QatConfig | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Publish the student's directory; all processes call it, as each may hold a shard.

    `card` is its README.md. An `adapter`, peft's model, is merged into the base that `load_base`
    gives, or saved alone. A student trained for `qat` is saved quantised as well, beside it. Raises
    NotWritten, and leaves what was published before, if it cannot be written or is not read back as
    it was trained.
    """
    target = output / STUDENT
    with writing(target, STAYS):
        whole = accelerator.get_state_dict(model) or {}  # ZeRO-3: on the first process alone
    if accelerator.is_main_process:
        weights = {
            plain_name(name).removeprefix(PREFIX): value
            for name, value in whole.items()
            if plain_name(name).startswith(PREFIX)
        }
        student = accelerator.unwrap_model(model).student
        temporary = output / f".{STUDENT}.tmp"
        with writing(target, STAYS), filling(temporary):
            if adapter is None:
                _refuse_other_names(weights, student)
                student.save_pretrained(temporary, state_dict=dict(weights))  # which it empties
                _prove(temporary, weights, trust_remote_code)
            elif load_base is None:
                weights = {name: value for name, value in weights.items() if ".lora_" in name}
                save_adapter(adapter, weights, temporary)
                _prove_adapter(temporary, weights)
            else:
                whole_student = merged(adapter, weights, load_base)
                whole_student.save_pretrained(temporary)
                _prove(temporary, whole_student.state_dict(), trust_remote_code)
            _complete(temporary, target, tokenizer, card)
        if qat:
            temporary, quantised = output / f".{QUANTISED}.tmp", output / QUANTISED
            with writing(quantised, STAYS), filling(temporary):
                trusted = {"trust_remote_code": trust_remote_code}
                save_quantised(target, temporary, qat, student, weights, **trusted)
                _complete(temporary, quantised, tokenizer, card)
    accelerator.wait_for_everyone()


def save_summary(record: dict[str, Any], output: Path) -> None:
    """Publish `summary.json`, whose presence says that the run is complete."""
    with writing(output / SUMMARY, STAYS):
        publish_bytes(output / SUMMARY, (json.dumps(record, indent=2) + "\n").encode())


def _refuse_other_names(weights: Mapping[str, Tensor], student: nn.Module) -> None:
    """Raise NotWritten unless the weights that were gathered are those that the student has."""
    expected = {plain_name(name) for name in student.state_dict()}
    if differing := sorted(expected ^ weights.keys()):
        raise NotWritten(
            f"the weights that were gathered are not the student's: {len(differing)} names differ, "
            f"first {differing[0]}. {STAYS}"
        )


def _prove(folder: Path, weights: Mapping[str, Tensor], trust_remote_code: bool) -> None:
    """Load a student as its user will; raise NotWritten unless its weights are these."""
    loaded, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=trust_remote_code,
    )
    found = loaded.state_dict()
    if absent := [*absent_weights(loading), *sorted(weights.keys() - found.keys())]:
        raise NotWritten(f"{folder}: {absent[0]} is not there when it is read back. {STAYS}")
    for name, value in weights.items():
        _refuse_another(found[name], value, f"{folder}: {name}")


def _prove_adapter(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise NotWritten unless an adapter's file holds what was trained, and there is something."""
    found = load_file(folder / "adapter_model.safetensors")
    expected = {adapter_file_name(name): value for name, value in weights.items()}
    if not found or found.keys() != expected.keys():
        raise NotWritten(
            f"{folder}: {len(found)} tensors of the adapter's {len(expected)} are there when it is "
            f"read back. {STAYS}"
        )
    for name, value in expected.items():
        _refuse_another(found[name], value, f"{folder}: {name}")


def _refuse_another(found: Tensor, expected: Tensor, where: str) -> None:
    """Raise NotWritten unless two tensors are equal, NaN to NaN, in the dtype of the second."""
    expected = expected.cpu()
    found = found.to(expected.dtype)
    if not ((found == expected) | ((found != found) & (expected != expected))).all():
        raise NotWritten(f"{where} is another when it is read back. {STAYS}")


def _complete(temporary: Path, target: Path, tokenizer: Any, card: str) -> None:
    """Put what comes with a model beside it, and publish the folder."""
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card)
    _give_usual_permissions(temporary, like=temporary / "README.md")
    publish(temporary, target)


def _give_usual_permissions(folder: Path, like: Path) -> None:
    """Weights come out readable by their owner alone, whatever the umask says."""
    mode = like.stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
