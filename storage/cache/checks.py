"""What must be true of scored sequences, checked once where they enter or leave a cache."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from decant.schemas import Conversation, FormatError, Layout, RowGroup, ScoredSequence
from decant.schemas.arrow import SAMPLER_COLUMN
from decant.schemas.distributions import FIELDS
from decant.storage.cache.logprobs import ROUNDING, empty, logprob_bound
from decant.storage.cache.rows import Rows, StoredRows

EPSILON = 1e-4
"""How far kept mass + tail of exact log probs may be from 1 at T=1; 20 times it elsewhere. Stored
precisions add what their rounding can move (`codec.logprob_bound`)."""


def check_sequence(sequence: ScoredSequence, layout: Layout, *, precision: str = "f32") -> None:
    """Raise FormatError, naming the sample, unless the sequence is what a shard may hold.

    `precision` is what its log probs went through already.
    """
    length, n = len(sequence.input_ids), sequence.num_targets
    where = f"sample {sequence.sample_id}"
    if not isinstance(sequence.sample_id, str):
        raise FormatError(f"{where}: sample_id must be a string")
    if sequence.draws is not None and not layout.has_draws:
        raise FormatError(f"{where}: draws given, but this cache's truncation does not sample")
    expected: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
        "input_ids": ((length,), np.int32),
        "is_target": ((length,), np.bool_),
        "positions": ((n,), np.int32),
    }
    for name, field in FIELDS.items():
        if name in layout.fields or getattr(sequence, name) is not None:
            shape = field.shape(n, layout.slots, len(layout.temperatures))
            expected[name] = (shape, field.dtype)
    for name, (shape, dtype) in expected.items():
        value = getattr(sequence, name)
        if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != dtype:
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else value
            raise FormatError(f"{where}: {name} must be {np.dtype(dtype)} {shape}, found {found}")
    check_messages(sequence, layout)
    check_sampler(sequence, layout)
    if len(sequence.input_ids) < 2:
        raise FormatError(f"{where}: {len(sequence.input_ids)} tokens; a target needs one before")
    if sequence.is_target[0]:
        raise FormatError(f"{where}: token 0 is a target, but nothing predicts it")
    if not np.array_equal(np.flatnonzero(sequence.is_target), sequence.positions):
        raise FormatError(f"{where}: positions are not the true entries of is_target")
    problems = distribution_problems(sequence, layout, precision=precision)
    if problems:
        raise FormatError(f"{where}: {problems[0]}")


def check_messages(sequence: ScoredSequence, layout: Layout) -> None:
    """Raise FormatError, naming the sample, unless its messages are what a shard may hold."""
    if sequence.messages is not None and not layout.has_messages:
        raise FormatError(
            f"sample {sequence.sample_id}: messages given, but this cache keeps none: start it with"
            " `messages` true in its manifest, or give None"
        )
    if sequence.messages is not None:
        Conversation.of_text(sequence.messages, f"sample {sequence.sample_id}")


def check_sampler(sequence: ScoredSequence, layout: Layout) -> None:
    """Raise FormatError, naming the sample, unless it has the sampler's log probs as the layout."""
    found, where = sequence.sampler_logprobs, f"sample {sequence.sample_id}: sampler_logprobs"
    if not layout.has_sampler:
        if found is not None:
            raise FormatError(
                f"{where} given, but this cache keeps none: start it with `sampler_logprobs` true "
                "in its manifest, or give None"
            )
        return
    n = sequence.num_targets
    if not isinstance(found, np.ndarray) or found.shape != (n,) or found.dtype != np.float32:
        said = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else found
        raise FormatError(f"{where} must be float32 ({n},), found {said}")


def check_stored(
    stored: StoredRows, layout: Layout, group: RowGroup, first: int, where: str
) -> None:
    """Raise FormatError unless a row group holds what its record says, and tokens that are ids.

    `first` is the plan index of its first sequence. That is what training relies on to index.
    """
    counts = (len(stored), len(stored.target_rows), len(stored.is_target))
    expected = (group.sequences, group.targets, group.rows)
    if counts != expected:
        raise FormatError(
            f"{where}: holds (sequences, targets, rows) {counts}, committed {expected}"
        )
    if not np.array_equal(stored.sequence, np.arange(first, first + len(stored))):
        raise FormatError(
            f"{where}: sequence must count up from {first}, found {stored.sequence[:5].tolist()}"
        )
    if stored.is_target[stored.row_starts[:-1]].any():
        raise FormatError(f"{where}: is_target: the first token of a sequence is a target")
    lengths = np.diff(stored.row_starts)
    position = np.arange(group.rows) - np.repeat(stored.row_starts[:-1], lengths)
    if not np.array_equal(stored.position, position):
        raise FormatError(f"{where}: position does not count up from 0 in each sequence")
    ids = stored.token_id
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= layout.vocab_size:
        raise FormatError(
            f"{where}: token_id outside [0, {layout.vocab_size}): {ids.min()} to {ids.max()}"
        )
    if stored.num_kept is not None and stored.num_kept.max(initial=0) > layout.slots:
        raise FormatError(
            f"{where}: num_kept {stored.num_kept.max()} of at most {layout.slots} entries"
        )
    at = stored.target_rows
    if stored.sampler_logprobs is not None:
        values = stored.sampler_logprobs[at]
        bad = ~np.isfinite(values) | (values > EPSILON)
        _refuse(bad, values, f"{where}: {SAMPLER_COLUMN} of a target")
    for name, values in stored.scalars.items():
        bad = ~np.isfinite(values[at])
        if name != "entropy":
            bad |= values[at] > EPSILON
        _refuse(bad, values[at], f"{where}: {name} of a target")
    for name, columns in stored.by_temperature.items():
        for values in (column[at] for column in columns if column is not None):
            bad = np.isnan(values) | (values > EPSILON) if name == "log_tail" else values != values
            _refuse(bad | (values == np.inf), values, f"{where}: {name} of a target")
    _check_numbers(stored, layout, where)


def check_decoded(rows: Rows, temperatures: Sequence[float], where: str) -> None:
    """Raise FormatError on probabilities so far above 1 that sums over them mean nothing.

    `verify` looks at them closely.
    """
    if rows.logprobs is None or rows.log_z is None or not rows.logprobs.size:
        return
    top = rows.logprobs.max(axis=1)
    for i, temperature in enumerate(temperatures):
        above = top / np.float32(temperature) - rows.log_z[:, i]
        _refuse(~(above <= 1), above, f"{where}: the largest log prob at T={temperature:g}")


def _refuse(bad: NDArray[np.bool_], values: NDArray, what: str) -> None:
    if bad.any():
        raise FormatError(f"{what} is {values[np.argmax(bad)]}, which no logarithm of a mass is")


def _check_numbers(stored: StoredRows, layout: Layout, where: str) -> None:
    """Raise FormatError on a number of a kept entry that stands for no id.

    A look at the highest bytes settles nearly all of them.
    """
    planes = [stored.topk_lo, stored.topk_mid]
    if stored.topk_hi is not None:
        planes.append(stored.topk_hi)
    limit = layout.vocab_size + (len(stored.numbering.head) if stored.numbering else 0)
    largest = (limit - 1) >> 8 * (len(planes) - 1)
    if planes[-1].max(initial=0) < largest:
        return
    rows, slots = np.divmod(np.flatnonzero(planes[-1].ravel() >= largest), planes[-1].shape[1])
    used = stored.is_target[rows]
    if stored.num_kept is not None:
        used &= slots < stored.num_kept[rows]
    rows, slots = rows[used], slots[used]
    numbers = np.zeros(len(rows), np.int64)
    for i, plane in enumerate(planes):
        numbers |= plane[rows, slots].astype(np.int64) << 8 * i
    if numbers.max(initial=0) >= limit:
        raise FormatError(
            f"{where}: a kept entry with number {numbers.max()}, expected below {limit}"
        )


def message_problems(table: pa.Table, rows: Rows) -> list[str]:
    """What is wrong with the messages of whole sequences, a line for each kind of problem."""
    if rows.messages is None:
        return []
    problems = []
    texts = table.column("messages")
    if pc.sum(pc.binary_length(texts)).as_py() != sum(len(t.encode()) for t in rows.messages):
        problems.append("messages in a row that is not the first of its sequence")
    try:
        for sample_id, text in zip(rows.sample_ids, rows.messages, strict=True):
            if text:
                Conversation.of_text(text, f"sample {sample_id}")
    except FormatError as error:
        problems.append(str(error))
    return problems


def check_rows(rows: Rows, layout: Layout) -> list[str]:
    """What is wrong with decoded rows, one line per kind of problem; empty if nothing is."""
    problems = distribution_problems(rows, layout, precision=layout.precision)
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
    values: ScoredSequence | Rows, layout: Layout, *, precision: str
) -> list[str]:
    """Value sanity of n targets; every message gives the first offending target and value.

    `precision` is what the log probs went through: it widens the sums they must keep.
    """
    problems = _Problems()
    refuse = problems.refuse
    input_ids, token_ids, label_logprob = values.input_ids, values.token_ids, values.label_logprob
    vocab = layout.vocab_size
    refuse((input_ids < 0) | (input_ids >= vocab), f"token id outside [0, {vocab})", input_ids)
    if layout.slots:
        _check_ids(refuse, token_ids, layout)
    refuse(~np.isfinite(label_logprob), "label_logprob is not finite", label_logprob)
    refuse(label_logprob > EPSILON, "label_logprob above 0", label_logprob)
    if (sampler := values.sampler_logprobs) is not None:
        refuse(~np.isfinite(sampler), "sampler_logprobs is not finite", sampler)
        refuse(sampler > EPSILON, "sampler_logprobs above 0", sampler)
    if values.draws is not None:
        _check_draws(refuse, values.draws, token_ids, layout)
    if values.entropy is not None and not layout.has_logprobs:
        _check_entropy(refuse, values.entropy, vocab)
    if values.logprobs is not None and values.log_tail is not None and not problems.found:
        _check_logprobs(problems, values, layout, precision)
    return problems.found


def _check_ids(
    refuse: Callable[[NDArray[np.bool_], str, NDArray], None],
    token_ids: NDArray[np.int32],
    layout: Layout,
) -> None:
    """Kept ids: below V, distinct, in the first slots."""
    vocab = layout.vocab_size
    ordered = empty(token_ids.shape, np.int32)
    ordered[:] = token_ids
    ordered.sort(axis=1)
    refuse(ordered[:, -1] >= vocab, f"kept id not below {vocab}", token_ids)
    twice = ordered[:, 1:] == ordered[:, :-1]
    if layout.has_num_kept:
        used = token_ids >= 0
        refuse(~used[:, 0], "no kept entry", token_ids)
        refuse(used[:, 1:] & ~used[:, :-1], "unused slot before a used one", token_ids)
        refuse(~used & (token_ids != -1), "unused slot that does not hold -1", token_ids)
        twice &= ordered[:, 1:] >= 0
    else:
        refuse(ordered[:, 0] < 0, f"fewer than {layout.slots} entries kept", token_ids)
    refuse(twice, "an id is kept twice", token_ids)


class _Problems:
    """What was found, a line for each kind."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def refuse(self, bad: NDArray[np.bool_], what: str, values: NDArray) -> None:
        """Note where [n] or [n, K] `bad` is true first, with the values [n, ...] there."""
        if bad.any():
            rows = np.flatnonzero(bad.any(axis=1) if bad.ndim == 2 else bad)
            value = np.array2string(values[rows[0]], threshold=16, edgeitems=4, separator=", ")
            value = " ".join(value.split())
            self.found.append(f"{what}: {len(rows)} times, first at {rows[0]}: {value}")


def _check_draws(
    refuse: Callable[[NDArray[np.bool_], str, NDArray], None],
    draws: NDArray[np.int32],
    token_ids: NDArray[np.int32],
    layout: Layout,
) -> None:
    refuse((draws != 0) & (token_ids < 0), "draws without an entry", draws)
    refuse((draws < 0) | (draws > 65_535), "draws outside 0..65535", draws)
    if not layout.has_logprobs:
        refuse((draws == 0) & (token_ids >= 0), "entry without draws", draws)
        refuse(draws.sum(axis=1) != layout.slots, f"draws do not sum to {layout.slots}", draws)


def _check_entropy(
    refuse: Callable[[NDArray[np.bool_], str, NDArray], None],
    entropy: NDArray[np.float32],
    vocab_size: int,
) -> None:
    largest = np.log(vocab_size)
    bad = ~((entropy >= -EPSILON) & (entropy <= largest + EPSILON))
    refuse(bad, f"entropy outside 0 to log V = {largest:.4f}", entropy)


def _check_logprobs(
    problems: _Problems, values: ScoredSequence | Rows, layout: Layout, precision: str
) -> None:
    """Order, sums and the label of kept log probs."""
    logprobs, log_tail, log_z = values.logprobs, values.log_tail, values.log_z
    token_ids, label_logprob = values.token_ids, values.label_logprob
    assert logprobs is not None and log_tail is not None
    refuse = problems.refuse
    if layout.has_num_kept:
        used = token_ids >= 0
        filled = ~used & (logprobs != -np.inf)
        refuse(filled, "unused slot that does not hold -inf", logprobs)
        finite = np.isfinite(np.where(used, logprobs, 0).sum(axis=1))
    else:
        finite = np.isfinite(logprobs.sum(axis=1))
    refuse(~finite, "kept log prob is not finite", logprobs)
    if problems.found:  # the checks below would repeat the same rows in other words
        return
    ascending = logprobs[:, 1:] > logprobs[:, :-1]
    refuse(ascending, "kept log probs are not in descending order", logprobs)
    refuse(~np.isfinite(log_z), "log Z is not finite", log_z)
    refuse(log_z[:, 0] != 0, "log Z at T=1 is not 0", log_z)
    refuse(np.isnan(log_tail), "log tail is not a number", log_tail)
    refuse(log_tail > EPSILON, "log tail above 0", log_tail)
    if problems.found:
        return
    for i, temperature in enumerate(layout.temperatures):
        p = _at_temperature(logprobs, temperature, log_z[:, i])
        mass = p.sum(axis=1) + np.exp(log_tail[:, i])
        tolerance = EPSILON if temperature == 1 else 20 * EPSILON
        off = ~(np.abs(mass - 1) <= tolerance)
        if precision != "f32" and (rows := np.flatnonzero(off)).size:
            tolerance += 2 * ROUNDING * layout.rounded  # of the tail, and of log Z
            moved = np.expm1(
                logprob_bound(logprobs[rows], precision, layout.code) / np.float32(temperature)
            )
            rounding = (p[rows] * np.minimum(moved, 1)).sum(axis=1)
            off[rows] = ~(np.abs(mass[rows] - 1) <= tolerance + rounding)
        refuse(off, f"kept mass + tail at T={temperature:g} is not 1 within {tolerance:g}", mass)
    is_label = token_ids == values.labels[:, None]
    slot = is_label.argmax(axis=1)
    each = np.arange(len(token_ids))
    stored = logprobs[each, slot]
    slack = (1e-3 if precision == "f32" else 0.02) * (1 + np.abs(stored))
    differs = is_label[each, slot] & (np.abs(stored - label_logprob) > slack)
    if precision != "f32" and (rows := np.flatnonzero(differs)).size:
        slack[rows] += logprob_bound(logprobs[rows], precision, layout.code)[
            each[: rows.size], slot[rows]
        ]
        differs[rows] = np.abs(stored - label_logprob)[rows] > slack[rows]
    refuse(differs, "label_logprob differs from the kept entry of the same token", label_logprob)


def _at_temperature(
    logprobs: NDArray[np.float32], temperature: float, log_z: NDArray[np.float32]
) -> NDArray[np.float32]:
    """[n, K] p_T(v) = exp(log p(v) / T - log Z_T)."""
    p = np.divide(logprobs, np.float32(temperature), out=empty(logprobs.shape, np.float32))
    p -= log_z[:, None]
    return np.exp(p, out=p)
