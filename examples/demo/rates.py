"""Which learning rate each student of the demo is best at: `make demo-rates`.

Trains the demo's two students at every rate of a grid and measures them on the validation text,
modules that neither the students learn from nor the claim is measured on. Every finished run is a
line of `rates.jsonl`, which a rerun skips; the rates of `run.py` are those it ends with.
"""

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path

from run import DEMO, LOSSES, ROOT, dump, run, train

GRID = ("2e-3", "1e-3", "4e-3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", nargs="+", default=GRID)
    parser.add_argument("--work", type=Path, default=Path("build/demo-rates"))
    args = parser.parse_args()
    validation = args.work / "cache-validation"
    run(DEMO / "corpus.py", "--out", args.work, "--splits", "validation")
    dump(args.work / "validation.jsonl.zst", validation, "transformers")
    log = ROOT / args.work / "rates.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for seed in args.seeds:
        folder = args.work / f"seed{seed}"
        cache = folder / "cache-train"
        run(DEMO / "corpus.py", "--out", folder, "--splits", "train", "--draw", seed)
        dump(folder / "train.jsonl.zst", cache, "transformers")
        done = [(line["seed"], line["rate"], line["student"]) for line in lines]
        for rate in args.rates:
            for name in LOSSES:
                if (seed, rate, name) in done:
                    continue
                output = folder / f"student-{name}-{rate}"
                shutil.rmtree(ROOT / output, ignore_errors=True)
                summary = train(name, rate, seed, cache, validation, output)
                lines.append(
                    {
                        **{"seed": seed, "rate": rate, "student": name},
                        "ce": summary["heldout_ce"],
                        "bits_per_byte": summary["heldout_bits_per_byte"],
                    }
                )
                with log.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    print(report(lines))


def report(lines: list[dict]) -> str:
    """Mean validation loss of each student at each rate, and the rate where it is lowest."""
    rates = sorted({line["rate"] for line in lines}, key=float)
    shown = [
        f"{'validation loss (nats)':<24}" + "".join(f"{rate:>10}" for rate in rates) + "  best"
    ]
    for name in LOSSES:
        means = []
        for rate in rates:
            of_rate = [x["ce"] for x in lines if (x["student"], x["rate"]) == (name, rate)]
            means.append(statistics.mean(of_rate) if of_rate else math.inf)
        best = rates[means.index(min(means))]
        shown.append(f"{name:<24}" + "".join(f"{mean:>10.4f}" for mean in means) + f"  {best}")
    return "\n" + "\n".join(shown)


if __name__ == "__main__":
    main()
