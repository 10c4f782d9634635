"""The figures of an alignment from some row groups of a cache, chosen evenly."""

import numpy as np

from decant.storage import CacheReader
from decant.student_train.alignment.aligner import Aligner
from decant.student_train.alignment.report import Figures

SAMPLED_GROUPS = 4


def align_sample(reader: CacheReader, aligner: Aligner, groups: int = SAMPLED_GROUPS) -> Figures:
    """Align so many row groups, or all where there are fewer (0 = all).

    Raises ValueError if too many of their sequences cannot be aligned.
    """
    every = reader.row_groups()
    count = min(groups or len(every), len(every))
    total = Figures()
    for index in np.linspace(0, len(every) - 1, count).astype(int).tolist():
        _, figures = aligner.measured(reader.read(every[index]))
        total += figures
    aligner.refuse(total)
    return total
