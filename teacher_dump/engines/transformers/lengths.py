"""What a model computes differently at different lengths, as its modules and configuration say.

Some models rotate positions by factors that follow from the longest sequence of a batch: LongRoPE
has one set of factors up to a length and another beyond it, dynamic NTK scaling a set for every
length beyond. Sequences of one group may share a batch; a sequence and its continuation in another
group may not share keys and values.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

BOUNDARY = re.compile(r"window|chunk|block_size|original_max|seq_length|context_len|local_att")
"""Integers of a configuration under such names are lengths at which attention may change."""


class LengthGroups:
    """The groups of lengths of a loaded model."""

    def __init__(self, model: nn.Module) -> None:
        """Read the rotary embeddings of the model; `model.config` is a transformers config."""
        self._switches: set[int] = set()
        self._dynamic_from: int | None = None
        self._dynamic: list[tuple[nn.Module, str]] = []
        for module in model.modules():
            kinds = getattr(module, "rope_type", None)
            by_layer = kinds.items() if isinstance(kinds, dict) else [("", kinds)]
            for layer_type, kind in by_layer:
                if kind == "longrope":
                    self._switches.add(_original_length(module, layer_type))
                elif isinstance(kind, str) and "dynamic" in kind:
                    length = int(module.original_max_seq_len)  # type: ignore[arg-type]
                    self._dynamic_from = min(length, self._dynamic_from or length)
                    self._dynamic.append((module, f"{layer_type}_" if layer_type else ""))
        settings = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.boundaries = sorted({*_boundaries(settings.to_dict()), *self._lengths()})
        """Lengths beyond which the model may compute something else."""

    def group(self, length: int) -> tuple[int, int]:
        """Sequences whose lengths have the same group may share a batch."""
        dynamic = self._dynamic_from is not None and length > self._dynamic_from
        return sum(length > switch for switch in self._switches), length if dynamic else 0

    def end(self, length: int) -> int | None:
        """The greatest length of the same group; None if there is none."""
        if self._dynamic_from is not None and length > self._dynamic_from:
            return length
        return min((end for end in self._lengths() if end >= length), default=None)

    def start(self, length: int) -> int:
        """The least length of the same group."""
        if self._dynamic_from is not None and length > self._dynamic_from:
            return length
        return max((end + 1 for end in self._lengths() if end < length), default=1)

    def forget(self) -> None:
        """Take back what earlier batches left in the model, before a batch of any group.

        Dynamic scaling keeps the factors of the longest sequence that it has seen.
        """
        for module, prefix in self._dynamic:
            original = getattr(module, f"{prefix}original_inv_freq")
            current = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.to(current.device), False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)

    def _lengths(self) -> set[int]:
        dynamic = set() if self._dynamic_from is None else {self._dynamic_from}
        return self._switches | dynamic


def _original_length(module: nn.Module, layer_type: str) -> int:
    parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
    parameters = parameters[layer_type] if layer_type else parameters
    return int(parameters["original_max_position_embeddings"])


def _boundaries(settings: dict[str, Any]) -> Iterator[int]:
    """Every length of a configuration, at any depth."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _boundaries(value)
        elif BOUNDARY.search(str(name)):
            found = value if isinstance(value, list | tuple) else [value]
            yield from (
                n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 1
            )
