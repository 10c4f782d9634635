"""What must be true of scored sequences, checked once where they enter or leave a cache."""

import numpy as np
from numpy.typing import NDArray

from schemas import FormatError, Layout, ScoredSequence
from storage.codec import Rows

MASS_EPSILON = {"f32": 1e-4, "f16": 2e-3, "compact": 1e-3}
"""How far kept mass + tail may be from 1 at T=1, by stored precision; 20 times it elsewhere (the
compact code makes the sum exact at T=1 only)."""


def check_sequence(sequence: ScoredSequence, layout: Layout) -> None:
    """Raise FormatError, naming the sample, unless the sequence is what a shard may hold."""
    n, slots, temperatures = sequence.num_targets, layout.slots, len(layout.temperatures)
    expected: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "input_ids": ((len(sequence.input_ids),), np.int32),
        "is_target": ((len(sequence.input_ids),), np.bool_),
        "positions": ((n,), np.int32),
        "token_ids": ((n, slots), np.int32),
        "logprobs": ((n, slots), np.float32),
        "log_z": ((n, temperatures), np.float32),
        "log_tail": ((n, temperatures), np.float32),
        "label_logprob": ((n,), np.float32),
    }
    where = f"sample {sequence.sample_id}"
    if layout.has_draws:
        expected["draws"] = ((n, slots), np.int32)
    elif sequence.draws is not None:
        raise FormatError(f"{where}: draws given, but this cache's truncation does not sample")
    for name, (shape, dtype) in expected.items():
        value = getattr(sequence, name)
        if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != dtype:
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else value
            raise FormatError(f"{where}: {name} must be {np.dtype(dtype)} {shape}, found {found}")
    if len(sequence.input_ids) < 2:
        raise FormatError(f"{where}: {len(sequence.input_ids)} tokens; a target needs one before")
    if sequence.is_target[0]:
        raise FormatError(f"{where}: token 0 is a target, but nothing predicts it")
    if not np.array_equal(np.flatnonzero(sequence.is_target), sequence.positions):
        raise FormatError(f"{where}: positions are not the true entries of is_target")
    problems = distribution_problems(
        sequence.input_ids,
        sequence.labels,
        sequence.token_ids,
        sequence.logprobs,
        sequence.draws,
        sequence.log_z,
        sequence.log_tail,
        sequence.label_logprob,
        layout,
        epsilon=MASS_EPSILON["f32"],
    )
    if problems:
        raise FormatError(f"{where}: {problems[0]}")


def check_rows(rows: Rows, layout: Layout) -> list[str]:
    """What is wrong with decoded rows, one line per kind of problem; empty if nothing is."""
    problems = distribution_problems(
        rows.input_ids,
        rows.labels,
        rows.token_ids,
        rows.logprobs,
        rows.draws,
        rows.log_z,
        rows.log_tail,
        rows.label_logprob,
        layout,
        epsilon=MASS_EPSILON[layout.precision],
    )
    starts = rows.row_starts[:-1]
    if rows.is_target[starts].any():
        problems.append("the first token of a sequence is a target")
    if len(rows) and np.any(np.diff(rows.sequence) != 1):
        problems.append("sequence indices are not consecutive")
    expected = np.flatnonzero(rows.is_target) - np.repeat(starts, np.diff(rows.target_starts))
    if not np.array_equal(expected, rows.positions):
        problems.append("position does not count up from 0 in each sequence")
    return problems


def distribution_problems(
    input_ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    token_ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    draws: NDArray[np.int32] | None,
    log_z: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    label_logprob: NDArray[np.float32],
    layout: Layout,
    *,
    epsilon: float,
) -> list[str]:
    """Value sanity of n targets; every message gives the first offending target and value."""
    problems: list[str] = []

    def claim(good: NDArray[np.bool_], what: str, values: NDArray) -> None:
        if not good.all():
            first = int(np.flatnonzero(~good)[0])
            problems.append(
                f"{what}: {int((~good).sum())} times, first at {first}: {values[first]}"
            )

    vocab = layout.vocab_size
    claim((input_ids >= 0) & (input_ids < vocab), f"token id outside [0, {vocab})", input_ids)
    used = token_ids >= 0
    claim(used[:, 0] if len(used) else np.ones(0, bool), "no kept entry", token_ids)
    claim((token_ids < vocab).all(axis=1), f"kept id not below {vocab}", token_ids)
    ordered = np.sort(token_ids, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    claim(~twice, "an id is kept twice", token_ids)
    holes = (used[:, 1:] & ~used[:, :-1]).any(axis=1)
    claim(~holes, "an unused slot before a used one", token_ids)
    finite = np.isfinite(np.where(used, logprobs, 0)).all(axis=1)
    claim(finite, "kept log prob is not finite", logprobs)
    if problems:  # the checks below would repeat the same rows in other words
        return problems
    descending = np.where(used[:, 1:], logprobs[:, 1:] <= logprobs[:, :-1], True).all(axis=1)
    claim(descending, "kept log probs are not in descending order", logprobs)
    claim(np.isfinite(label_logprob), "label_logprob is not finite", label_logprob)
    claim(label_logprob <= epsilon, "label_logprob above 0", label_logprob)
    claim(np.isfinite(log_z).all(axis=1), "log Z is not finite", log_z)
    claim(~np.isnan(log_tail).any(axis=1), "log tail is not a number", log_tail)
    claim((log_tail <= epsilon).all(axis=1), "log tail above 0", log_tail)
    if problems:
        return problems
    for i, temperature in enumerate(layout.temperatures):
        scaled = np.where(used, logprobs / temperature - log_z[:, i : i + 1], -np.inf)
        mass = np.exp(scaled, dtype=np.float64).sum(axis=1) + np.exp(log_tail[:, i])
        tolerance = epsilon if temperature == 1 else min(20 * epsilon, 0.02)
        claim(
            np.abs(mass - 1) <= tolerance,
            f"kept mass + tail at T={temperature:g} is not 1 within {tolerance:g}",
            mass,
        )
    is_label = token_ids == labels[:, None]
    kept_label = is_label.any(axis=1)
    stored = np.where(is_label, logprobs, 0).sum(axis=1)
    slack = {"f32": 1e-3, "f16": 0.02, "compact": 0.5}[layout.precision]
    agrees = ~kept_label | (np.abs(stored - label_logprob) <= slack * (1 + np.abs(stored)))
    claim(agrees, "label_logprob differs from the kept entry of the same token", label_logprob)
    if draws is not None:
        claim(((draws >= 0) & (used | (draws == 0))).all(axis=1), "draws without an entry", draws)
    return problems
