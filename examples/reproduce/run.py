"""All experiments of docs/reproduction.md, one after the other.

`python -m examples.reproduce.run --out build/reproduce`; the studies of the language model, which
take most of the time, are left out with --without-study and have options of their own.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ("akl_toy", "gaussians", "softmax_layer", "convergence", "calibration_toy")
OF_A_LANGUAGE_MODEL = ("study", "selection", "loss_order", "f_distill")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/reproduce"), help="for the plots")
    parser.add_argument("--fast", action="store_true", help="seconds each; other figures")
    parser.add_argument("--without-study", action="store_true")
    args = parser.parse_args()
    for name in EXPERIMENTS + (() if args.without_study else OF_A_LANGUAGE_MODEL):
        command = [sys.executable, "-m", f"examples.reproduce.{name}", "--out", str(args.out)]
        command += ["--fast"] if args.fast else []
        print(f"\n## {name}\n", flush=True)
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
