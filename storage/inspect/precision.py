"""When the stored precision is too coarse for a teacher, and what to take in its place."""

LARGE_ERROR = 0.25
"""Nats: more than any code of `compact` is off but the last, which stands for every larger gap."""


def logprob_error_warning(precision: str, mean: float | None, largest: float | None) -> list[str]:
    """One line if the worst log prob of a target is far off on average; none if not, or not known.

    A few targets with a log prob beyond the last code, as any teacher has, move no mean.
    """
    if mean is None or largest is None or mean <= LARGE_ERROR:
        return []
    return [
        f"precision {precision} is too coarse for this teacher: the worst log prob of a target is "
        f"off by {mean:.3g} nats on average, by {largest:.3g} at most, as the code ends 23.7 nats "
        "below the most probable entry. The forward KL does not see it; the reverse KL, AKL and "
        "others that weigh by the student do: for these dump with precision: f16"
    ]
