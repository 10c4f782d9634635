"""Cut a student out of a teacher by depth: some of its layers, everything else as it is.

The student is built from the teacher's configuration with fewer layers, and the weights are put
into it. It is then compared with the teacher layer by layer, as architectures make layers that
differ by rules of their own over the layer's number: what comes out otherwise is refused.
"""

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from decant.student_train.model.head import probing

log = logging.getLogger(__name__)

NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index", "index", "idx", "block_idx")
"""What modules call the number of their layer."""


def spread(there: int, keep: int) -> list[int]:
    """So many of the layers, at even distances, the first and the last among them."""
    if keep == 1:
        return [0]
    return [round(place * (there - 1) / (keep - 1)) for place in range(keep)]


def cut(teacher: PreTrainedModel, layers: list[int], keep: int) -> PreTrainedModel:
    """The student that has these layers, in this order, or `keep` of them at even distances.

    Raises ValueError for layers that the teacher does not have, and if no student of its
    architecture can be made of them.
    """
    name = type(teacher).__name__
    old = teacher.config.get_text_config()
    there = getattr(old, "num_hidden_layers", 0)
    kept = layers or spread(there, keep)
    if not set(kept) <= set(range(there)) or len(kept) > there:
        raise ValueError(
            f"student.from_teacher: {name} has layers 0 to {there - 1}, asked for "
            f"{layers or f'{keep} of them'}"
        )
    if getattr(teacher, "is_quantized", False):
        raise ValueError(
            "student.from_teacher: the teacher's weights are quantised; give the path of those "
            "before quantisation"
        )
    prefix = _layers_of(teacher, there)
    config = copy.deepcopy(teacher.config)
    _shorten(config.get_text_config(), there, kept)
    try:
        student = AutoModelForCausalLM.from_config(
            config, dtype=teacher.dtype, attn_implementation=teacher.config._attn_implementation
        )
    except Exception as error:  # whatever a configuration's own checks may raise
        raise ValueError(
            f"student.from_teacher: {name} cannot have {kept} alone: {error}"
        ) from error
    _refuse_unlike(teacher, student, prefix, kept)
    student.load_state_dict(_renamed(teacher.state_dict(), prefix, kept))
    student.tie_weights()
    _refuse_other_logits(teacher, student, prefix, kept)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    log.info(
        "cut layers %s of %d out of the teacher: %s of %s parameters",
        ", ".join(map(str, kept)),
        there,
        f"{student.num_parameters():,}",
        f"{teacher.num_parameters():,}",
    )
    return student


def _layers_of(teacher: PreTrainedModel, there: int) -> str:
    """The name of the list of layers, with a dot behind it. Raises ValueError unless it is one."""
    decoder = teacher.get_decoder()
    lists = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList) and len(module) == there
    ]
    if len(lists) != 1:
        raise ValueError(
            f"student.from_teacher: {type(teacher).__name__} has {len(lists)} lists of {there} "
            "layers where one is expected: cut it by hand, and give student.path"
        )
    (found,) = (name for name, module in teacher.named_modules() if module is lists[0])
    return f"{found}."


def _shorten(config: Any, there: int, kept: list[int]) -> None:
    """Leave what a configuration says of each of the layers that are kept."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == there and there > 1:
            setattr(config, name, [value[layer] for layer in kept])
    # Numbers of layers that are of another kind: they have other numbers now.
    for name in ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "global_attn_idx"):
        if isinstance(value := getattr(config, name, None), list):
            setattr(config, name, [new for new, layer in enumerate(kept) if layer in value])
    config.num_hidden_layers = len(kept)
    if isinstance(dense := getattr(config, "first_k_dense_replace", None), int):
        config.first_k_dense_replace = sum(layer < dense for layer in kept)


def _renamed(
    weights: dict[str, torch.Tensor], prefix: str, kept: list[int]
) -> dict[str, torch.Tensor]:
    """A teacher's weights under the names that the student has for them."""
    found = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    for new, layer in enumerate(kept):
        of_layer = f"{prefix}{layer}."
        for name, value in weights.items():
            if name.startswith(of_layer):
                found[f"{prefix}{new}.{name.removeprefix(of_layer)}"] = value
    return found


def _refuse_unlike(
    teacher: PreTrainedModel, student: PreTrainedModel, prefix: str, kept: list[int]
) -> None:
    """Raise ValueError unless each layer is, in all but its number, built as the teacher's is."""
    for new, layer in enumerate(kept):
        theirs, ours = (
            _plan(model.get_submodule(f"{prefix}{number}"))
            for model, number in ((teacher, layer), (student, new))
        )
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"student.from_teacher: layer {layer} of {type(teacher).__name__} would be "
                    f"another as layer {new}: {name} is {theirs.get(name)}, would be "
                    f"{ours.get(name)}. Choose other layers, at distances that keep its pattern"
                )


@torch.no_grad()
def _refuse_other_logits(
    teacher: PreTrainedModel, student: PreTrainedModel, prefix: str, kept: list[int]
) -> None:
    """Raise ValueError unless the student puts out what the teacher's own layers do in this order.

    Those still have their old numbers: a layer that reckons with its number shows. The teacher is
    of no use afterwards.
    """
    place, _, name = prefix.rstrip(".").rpartition(".")
    layers = teacher.get_submodule(prefix.rstrip("."))
    there = len(layers)
    setattr(teacher.get_submodule(place), name, nn.ModuleList(layers[layer] for layer in kept))
    _shorten(teacher.config.get_text_config(), there, kept)
    tokens = torch.arange(1, 9, device=student.device).unsqueeze(0)
    tokens %= student.config.get_text_config().vocab_size
    with probing(teacher), probing(student):
        try:
            expected = teacher(input_ids=tokens, use_cache=False).logits
        except (IndexError, KeyError, AttributeError) as error:
            log.info("%s cannot be asked with fewer layers: %s", type(teacher).__name__, error)
            return
        found = student(input_ids=tokens, use_cache=False).logits
    if not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"student.from_teacher: layers of {type(teacher).__name__} depend on their number: the "
            "student would put out other logits than they do. Cut it by hand, and give student.path"
        )


def _plan(layer: nn.Module) -> dict[str, Any]:
    """What a layer is made of: shapes of its tensors, plain values of its modules."""
    found: dict[str, Any] = {
        name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()
    }
    for place, module in layer.named_modules():
        found[f"{place} class"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and name not in NUMBERS:
                found[f"{place}.{name}".lstrip(".")] = value
    found = {name: value for name, value in found.items() if not name.endswith("training")}
    return found
