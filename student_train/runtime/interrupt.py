"""Ctrl-C and SIGTERM end training between two steps, on all processes at the same one."""

import signal
from typing import Any

import torch
from accelerate import Accelerator


class Interrupt:
    """Catches both signals while it is entered."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: whoever runs us handles signals
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def anywhere(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all of them have to call it."""
        if accelerator.num_processes == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item())
