"""Where Python looks for modules while one of our commands runs. Imports nothing of ours."""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
"""The folder that holds this package."""


def leave_out_working_directory() -> None:
    """Take the working directory off `sys.path`, here and in the Python processes we start.

    `python -m` puts it first, and then a user's own `datasets.py` is what a library imports as
    `datasets`. It stays where it holds this package: the code is used from its folder.
    """
    here = os.getcwd()
    if os.path.realpath(here) == str(FOLDER):
        return
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.path and not sys.flags.safe_path and sys.path[0] in ("", here):
        del sys.path[0]
