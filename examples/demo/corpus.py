"""The demo's text: the sources of the Python standard library, which every machine has.

One document is one file. The split is by top-level module (`asyncio`, `json`, ...) and depends on
the name alone, so held-out text stays held out on every Python version: some modules to train on,
some to choose by (validation), some to measure on (heldout). Tables of character encodings,
generated data and the library's own tests (not installed everywhere) are left out.
"""

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import zstandard

from decant.storage.files.durable import publish

SHARE = 16  # one top-level module in this many is held out, and one is for validation
SPLITS = ("train", "validation", "heldout")
LEFT_OUT = {"encodings", "pydoc_data", "site-packages", "dist-packages", "lib2to3", "this.py"}
TESTS = {"test", "tests", "idle_test"}


def split_of(module: str) -> str:
    """The split of a top-level module: a pure function of its name."""
    digest = hashlib.sha256(module.encode()).digest()
    return {0: "heldout", 1: "validation"}.get(int.from_bytes(digest[:4], "big") % SHARE, "train")


def documents(*splits: str) -> Iterator[tuple[str, str]]:
    """Yield (path in the library, text) of some of SPLITS, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if (LEFT_OUT | TESTS).intersection(parts):
            continue
        if split_of(parts[0].removesuffix(".py")) not in splits:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            yield "/".join(parts), text


def drawn(split: str, max_bytes: int, draw: int = 0) -> list[tuple[str, str]]:
    """Documents of one split: the draw-th of its parts of `max_bytes` of text.

    Files are taken in the order of a hash of their name, so a part is a fair sample, and no file is
    in two of them. Raises ValueError where the text ends before a draw after the first is full.
    """
    ordered = sorted(documents(split), key=lambda doc: hashlib.sha256(doc[0].encode()).digest())
    part, taken = 0, 0
    chosen = []
    for name, text in ordered:
        if taken >= max_bytes:
            part, taken = part + 1, 0
        if part > draw:
            break
        if part == draw:
            chosen.append((name, text))
        taken += len(text.encode())
    if draw and (part < draw or (part == draw and taken < max_bytes)):
        raise ValueError(
            f"the text of {split} has no whole draw {draw} of {max_bytes:,} bytes: it has {part}"
        )
    return chosen


def write(split: str, target: Path, max_bytes: int, draw: int = 0) -> int:
    """Write a draw as `.jsonl.zst` records of `id` and `text`; return its bytes of text."""
    written = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    with zstandard.open(temporary, "wt", encoding="utf-8") as out:
        for name, text in drawn(split, max_bytes, draw):
            out.write(json.dumps({"id": name, "text": text}) + "\n")
            written += len(text.encode())
    publish(temporary, target)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the files")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=["train", "heldout"])
    parser.add_argument("--draw", type=int, default=0, help="which part of the training text")
    parser.add_argument("--train-bytes", type=int, default=1_000_000)
    parser.add_argument("--heldout-bytes", type=int, default=200_000, help="validation: as many")
    args = parser.parse_args()
    for split in args.splits:
        limit, draw = (args.train_bytes, args.draw) if split == "train" else (args.heldout_bytes, 0)
        path = args.out / f"{split}.jsonl.zst"
        try:
            written = write(split, path, limit, draw)
        except ValueError as error:
            parser.error(str(error))
        print(f"{path}: {written:,} bytes of text")


if __name__ == "__main__":
    main()
