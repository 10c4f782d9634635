"""f-DISTILL (arXiv 2307.15190): its four divergences, baselines, risks and offline samples.

    python -m examples.reproduce.f_distill --seeds 3
    python -m examples.reproduce.f_distill --work build/f-distill-real --seeds 1 --rate 1e-4 \
        --teacher build/real/teacher --student build/real/student-run/student \
        --prompts examples/real/prompts-train.jsonl --heldout examples/real/prompts-heldout.jsonl \
        --variants kl rkl tvd --steps 12 --batch-size 8 --tokens 40 --samples 2 --without-speed

Without --prompts, prompts and their continuations are windows of the demo's text, of other files
for each seed, and the student is the demo's teacher cut to two of five layers and taught by the
data. All variants begin from that student and take equally many steps:

mle, seqkd    cross-entropy on the data, and on the teacher's samples
kl-data, kl   forward KL on the prefixes of the data, and of the teacher's samples
rkl           reverse KL on the student's samples
js, tvd       half of each; on twice as many samples
kl-anew       kl on about as many samples of each prompt as kl passes its one
rkl-rounds    rkl by `decant rounds`, which answers each prompt once, a part of them in each round

The rate of each is the one, of a grid that follows its best, at which it makes its own objective
smallest on validation prompts; --rate gives one to all. Every finished run is a line of
`runs.jsonl`, which a rerun skips: the same command goes on.
"""

import argparse
import json
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from examples.reproduce.common import arguments
from examples.reproduce.f_distill_bench import RATE_OF, VARIANTS, Bench, Run
from examples.reproduce.f_distill_report import badness, report

GRID = (2.5e-4, 5e-4, 1e-3)
LIMITS = (5e-5, 5e-3)
OF_DATA = ("mle", "kl-data")


class Runs:
    """`runs.jsonl`: what is finished, and what is run now."""

    def __init__(self, bench: Bench, path: Path) -> None:
        self.bench, self.path = bench, path
        text = path.read_text() if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def line(self, run: Run) -> dict[str, Any]:
        """A run's line, run now if it is not there."""
        wanted = asdict(run)
        found = next((x for x in self.lines if wanted.items() <= x.items()), None)
        if found is None:
            found = self.bench.measured(run)
            self.add(found)
            risks = f"{found['likelihood_risk']:.3f} / {found['coverage_risk']:.3f}"
            print(f"{time.strftime('%H:%M:%S')} {run.name}: risks {risks} in {found['cpu_s']} s",
                  flush=True)  # fmt: skip
        return found

    def add(self, line: dict[str, Any]) -> None:
        """Keep a finished line."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def rate(runs: Runs, variant: str, until: float) -> float | None:
    """The rate at which a variant is best by its own lights; None when the time is up."""
    args = runs.bench.args
    if args.rate:
        return float(args.rate)
    variant, tried = RATE_OF.get(variant, variant), {}
    wanted = list(GRID)
    while wanted:
        for one in wanted:
            run = Run(variant=variant, rate=one, steps=args.steps, seed=-1)
            if time.monotonic() > until:
                return None
            tried[one] = badness(runs.line(run))
        best = min(tried, key=tried.__getitem__)
        further = {min(tried): min(tried) / 2, max(tried): max(tried) * 2}.get(best, 0.0)
        wanted = [further] if LIMITS[0] <= further <= LIMITS[1] else []
    return best


def fill(runs: Runs, args: argparse.Namespace) -> bool:
    """Run what is missing, every variant with the first seed, then with the next; whether all is.

    The warm student is measured once, as the variant `warm`, and so is what samples cost.
    """
    until = time.monotonic() + 60 * args.minutes
    if not args.without_speed and not any(x["variant"] == "speed" for x in runs.lines):
        runs.add({"variant": "speed", "seed": 0, "rate": 0.0} | runs.bench.speed())
    if not any(x["variant"] == "warm" for x in runs.lines):
        folder = runs.bench.work / "runs/warm"
        found = runs.bench.figures(runs.bench.warm(), folder, "heldout")
        runs.add({"variant": "warm", "seed": 0, "rate": 0.0, "steps": 0} | found)
    for seed in range(args.seeds):
        for variant in args.variants:
            if variant in OF_DATA and not runs.bench.has_data:
                continue
            chosen = rate(runs, variant, until)
            if chosen is None or time.monotonic() > until:
                return False
            runs.line(Run(variant=variant, rate=chosen, steps=args.steps, seed=seed))
    return True


def parsed() -> argparse.Namespace:
    """The options; --fast makes all of it tiny."""
    parser = arguments(__doc__, "f_distill")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--work", type=Path, default=Path("build/f-distill"))
    parser.add_argument("--teacher", default="", help="a model's directory; the demo's")
    parser.add_argument("--student", default="", help="a warm student of the same tokenizer")
    parser.add_argument("--prompts", default="", help="records to answer, in place of the demo's")
    parser.add_argument("--heldout", default="", help="other prompts, to measure by")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.0, help="untuned, of all variants")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of a step")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--max-length", type=int, default=128, help="prompt and answer")
    parser.add_argument("--num-prompts", type=int, default=384, help="of the demo's text")
    parser.add_argument("--heldout-prompts", type=int, default=192, help="of the demo's text")
    parser.add_argument("--samples", type=int, default=1, help="answers per held-out prompt")
    parser.add_argument("--k", type=int, default=64, help="kept ids of a target")
    parser.add_argument("--warm-steps", type=int, default=300)
    parser.add_argument("--without-speed", action="store_true", help="measure no times")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--report", action="store_true", help="tables and plot of what there is")
    args = parser.parse_args()
    if bool(args.prompts) != bool(args.heldout):
        parser.error("--prompts and --heldout belong together: give both, or neither")
    if args.prompts and not (args.teacher and args.student and args.rate):
        parser.error("--prompts needs --teacher, a warm --student of it, and a --rate")
    if args.prompts:
        args.num_prompts = len(Path(args.prompts).read_text().splitlines())
    if args.steps % args.rounds:
        parser.error(f"--steps {args.steps} are not a multiple of --rounds {args.rounds}")
    if args.fast:
        args.steps, args.rounds, args.batch_size, args.warm_steps, args.seeds = 2, 2, 2, 2, 1
        args.tokens, args.num_prompts, args.heldout_prompts, args.rate = 8, 8, 4, 1e-4
    return args


def main() -> None:
    args = parsed()
    logging.disable(logging.INFO)
    transformers_logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    runs = Runs(Bench(args.work.resolve(), args), args.work / "runs.jsonl")
    finished = args.report or fill(runs, args)
    print(report(runs.lines, args))
    if not finished:
        print(f"\nstopped after {args.minutes:g} minutes: the same command goes on")


if __name__ == "__main__":
    main()
