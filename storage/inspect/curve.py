"""What a cache would hold, cost and take if it were cut at fewer entries, k by k."""

import math
from collections.abc import Sequence

import numpy as np

from decant.storage.cache.reader import CacheReader
from decant.storage.inspect.budget import SURE, Budget, Choice, Step, choose
from decant.storage.inspect.cuts import bytes_ratios
from decant.storage.inspect.report import AtK, Report
from decant.storage.inspect.truncation_cost import Means


def shown_ks(slots: int) -> list[int]:
    """Powers of two, the halves between them from 16 on, and K."""
    powers = [2**i for i in range(17)]
    halves = [3 * 2**i for i in range(3, 16)]
    return sorted({k for k in (*powers, *halves) if k < slots} | {slots})


def chosen_k(report: Report, budget: Budget) -> Choice | None:
    """What a budget asks for of a cache with a truncation curve; None without one."""
    if not report.truncation_curve:
        return None
    steps = [
        Step(k=at.k, nats=at.fkl, error=at.fkl_error, bytes_per_target=at.bytes_per_target)
        for at in report.truncation_curve
    ]
    beyond = (report.beyond_k or 0.0) + SURE * (report.beyond_k_error or 0.0)
    return choose(steps, beyond, budget, report.planned_targets)


def finite(value: float) -> float | None:
    """None in place of infinity."""
    return value if math.isfinite(value) else None


def curve_of(means: Means, sizes: dict[int, float]) -> tuple[AtK, ...]:
    """For k = 1 to K; bytes between those that were measured lie on a line."""
    measured = sorted(sizes)
    return tuple(
        AtK(
            k=k,
            retained_mass=float(means.mass[k - 1]),
            retained_mass_error=finite(float(means.mass_error[k - 1])),
            fkl=float(means.fkl[k - 1]),
            fkl_error=finite(float(means.fkl_error[k - 1])),
            rkl=float(means.rkl[k - 1]),
            bytes_per_target=float(np.interp(k, measured, [sizes[m] for m in measured]))
            if measured
            else None,
        )
        for k in range(1, len(means.mass) + 1)
    )


def bytes_at(reader: CacheReader, order: Sequence[int], per_target: float) -> dict[int, float]:
    """Bytes per target at the k that are shown, from the targets of a row group in the middle."""
    groups = [reader.row_groups()[i] for i in order]
    groups = [group for group in groups if group.targets]
    rows = reader.read(groups[len(groups) // 2])
    ratios = bytes_ratios(reader.manifest, rows, shown_ks(reader.manifest.truncation.k))
    return {k: per_target * ratio for k, ratio in ratios.items()}
