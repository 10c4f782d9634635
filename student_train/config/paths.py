"""Paths as people write them in YAML, where no shell has expanded them."""

import os
from typing import Any


def expand_home(config: Any, *names: str) -> None:
    """Replace a leading `~` in these fields of a frozen dataclass by the home directory.

    Raises ValueError if there is no such user.
    """
    for name in names:
        path = getattr(config, name)
        if path.startswith("~"):
            expanded = os.path.expanduser(path)
            if expanded.startswith("~"):
                raise ValueError(f"{name} {path}: there is no user of that name; give a full path")
            object.__setattr__(config, name, expanded)
