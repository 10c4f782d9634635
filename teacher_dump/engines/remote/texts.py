"""What comes over a network, made safe to read and to show: JSON of any depth, text of any kind."""

import json
from typing import Any, TypeVar

from decant.schemas import from_json
from decant.storage.cli.terminal import escaped

T = TypeVar("T")

SHOWN_CHARACTERS = 300


def parsed(data: bytes | str, *, finite: bool = True) -> Any:
    """JSON. Raises ValueError, also for what is nested too deeply and, if `finite`, for NaN."""
    try:
        return json.loads(data, parse_constant=_refuse if finite else None)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def dataclass_from(cls: type[T], data: Any, where: str) -> T:
    """`schemas.from_json` of what a stranger sent. Raises ValueError, whatever it is."""
    try:
        return from_json(cls, data, where)
    except OverflowError as error:
        raise ValueError(f"{where}: a number too large") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply") from error


def shown(value: object) -> str:
    """For a message: one line that a terminal only prints, cut where it gets long."""
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    except RecursionError:
        return "something nested too deeply"
    cut = text[: SHOWN_CHARACTERS + 1]
    line = escaped(cut[:SHOWN_CHARACTERS])
    return line if len(cut) <= SHOWN_CHARACTERS else f"{line}..."


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")
