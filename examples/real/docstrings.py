"""The example's text: docstrings of the Python standard library, English that every machine has.

One record is one docstring. The split is by top-level module (`asyncio`, `json`, ...) and depends
on the name alone, so that no module has text on both sides. The library's own tests are left out,
as they are not installed everywhere.
"""

import argparse
import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from decant.storage.files.durable import publish_bytes

MIN_CHARACTERS = 500  # shorter ones are often a signature and half a sentence
HELDOUT_SHARE = 8  # one top-level module in this many is held out
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield (`path:name`, docstring) of everything documented at some length, each text once."""
    root, seen = Path(sysconfig.get_path("stdlib")), set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates and samples
            continue
        for node in ast.walk(tree):
            if not isinstance(node, DOCUMENTED):
                continue
            text = ast.get_docstring(node) or ""
            if len(text) >= MIN_CHARACTERS and text not in seen:
                seen.add(text)
                yield f"{'/'.join(parts)}:{getattr(node, 'name', '')}", text


def is_heldout(name: str) -> bool:
    """Whether a docstring is held out: a pure function of its top-level module."""
    module = name.split(":")[0].split("/")[0].removesuffix(".py")
    return _hash(module) % HELDOUT_SHARE == 0


def write(path: Path, heldout: bool, limit: int) -> int:
    """Write `limit` records of `id` and `text`, or all there are; returns their number.

    They are taken in the order of a hash of their names, so that the first are a fair sample.
    """
    chosen = [(name, text) for name, text in docstrings() if is_heldout(name) == heldout]
    chosen = sorted(chosen, key=lambda pair: (_hash(pair[0]), pair[1]))[:limit]
    lines = []
    for number, (name, text) in enumerate(chosen):
        lines.append(json.dumps({"id": f"{number}-{name}", "text": text}, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(path, ("\n".join(lines) + "\n").encode())
    return len(chosen)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--train", type=int, default=240, help="records at most")
    parser.add_argument("--heldout", type=int, default=40, help="records at most")
    args = parser.parse_args()
    for name, heldout, limit in (("train", False, args.train), ("heldout", True, args.heldout)):
        path = args.out / f"text-{name}.jsonl"
        print(f"{path}: {write(path, heldout, limit)} docstrings")


if __name__ == "__main__":
    main()
