"""How many targets a share of them is."""

import math


def num_selected(num_targets: int, share: float) -> int:
    """The share of so many targets, rounded up; one at least of any."""
    return min(num_targets, max(1, math.ceil(share * num_targets - 1e-9))) if num_targets else 0
