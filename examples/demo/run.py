"""The whole loop on one machine: `make demo`, or `python examples/demo/run.py`.

Writes text, dumps the teacher's distributions over it, inspects and verifies the cache, then trains
one student by distillation and the same student for the same steps on plain cross-entropy, each at
its own best rate (`rates.py`). A seed draws the text that the students learn from, a megabyte that
no other seed has, their first weights, and the order of the data. Every phase is a process of its
own running the public commands, which are printed.
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
RATES = {"distilled": "2e-3", "cross-entropy": "2e-3"}
"""Learning rate of each student: of those of `rates.py`, the best on the validation text."""


def run(*arguments: object, python: str = sys.executable, capture: bool = False) -> str:
    """Run `python ...` beside the examples, showing the command."""
    command = [python, *map(str, arguments)]
    shown = [os.path.relpath(python, ROOT), *command[1:]]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    done = subprocess.run(
        command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    return done.stdout or ""


def dump(text: Path, cache: Path, engine: str) -> dict:
    """Dump a text and return what `decant inspect` says of the cache."""
    python = str(ROOT / ".venv-vllm/bin/python") if engine == "vllm" else sys.executable
    run(
        *("-m", "decant", "dump", "--config", DEMO / "dump.yaml"),
        *("--teacher.path", DEMO / "teacher", "--teacher.engine", engine),
        *("--output", cache, "--source.path", text),
        python=python,
    )
    run("-m", "decant", "verify", cache)
    return json.loads(run("-m", "decant", "inspect", cache, "--json", capture=True))


def train(name: str, rate: str, seed: int, cache: Path, heldout: Path, output: Path) -> dict:
    """Train one student and return its summary."""
    run(
        *("-m", "decant", "train", "--config", DEMO / "train.yaml", "--cache", cache),
        *("--eval.cache", heldout, "--output", output, "--seed", seed),
        *("--optimizer.lr", rate, *LOSSES[name]),
        capture=True,
    )
    return json.loads((ROOT / output / "summary.json").read_text())


def of_seed(seed: int, work: Path, engine: str) -> dict:
    """Draw a text, dump it, train both students; return the cache's and the students' figures."""
    folder = work / f"seed{seed}"
    run(DEMO / "corpus.py", "--out", folder, "--splits", "train", "--draw", seed)
    cache = folder / "cache-train"
    found = {"cache": dump(folder / "train.jsonl.zst", cache, engine)}
    for name in LOSSES:
        output = folder / f"student-{name}"
        found[name] = train(name, RATES[name], seed, cache, work / "cache-heldout", output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--keep", action="store_true", help="seeds that are finished stay so")
    args = parser.parse_args()
    started = time.monotonic()
    work = ROOT / args.work
    if not args.keep:
        shutil.rmtree(work, ignore_errors=True)
    run(DEMO / "corpus.py", "--out", args.work, "--splits", "heldout")
    heldout = dump(args.work / "heldout.jsonl.zst", args.work / "cache-heldout", args.engine)
    results = []
    for seed in args.seeds:
        finished = work / f"seed{seed}" / "figures.json"
        if not finished.exists():
            figures = of_seed(seed, args.work, args.engine)
            finished.write_text(json.dumps(figures))
        results.append(json.loads(finished.read_text()))
    print(report(heldout, results, time.monotonic() - started))


def report(heldout: dict, results: list[dict], seconds: float) -> str:
    """What a user wants to see."""
    cache = results[0]["cache"]
    mass = cache["temperatures"][0]["retained_mass"]
    peak = max(of_seed["distilled"]["peak_memory_mb"] for of_seed in results)

    def figures(name: str, figure: str) -> list[float]:
        return [of_seed[name][figure] for of_seed in results]

    def ahead(figure: str) -> list[float]:
        pair = (figures("cross-entropy", figure), figures("distilled", figure))
        return [theirs - ours for theirs, ours in zip(*pair, strict=True)]

    def spread(values: list[float]) -> str:
        text = f"{statistics.mean(values):.4f}"
        return text if len(values) == 1 else f"{text} +- {statistics.stdev(values):.4f}"

    rows = [
        ("teacher, held-out loss (nats per token)", f"{heldout['teacher_ce']:.4f}"),
        ("cache", f"{cache['targets']:,} targets, {cache['bytes'] / 1e6:.1f} MB"),
        ("cache, bytes per target", f"{cache['bytes_per_target']:.1f}"),
        ("cache, retained mass (mean, 5 %)", f"{mass['mean']:.4f}, {mass['p05']:.4f}"),
    ]
    for name, title in (("distilled", "distilled"), ("cross-entropy", "on cross-entropy")):
        rows += [
            (f"student {title}, held-out loss", spread(figures(name, "heldout_ce"))),
            ("    bits per byte", spread(figures(name, "heldout_bits_per_byte"))),
            ("    learning rate", RATES[name]),
        ]
    rows += [
        ("distillation is ahead by", f"{spread(ahead('heldout_ce'))} nats per token"),
        ("    in bits per byte", spread(ahead("heldout_bits_per_byte"))),
        ("seeds, each with a text of its own", str(len(results))),
        ("steps of each student", f"{results[0]['distilled']['steps']}"),
        ("student phase, peak memory", f"{peak:.0f} MB (no teacher in it)"),
        ("wall time", f"{seconds:.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    main()
