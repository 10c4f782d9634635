"""Tables and plot of `loss_order.py`, from its runs alone.

Intervals are 95% percentile bootstraps that draw held-out files again, and seeds too, 2,000 times;
differences to forward KL are of pairs: the same seed, the same files.

Shape letters: D draws of the bootstrap, S seeds, F files.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from examples.reproduce.common import save, table

KINDS = ("fkl", "rkl", "akl", "jsd", "tvd", "ce")
NAMES = {
    "ce": "cross-entropy",
    "kl_forward": "KL(p‖q)",
    "kl_reverse": "KL(q‖p)",
    "acceptance": "Σ min(p, q)",
    "agreement": "top-1 agreement",
    "ece": "ECE",
    "rouge_l": "ROUGE-L",
    "distinct_2": "distinct-2",
    "likelihood_risk": "likelihood risk",
    "coverage_risk": "coverage risk",
}
OWN = {
    "fkl": ("kl_forward",),
    "rkl": ("kl_reverse",),
    "akl": ("kl_forward", "kl_reverse"),
    "jsd": ("acceptance",),
    "tvd": ("acceptance",),
    "ce": ("ce",),
}
"""What a loss's rate is chosen by: what it minimises; of AKL the sum of what it weighs, of JSD the
overlap, which it bounds."""
LARGER_IS_BETTER = ("acceptance", "agreement", "rouge_l", "distinct_2")
OF_ANSWERS = ("rouge_l", "distinct_2", "likelihood_risk", "coverage_risk")
DRAWS = 2000
COLORS = {
    **{"fkl": "tab:blue", "rkl": "tab:red", "akl": "tab:green"},
    **{"jsd": "tab:purple", "tvd": "tab:orange", "ce": "gray"},
}
Array = NDArray[np.float64]


def badness(line: dict[str, Any]) -> float:
    """What a loss's rate is to make small, of a run on validation files."""
    sums = [sum(line[name]) / sum(line["targets"]) for name in OWN[line["kind"]]]
    value = -sum(sums) if OWN[line["kind"]] == ("acceptance",) else sum(sums)
    return value if math.isfinite(value) else math.inf


def best_rates(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, int, str], float]:
    """(student, epochs, kind) -> the best of the rates tried on validation files."""
    best: dict[tuple[str, int, str], dict[str, Any]] = {}
    for line in lines:
        key = (line["student"], line["epochs"], line["kind"])
        if line["seed"] < 0 and (key not in best or badness(line) < badness(best[key])):
            best[key] = line
    return {key: line["rate"] for key, line in best.items()}


@dataclass(frozen=True)
class Value:
    """A mean over seeds, and the same of every draw [D] of seeds and files."""

    mean: float
    drawn: Array

    def __sub__(self, other: "Value") -> "Value":
        return Value(self.mean - other.mean, self.drawn - other.drawn)

    @property
    def interval(self) -> tuple[float, float]:
        """95% percentile interval."""
        low, high = np.quantile(self.drawn, (0.025, 0.975))
        return float(low), float(high)

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes 0."""
        low, high = self.interval
        return low > 0 or high < 0


def figure(line: dict[str, Any], name: str, files_DF: Array) -> Array:
    """[D] a run's figure when each file counts so often as a row of `files_DF` says."""
    of = "prompts" if name in OF_ANSWERS else "targets"
    count_D = files_DF @ np.asarray(line[of], float)
    if name == "ece":
        return np.abs(files_DF @ np.asarray(line["bins"], float)).sum(1) / count_D
    return (files_DF @ np.asarray(line[name], float)) / count_D


def values(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Value]]:
    """Kind -> figure -> value, of the runs of one setting; all on the seeds that every kind has."""
    runs = {(line["kind"], line["seed"]): line for line in lines}
    kinds = [kind for kind in KINDS if any(k == kind for k, _ in runs)]
    seeds = [seed for seed in sorted({s for _, s in runs}) if all((k, seed) in runs for k in kinds)]
    if not seeds:
        return {}
    random = np.random.default_rng(0)
    num_files = len(lines[0]["targets"])
    files_DF = random.multinomial(num_files, [1 / num_files] * num_files, DRAWS).astype(float)
    seeds_DS = random.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), DRAWS) / len(seeds)
    once = np.ones((1, num_files))
    found: dict[str, dict[str, Value]] = {}
    for kind in kinds:
        found[kind] = {}
        for name in NAMES:
            means = [figure(runs[kind, seed], name, once)[0] for seed in seeds]
            drawn_DS = np.stack([figure(runs[kind, seed], name, files_DF) for seed in seeds], 1)
            drawn = (drawn_DS * seeds_DS).sum(1)
            found[kind][name] = Value(float(np.mean(means)), drawn)
    return found


def report(lines: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """The tables; writes the plot."""
    settings, best = defaultdict(list), best_rates(lines)
    for line in lines:
        rate = best.get((line["student"], line["epochs"], line["kind"]), line["rate"])
        if line["seed"] >= 0 and line["rate"] == rate:
            settings[line["epochs"], line["student"]].append(line)
    rows: list[list[object]] = []
    differences: list[list[object]] = []
    shown: dict[str, dict[str, dict[str, Value]]] = {}
    for (epochs, student), some in settings.items():
        found = values(some)
        if not found:
            continue
        setting = f"{student}, {epochs} epoch{'s' if epochs > 1 else ''}"
        shown[setting] = found
        seeds = min(len([x for x in some if x["kind"] == kind]) for kind in found)
        rates = {x["kind"]: f"{x['rate']:g}" for x in some}
        for kind, by_name in found.items():
            cells = [_short(by_name[name].mean) for name in NAMES]
            rows.append([setting, seeds, kind.upper(), rates[kind], *cells])
            if kind != "fkl" and "fkl" in found:
                gaps = [_signed(by_name[name] - found["fkl"][name]) for name in NAMES]
                differences.append([setting, kind.upper(), *gaps])
    if not rows:
        return "no run is finished"
    header = ["student", "seeds", "loss", "rate", *NAMES.values()]
    tables = table(header, rows)
    tables += "\n\nminus FKL; * where the 95% interval excludes 0\n\n"
    tables += table(["student", "loss", *NAMES.values()], differences)
    tables += "\n\nAKL minus others, with intervals\n\n" + table(*_akl(shown))
    plot(shown, args)
    return tables


def _akl(shown: dict[str, dict[str, dict[str, Value]]]) -> tuple[list[str], list[list[object]]]:
    """AKL against FKL and RKL, with intervals, in the measures that matter most."""
    names = ("ce", "kl_reverse", "acceptance", "agreement")
    rows: list[list[object]] = []
    for setting, found in shown.items():
        for other in ("fkl", "rkl"):
            if "akl" in found and other in found:
                gaps = [found["akl"][name] - found[other][name] for name in names]
                cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(g.mean, *g.interval) for g in gaps]
                rows.append([setting, f"AKL - {other.upper()}", *cells])
    return ["student", "pair", *[NAMES[name] for name in names]], rows


def _short(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: Value) -> str:
    return f"{value.mean:+.3f}{'*' if value.is_sure else ''}"


def plot(shown: dict[str, dict[str, dict[str, Value]]], args: argparse.Namespace) -> None:
    """Every figure's difference to forward KL, by setting, with intervals."""
    figure, grid = plt.subplots(2, 5, figsize=(15, 8), sharey=True)
    for panel, (name, title) in zip(grid.flat, NAMES.items(), strict=True):
        for row, found in enumerate(shown.values()):
            others = [kind for kind in found if kind != "fkl"]
            for place, kind in enumerate(others):
                gap = found[kind][name] - found["fkl"][name]
                low, high = gap.interval
                y = row + 0.7 * (place / max(1, len(others) - 1) - 0.5)
                panel.plot([low, high], [y, y], "-", color=COLORS[kind], linewidth=1)
                label = None if row else kind.upper()
                panel.plot(gap.mean, y, ".", color=COLORS[kind], label=label)
        panel.axvline(0, color=COLORS["fkl"], linewidth=1)
        better = "more" if name in LARGER_IS_BETTER else "less"
        panel.set_title(f"{title} ({better} is better)", fontsize=9)
        panel.set_yticks(range(len(shown)), list(shown), fontsize=8)
    grid[0, 0].invert_yaxis()
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="upper center", ncol=6, title="minus FKL, with 95% intervals")
    save(figure, args, top=0.93)
