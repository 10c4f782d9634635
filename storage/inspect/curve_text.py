"""What `inspect` says of fewer entries: the curve, its errors, and what no cache knows of it."""

from decant.storage.inspect.budget import SURE
from decant.storage.inspect.curve import shown_ks
from decant.storage.inspect.report import AtK, Report

NO_CURVE = "no estimate for drawn entries, which are no top k."


def fewer_entries(report: Report) -> list[str]:
    """The curve and what it does not know, as lines for a terminal."""
    lines = ["Fewer entries"]
    curve = [at for at in report.truncation_curve if at.k in shown_ks(len(report.truncation_curve))]
    if not curve:
        return [*lines, f"  {NO_CURVE}", *(f"  {line}" for line in akl_lines(report))]
    lines += [f"  {line}" for line in curve_note(report)]
    heads = ("retained mass", "±", "forward KL", "±", "bytes/target")
    lines.append(f"  {'k':>6}" + "".join(f"{head:>14}" for head in heads))
    for at in curve:
        cells = curve_cells(at)
        lines.append(f"  {cells[0]:>6}" + "".join(f"{cell:>14}" for cell in cells[1:]))
    lines += [f"  {line}" for line in unknown_lines(report)]
    return [*lines, *(f"  {line}" for line in akl_lines(report))]


def curve_note(report: Report) -> list[str]:
    """What the truncation curve shows."""
    k = len(report.truncation_curve)
    beyond = report.beyond_k or 0.0
    lines = [
        f"what a smaller k would cost against k={k}, nats per target, to a student that knows only",
        "the first k entries and the mass of the rest; ±: 95% by what differs between sequences",
    ]
    if beyond:
        lines.append(f"k={k} itself may cost up to {beyond:.3g} nats against the whole vocabulary")
    return lines


def curve_cells(at: AtK) -> list[str]:
    """A row of the curve: k, retained mass, forward KL, each with its half width, and bytes."""

    def half(error: float | None) -> str:
        return "-" if error is None else f"{SURE * error:.4f}"

    return [
        f"{at.k}",
        f"{at.retained_mass:.4f}",
        half(at.retained_mass_error),
        f"{at.fkl:.4f}",
        half(at.fkl_error),
        "-" if at.bytes_per_target is None else f"{at.bytes_per_target:.1f}",
    ]


def unknown_lines(report: Report) -> list[str]:
    """What a cache does not know of a smaller k."""
    return [
        "Reverse KL, AKL and all that weighs by the student leaves out what the student's own mass",
        "outside the k ids does, which no cache knows: a training logs it as student_tail",
    ]


def akl_lines(report: Report) -> list[str]:
    """Where the split of AKL reaches beyond what is kept."""
    shares = [
        f"{at.akl_inexact:.2%} at T={at.temperature:.4g}"
        for at in report.temperatures
        if at.akl_inexact is not None
    ]
    return [
        f"AKL's head reaches beyond what is kept: {', '.join(shares[i : i + 2])} of targets"
        for i in range(0, len(shares), 2)
    ]
