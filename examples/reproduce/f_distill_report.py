"""Tables and plot of `f_distill.py`, from its runs alone, next to the paper's figures.

Differences are of pairs: the same seed, so the same prompts. A claim holds where the difference has
the claimed sign with every seed, fails where it has it with none, and is open otherwise; an
equality holds where the difference has both signs. One seed leaves all of them open.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt

from examples.reproduce.common import save, table

PAPER: dict[str, dict[str, float]] = {
    "DART, BLEU4": {
        **{"mle": 43.12, "seqkd": 45.54, "engine": 44.40},
        **{"kl": 46.24, "rkl": 45.63, "js": 46.85, "tvd": 46.95},
    },
    "XSum, ROUGE-L": {"kl": 33.71, "rkl": 33.92, "js": 34.03, "tvd": 34.10},
    "dialogue, likelihood risk": {"kl": 0.43, "rkl": 0.29},
    "DART, likelihood risk": {"kl": 0.56, "rkl": 0.58},
    "dialogue, coverage risk": {"kl": 0.26, "rkl": 0.35},
    "DART, coverage risk": {"kl": 0.49, "rkl": 0.59},
}
"""arXiv 2307.15190's own figures, to stand beside ours; nothing here is computed from them."""
PAPER_SPEED = 2.25
"""Times as fast with teacher samples that were drawn before, at equal quality, in the paper."""
NAMES = {
    "likelihood_risk": "likelihood risk",
    "coverage_risk": "coverage risk",
    "sequence_kl": "KL(p‖q)",
    "sequence_rkl": "KL(q‖p)",
    "acceptance": "Σ min(p, q)",
    "ce": "CE of data",
    "kl_forward": "KL(p‖q), data",
    "kl_reverse": "KL(q‖p), data",
    "rouge_l": "ROUGE-L, teacher",
    "rouge_l_data": "ROUGE-L, data",
    "distinct_2": "distinct-2",
}
OBJECTIVE = {
    "mle": ("ce",),
    "seqkd": ("coverage_risk",),
    "kl-data": ("kl_forward",),
    "kl": ("sequence_kl",),
    "rkl": ("sequence_rkl",),
    "js": ("sequence_kl", "sequence_rkl"),
    "tvd": ("sequence_kl", "sequence_rkl"),
}
"""What a rate is chosen by: what the variant minimises; of the symmetric ones, of which samples
say nothing directly, the sum of both KLs."""
QUALITY = ("rouge_l", "rouge_l_data")
BEATS = (
    *(("seqkd", "mle"), ("kl", "seqkd"), ("rkl", "seqkd"), ("kl", "rkl"), ("rkl", "kl")),
    *(("js", "kl"), ("js", "rkl"), ("tvd", "kl"), ("tvd", "rkl"), ("tvd", "js")),
)
"""Orderings of quality that the paper may claim: only those that its figures have are shown."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`a` has a larger (sign 1) or smaller (sign -1) figure than `b`, or an equal one (0)."""

    a: str
    b: str
    figure: str
    sign: int
    said_by: str
    """What the paper says; "" of comparisons of our own."""


def claims() -> list[Claim]:
    """What is compared: first the paper's orderings, then our own questions."""
    found = []
    for a, b in BEATS:
        said = [said_of(what, a, b) for what, its in PAPER.items() if "risk" not in what
                if a in its and b in its and its[a] > its[b]]  # fmt: skip
        if said:
            found += [
                Claim(a=a, b=b, figure=name, sign=1, said_by="; ".join(said)) for name in QUALITY
            ]
    for kind, sign in (("likelihood", -1), ("coverage", 1)):
        said = [said_of(what, "rkl", "kl") for what in PAPER if f"{kind} risk" in what]
        name = f"{kind}_risk"
        found.append(Claim(a="rkl", b="kl", figure=name, sign=sign, said_by="; ".join(said)))
    for a, b in (("kl", "kl-data"), ("rkl-rounds", "rkl")):
        for name in ("coverage_risk", "likelihood_risk", "sequence_kl", "sequence_rkl"):
            found.append(Claim(a=a, b=b, figure=name, sign=-1, said_by=""))
    found += [
        Claim(a="kl", b="kl-anew", figure=name, sign=0, said_by="equal quality" * (name in QUALITY))
        for name in ("rouge_l", "coverage_risk", "sequence_kl")
    ]
    return found


def said_of(what: str, a: str, b: str) -> str:
    """The paper's two figures."""
    its = PAPER[what]
    return f"{what} {its[a]:g} against {its[b]:g}"


def badness(line: dict[str, Any]) -> float:
    """What a variant's rate is to make small, of a run on validation prompts."""
    return float(sum(line[name] for name in OBJECTIVE[line["variant"]]))


def of_seeds(lines: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Variant -> seed -> run, in the order in which they were first run; no runs for rates."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if line["variant"] != "speed" and line["seed"] >= 0:
            found.setdefault(line["variant"], {})[line["seed"]] = line
    return found


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation over seeds."""
    mean = f"{statistics.mean(values):{sign}.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def differences(runs: dict[str, dict[int, dict[str, Any]]], claim: Claim) -> list[float]:
    """`a` minus `b` with every seed that both have."""
    ours, theirs = runs.get(claim.a, {}), runs.get(claim.b, {})
    both = sorted(set(ours) & set(theirs))
    pairs = [(ours[seed].get(claim.figure), theirs[seed].get(claim.figure)) for seed in both]
    return [a - b for a, b in pairs if a is not None and b is not None]


def verdict(gaps: Sequence[float], sign: int) -> str:
    """Whether a difference of that sign was found."""
    if sign == 0:
        ahead = sum(gap > 0 for gap in gaps)
        said = "open" if len(gaps) < 2 else "no" if ahead in (0, len(gaps)) else "yes"
        return f"{said}, {ahead} of {len(gaps)} above"
    if len(gaps) < 2:
        return "open, it does" if sign * gaps[0] > 0 else "open, it does not"
    agree = sum(sign * gap > 0 for gap in gaps)
    said = "yes" if agree == len(gaps) else "open" if agree else "no"
    return f"{said}, {agree} of {len(gaps)}"


def report(lines: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """The tables; writes the plot."""
    runs = of_seeds(lines)
    if not runs:
        return "no run is finished"
    shown = [name for name in NAMES if any(x.get(name) is not None for x in lines)]
    rows: list[list[object]] = []
    for variant, by_seed in runs.items():
        its = list(by_seed.values())
        cells = [spread([x[name] for x in its]) for name in shown]
        scored = round(statistics.mean(x.get("scored", 0) for x in its))
        rows.append([variant, len(its), f"{its[-1]['rate']:g}", f"{scored:,}", *cells])
    header = ["variant", "seeds", "rate", "scored targets", *[NAMES[name] for name in shown]]
    parts = [table(header, rows), "a minus b, of the same seed; yes: with every seed, of several"]
    compared: list[list[object]] = []
    for claim in claims():
        gaps = differences(runs, claim)
        if gaps:
            word = {1: "larger", -1: "smaller", 0: "equal"}[claim.sign]
            compared.append([
                f"{claim.a}, {claim.b}", f"{NAMES[claim.figure]}: {word}", claim.said_by or "-",
                spread(gaps, "+"), verdict(gaps, claim.sign),
            ])  # fmt: skip
    if compared:
        header = ["a, b", "claim", "the paper", "a - b", "holds, seeds"]
        parts.append(table(header, compared))
    parts += [speed_text(line, lines) for line in lines if line["variant"] == "speed"]
    plot(runs, args)
    return "\n\n".join(parts)


def speed_text(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """Training from stored samples against answering and scoring before each step."""
    rows: list[list[object]] = []
    train_s = line["train_s"]
    for whose in ("teacher", "student"):
        anew = line[f"{whose}_s"]
        times = [train_s, anew, (train_s + anew) / train_s]
        rows.append([whose, *[f"{1e3 * value:.1f}" for value in times[:2]], f"{times[2]:.2f}"])
    header = ["who answers", "training, CPU ms a sequence", "answering and scoring", "times faster"]
    text = (
        f"stored samples against samples anew for each step; the paper: {PAPER_SPEED:g} times\n\n"
    )
    text += table(header, rows)
    passes = [x["passes"] for x in lines if x["variant"] == "kl" and x["seed"] >= 0]
    if passes:
        of_all = [train_s + line["teacher_s"], train_s + line["teacher_s"] / passes[0]]
        text += (
            f"\n\nwith the making of the cache, which is passed {passes[0]:.2f} times: "
            f"{of_all[0] / of_all[1]:.2f} times faster"
        )
    return text


def plot(runs: dict[str, dict[int, dict[str, Any]]], args: argparse.Namespace) -> None:
    """Coverage risk against likelihood risk, and both KLs: one point a seed."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6))
    pairs = (("likelihood_risk", "coverage_risk"), ("sequence_rkl", "sequence_kl"))
    for panel, (x, y) in zip(panels, pairs, strict=True):
        for number, (variant, by_seed) in enumerate(runs.items()):
            its = list(by_seed.values())
            color = f"C{number}"
            panel.plot([i[x] for i in its], [i[y] for i in its], ".", color=color, alpha=0.4)
            centre = [statistics.mean(i[name] for i in its) for name in (x, y)]
            panel.plot(*centre, "o", color=color, label=variant)
        panel.set_xlabel(f"{NAMES[x]} (nats per token)")
        panel.set_ylabel(f"{NAMES[y]} (nats per token)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncol=6, fontsize=8)
    save(figure, args, top=0.9)
