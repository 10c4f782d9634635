"""Where links lead: inside a folder, or into the store of a hub's snapshot that the folder is."""

import os
from pathlib import PurePath

KINDS = ("datasets--", "models--")
"""How the hub's client names the folder of a repository."""
SNAPSHOTS, BLOBS = "snapshots", "blobs"


def leads_out(path: str, folder: str) -> str:
    """Where a path leads, if that is outside of a folder; "" if it is inside.

    The client of the hub keeps a repository as REPOSITORY/snapshots/REVISION, full of links to
    REPOSITORY/blobs: a folder of that form has those files inside.
    """
    place, root = os.path.realpath(path), os.path.realpath(folder or "/")
    roots = [root]
    if blobs := blobs_of(root):
        roots.append(blobs)
    inside = any(os.path.commonpath([place, allowed]) == allowed for allowed in roots)
    return "" if inside else place


def blobs_of(folder: str) -> str:
    """The files that a snapshot of the hub's client links to; "" if the folder is in none."""
    parts = PurePath(folder).parts
    for at in range(len(parts) - 2, 0, -1):
        if parts[at] == SNAPSHOTS and parts[at - 1].startswith(KINDS):
            repository = os.path.join(*parts[:at])
            blobs = os.path.join(repository, BLOBS)
            # A link in its place would lead anywhere.
            return blobs if os.path.isdir(blobs) and os.path.realpath(blobs) == blobs else ""
    return ""
