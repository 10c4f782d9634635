"""The demo's text: the sources of the Python standard library, which every machine has.

One document is one file. The split is by top-level module (`asyncio`, `json`, ...) and depends on
the name alone, so held-out text stays held out on every Python version. Tables of character
encodings, generated data and the library's own tests (not installed everywhere) are left out.
"""

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import zstandard

from decant.storage.files.durable import publish

HELDOUT_SHARE = 16  # one top-level module in this many is held out
LEFT_OUT = {"encodings", "pydoc_data", "site-packages", "dist-packages", "lib2to3", "this.py"}
TESTS = {"test", "tests", "idle_test"}


def is_heldout(module: str) -> bool:
    """Whether a top-level module belongs to the held-out text: a pure function of its name."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELDOUT_SHARE == 0


def documents(split: str) -> Iterator[tuple[str, str]]:
    """Yield (path in the library, text) of one split, "train" or "heldout", in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if (LEFT_OUT | TESTS).intersection(parts):
            continue
        if is_heldout(parts[0].removesuffix(".py")) != (split == "heldout"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            yield "/".join(parts), text


def write(split: str, target: Path, max_bytes: int) -> int:
    """Write one split as `.jsonl.zst` records of `id` and `text`; stop after `max_bytes` of text.

    Files are taken in the order of a hash of their name, so a prefix is a fair sample.
    """
    ordered = sorted(documents(split), key=lambda doc: hashlib.sha256(doc[0].encode()).digest())
    written = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    with zstandard.open(temporary, "wt", encoding="utf-8") as out:
        for name, text in ordered:
            if written >= max_bytes:
                break
            out.write(json.dumps({"id": name, "text": text}) + "\n")
            written += len(text.encode())
    publish(temporary, target)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the two files")
    parser.add_argument("--train-bytes", type=int, default=1_000_000)
    parser.add_argument("--heldout-bytes", type=int, default=200_000)
    args = parser.parse_args()
    for split, limit in (("train", args.train_bytes), ("heldout", args.heldout_bytes)):
        path = args.out / f"{split}.jsonl.zst"
        print(f"{path}: {write(split, path, limit):,} bytes of text")


if __name__ == "__main__":
    main()
