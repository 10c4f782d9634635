"""The whole loop on one machine: `make demo`, or `python examples/demo/run.py`.

Writes text, dumps the teacher's distributions over it, inspects and verifies the cache, then trains
one student by distillation and the same student for the same steps on plain cross-entropy. Every
phase is a process of its own running the public commands, which are printed.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEMO = HERE.relative_to(ROOT)
LOSSES = {
    "distilled": [],
    "cross-entropy": ["--loss.kd_weight", "0", "--loss.ce_weight", "1"],
}


def run(*arguments: object, python: str = sys.executable, capture: bool = False) -> str:
    """Run `python ...` beside the examples, showing the command."""
    command = [python, *map(str, arguments)]
    shown = [os.path.relpath(python, ROOT), *command[1:]]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    done = subprocess.run(
        command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    return done.stdout or ""


def dump(split: str, work: Path, engine: str) -> dict:
    """Dump one split and return what `decant inspect` says of the cache."""
    python = str(ROOT / ".venv-vllm/bin/python") if engine == "vllm" else sys.executable
    cache = work / f"cache-{split}"
    run(
        *(
            "-m",
            "decant",
            "dump",
            "--config",
            DEMO / "dump.yaml",
            "--teacher.path",
            DEMO / "teacher",
        ),
        *("--output", cache, "--source.path", work / f"{split}.jsonl.zst"),
        *("--teacher.engine", engine),
        python=python,
    )
    run("-m", "decant", "verify", cache)
    return json.loads(run("-m", "decant", "inspect", cache, "--json", capture=True))


def train(name: str, seed: int, work: Path, extra: list[str]) -> dict:
    """Train one student and return its summary."""
    output = work / f"student-{name}-seed{seed}"
    run(
        *("-m", "decant", "train", "--config", DEMO / "train.yaml"),
        *("--cache", work / "cache-train", "--eval.cache", work / "cache-heldout"),
        *("--output", output, "--seed", seed, *extra),
        capture=True,
    )
    return json.loads((output / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    args = parser.parse_args()
    started = time.monotonic()
    shutil.rmtree(ROOT / args.work, ignore_errors=True)
    run(DEMO / "corpus.py", "--out", args.work)
    cache = dump("train", args.work, args.engine)
    heldout = dump("heldout", args.work, args.engine)
    results = {
        name: [train(name, seed, args.work, extra) for seed in args.seeds]
        for name, extra in LOSSES.items()
    }
    print(report(cache, heldout, results, time.monotonic() - started))


def report(cache: dict, heldout: dict, results: dict[str, list[dict]], seconds: float) -> str:
    """What a user wants to see."""
    losses = {name: [r["heldout_ce"] for r in runs] for name, runs in results.items()}
    gain = [b - a for a, b in zip(losses["distilled"], losses["cross-entropy"], strict=True)]
    mass = cache["temperatures"][0]["retained_mass"]
    peak = max(r["peak_memory_mb"] for r in results["distilled"])

    def spread(values: list[float]) -> str:
        text = f"{statistics.mean(values):.4f}"
        return text if len(values) == 1 else f"{text} +- {statistics.stdev(values):.4f}"

    rows = [
        ("teacher, held-out loss (nats per token)", f"{heldout['teacher_ce']:.4f}"),
        ("cache", f"{cache['targets']:,} targets, {cache['bytes'] / 1e6:.1f} MB"),
        ("cache, bytes per target", f"{cache['bytes_per_target']:.1f}"),
        ("cache, retained mass (mean, 5 %)", f"{mass['mean']:.4f}, {mass['p05']:.4f}"),
        ("student distilled, held-out loss", spread(losses["distilled"])),
        ("student on cross-entropy, held-out loss", spread(losses["cross-entropy"])),
        ("distillation is ahead by", f"{spread(gain)} nats, {len(gain)} seed(s)"),
        ("steps of each student", f"{results['distilled'][0]['steps']}"),
        ("student phase, peak memory", f"{peak:.0f} MB (no teacher in it)"),
        ("wall time", f"{seconds:.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    main()
