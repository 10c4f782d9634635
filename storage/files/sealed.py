"""JSON with a hash of itself."""

import json
from typing import Any

import xxhash

from decant.schemas.strict import canonical

SEAL = "checksum"
"""The field of a sealed JSON file that holds the xxh3_128 of all the others."""


def sealed(value: dict[str, Any]) -> bytes:
    """The bytes of a JSON file that holds these fields and their hash."""
    assert SEAL not in value
    whole = {**value, SEAL: xxhash.xxh3_128(canonical(value)).hexdigest()}
    return json.dumps(whole, indent=1, ensure_ascii=False).encode() + b"\n"
