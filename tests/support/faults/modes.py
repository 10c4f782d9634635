"""The kinds of misfortune: which calls fail, with what, for how long."""

import dataclasses
import errno
from typing import Any

from tests.support.faults import KILL, READS, WRITES

NAMES = ("create", "rename", "link", "mkdir", "unlink")


@dataclasses.dataclass(frozen=True, slots=True)
class Mode:
    """A misfortune that strikes at some call."""

    kinds: tuple[str, ...]
    how: int
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


MODES = {
    "full disk": Mode(WRITES, errno.ENOSPC, {"lasting": True}),
    "full disk in a write": Mode(("write",), errno.ENOSPC, {"half": True}),
    "quota": Mode(WRITES, errno.EDQUOT),
    "broken disk": Mode((*WRITES, *READS), errno.EIO),
    "read-only disk": Mode(NAMES, errno.EROFS, {"lasting": True}),
    "no open file left": Mode(("open", "create"), errno.EMFILE),
}
KILLED = Mode((*WRITES, "unlink"), KILL)
