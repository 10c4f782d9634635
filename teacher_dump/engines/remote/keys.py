"""API keys: read from the environment, never stored or logged."""

import os

from decant.teacher_dump.engines.seam import EngineError


def key_from(variable: str, option: str) -> str:
    """The API key in an environment variable, which `option` names; "" if none is named.

    Raises EngineError, never with the key.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise EngineError(f"{option}: ${variable} is not set or empty")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise EngineError(f"{option}: ${variable} must be printable ASCII without spaces")
    return key
