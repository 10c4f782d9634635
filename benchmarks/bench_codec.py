"""Targets per second of one core through check, encode, decode and read; and the decoding error.

    python benchmarks/bench_codec.py                    a generated cache: k=64, V=4096, compact
    python benchmarks/bench_codec.py --cache DIR        the same on a cache of yours
    python benchmarks/bench_codec.py --errors           the errors alone

Rates are per second of CPU time, the best of some runs; `write` includes compression, hashes and
fsync, `read` every checksum. Errors at k=64 on generated distributions: KL(scored || decoded), that
of the worst log prob of a target, and what the decoded mass at T=2 is off 1.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from common import draft, save
from numpy.typing import NDArray

from decant.schemas import (
    Layout,
    Manifest,
    ScoredSequence,
    Truncation,
)
from decant.storage import CacheReader, verify
from decant.storage.cache import logprobs as logprobs_code
from decant.storage.cache import rows as rows_codec
from decant.storage.cache.checks import check_rows, check_sequence
from decant.storage.cache.writer import write_cache
from decant.storage.inspect.collect import inspect

SLOTS, VOCAB_SIZE, LENGTH = 64, 4096, 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", help="measure on this cache instead of a generated one")
    parser.add_argument("--sequences", type=int, default=200, help="of 256 tokens, to generate")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--errors", action="store_true", help="no rates")
    args = parser.parse_args()
    pa.set_cpu_count(1)
    if not args.errors:
        print_rates(args)
    errors = [*measure_errors()]
    heads = ("KL: mean", "max", "log prob: mean", "max", "mass at T=2: mean")
    print(f"\n{'k=64':<40}{'precision':<10}" + "".join(f"{head:>18}" for head in heads))
    for data, precision, *found in errors:
        print(f"{data:<40}{precision:<10}" + "".join(f"{value:>18.1e}" for value in found))
    columns = ("mean", "max", "logprob_mean", "logprob_max", "mass_t2_mean")
    save("codec_errors.csv", ("data", "precision", *columns), errors)


def print_rates(args: argparse.Namespace) -> None:
    """Measure and print the rates."""
    with tempfile.TemporaryDirectory() as folder:
        if args.cache is None:
            write(f"{folder}/cache", generate(args.sequences))
        rates = [*measure_rates(args.cache or f"{folder}/cache", folder, args.repeats)]
    print(f"{'step':<18}{'k targets/s':>12}")
    for step, rate in rates:
        print(f"{step:<18}{rate / 1e3:>12,.0f}")
    save("codec_rates.csv", ("step", "targets_per_cpu_second"), rates)


def measure_rates(cache: str, folder: str, repeats: int) -> Iterator[tuple[str, float]]:
    """Targets per CPU second of each step, over all row groups of a cache."""
    reader = CacheReader(cache)
    layout, groups = reader.manifest.layout, reader.row_groups()
    tables = [reader.read_table(group) for group in groups]
    rows = [reader.decode(group, table) for group, table in zip(groups, tables, strict=True)]
    sequences = [
        [exact(group[i], layout.temperatures) for i in range(len(group))] for group in rows
    ]
    targets = sum(group.targets for group in groups)
    steps: dict[str, Callable[[], object]] = {
        "check_sequence": lambda: check_all(sequences, layout),
        "encode": lambda: [rows_codec.encode(group, 0, layout) for group in sequences],
        "write": lambda: write(
            f"{folder}/{time.monotonic_ns()}", [s for g in sequences for s in g], reader.manifest
        ),
        "read_table": lambda: [reader.read_table(group) for group in groups],
        "decode": lambda: [*map(reader.decode, groups, tables)],
        "read": lambda: [reader.read(group) for group in groups],
        "check_rows": lambda: [check_rows(group, layout) for group in rows],
        "verify": lambda: verify(cache),
        "inspect": lambda: inspect(cache),
    }
    for name, step in steps.items():
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            step()
            seconds.append(time.process_time() - start)
        yield name, targets / min(seconds)


def check_all(groups: list[list[ScoredSequence]], layout: Layout) -> None:
    for group in groups:
        for sequence in group:
            check_sequence(sequence, layout)


def measure_errors() -> Iterator[tuple[str | float, ...]]:
    """Errors of 2,000 targets of each kind of data and precision.

    The mean and the largest of the decoding error and of the worst log prob of each target, and the
    mean of what the kept and the other mass at T=2 add up to beside 1.
    """
    for data, blocks in distributions(np.random.default_rng(0)):
        for precision in ("f16", "compact"):
            kl, worst, mass = [], [], []
            for dense in blocks:
                ordered = -np.sort(-dense, axis=1)
                logprobs = ordered[:, :SLOTS].astype(np.float32)
                log_tail = log_sum_exp(ordered[:, SLOTS:]).astype(np.float32)
                stored = logprobs_code.encode_logprobs(
                    logprobs, np.ones(logprobs.shape, bool), precision
                )
                tail = logprobs_code.tail_to_store(logprobs, log_tail)
                decoded = logprobs_code.decode_logprobs(stored, None, tail, precision)
                errors = logprobs_code.decoding_errors(logprobs, decoded)
                kl.append(errors[0])
                worst.append(errors[1])
                log_z = log_sum_exp(ordered / 2)[:, None]
                kept = np.exp(decoded.astype(np.float64) / 2 - log_z).sum(axis=1)
                rest = np.exp(ordered[:, SLOTS:] / 2 - log_z).sum(axis=1)
                mass.append(np.abs(kept + rest - 1))
            found = [np.concatenate(values) for values in (kl, worst, mass)]
            (kl_mean, logprob_mean, mass_mean), (kl_max, logprob_max, _) = (
                [float(of(values)) for values in found] for of in (np.mean, np.max)
            )
            yield data, precision, kl_mean, kl_max, logprob_mean, logprob_max, mass_mean


def distributions(
    generator: np.random.Generator,
) -> Iterator[tuple[str, list[NDArray[np.float64]]]]:
    """Names of the data and blocks of log probs [n, V]."""
    for spread, vocab_size in ((8, 1000), (6, 32_000), (3, 1000), (1, 1000)):
        blocks = [generator.normal(scale=spread, size=(100, vocab_size)) for _ in range(20)]
        name = f"Gaussian logits x {spread}, V={vocab_size:,}"
        yield name, [block - log_sum_exp(block)[:, None] for block in blocks]
    yield "Zipf, exponent 0.8 to 3, V=5,000", [zipf(generator, 100, 5000) for _ in range(20)]
    blocks = [generator.normal(scale=30, size=(100, 1000)) for _ in range(20)]
    yield "Gaussian logits x 30, V=1,000", [b - log_sum_exp(b)[:, None] for b in blocks]


def zipf(generator: np.random.Generator, n: int, vocab_size: int) -> NDArray[np.float64]:
    """[n, V] log probs that fall with the rank, by another power in each row."""
    exponents = generator.uniform(0.8, 3, size=(n, 1))
    logits = -exponents * np.log(np.arange(1, vocab_size + 1))
    logits += generator.normal(scale=0.3, size=logits.shape)
    return logits - log_sum_exp(logits)[:, None]


def log_sum_exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] log sum exp of each row."""
    top = x.max(axis=1)
    return np.log(np.exp(x - top[:, None]).sum(axis=1)) + top


def generate(num_sequences: int) -> list[ScoredSequence]:
    """Sequences of Zipfian distributions over ids whose frequency is Zipfian too."""
    generator = np.random.default_rng(0)
    frequency = -np.log(np.arange(1, VOCAB_SIZE + 1))
    sequences = []
    for index in range(num_sequences):
        n = LENGTH - 1
        ranking = np.argsort(-(2 * frequency + generator.gumbel(size=(n, VOCAB_SIZE))), axis=1)
        dense = np.zeros((n, VOCAB_SIZE))
        np.put_along_axis(dense, ranking, -np.sort(-zipf(generator, n, VOCAB_SIZE), axis=1), axis=1)
        order = np.argsort(-dense, axis=1)
        kept = np.take_along_axis(dense, order[:, :SLOTS], axis=1)
        rest = np.take_along_axis(dense, order[:, SLOTS:], axis=1)
        log_z2 = log_sum_exp(dense / 2)
        labels = (dense + generator.gumbel(size=dense.shape)).argmax(axis=1)
        sequences.append(
            ScoredSequence(
                sample_id=f"generated-{index}",
                input_ids=np.concatenate([[1], labels]).astype(np.int32),
                is_target=np.arange(LENGTH) > 0,
                positions=np.arange(1, LENGTH, dtype=np.int32),
                token_ids=order[:, :SLOTS].astype(np.int32),
                logprobs=kept.astype(np.float32),
                log_z=np.stack([np.zeros(n), log_z2], axis=1).astype(np.float32),
                log_tail=np.stack(
                    [log_sum_exp(rest), log_sum_exp(rest / 2) - log_z2], axis=1
                ).astype(np.float32),
                label_logprob=dense[np.arange(n), labels].astype(np.float32),
            )
        )
    return sequences


def exact(sequence: ScoredSequence, temperatures: tuple[float, ...]) -> ScoredSequence:
    """A decoded sequence whose tails and labels fit its log probs, as those of a dump do."""
    log_tail = sequence.log_tail.copy()
    for i, temperature in enumerate(temperatures):
        scaled = sequence.logprobs.astype(np.float64) / temperature - sequence.log_z[:, i, None]
        log_tail[:, i] = np.log(np.maximum(1 - np.exp(scaled).sum(axis=1), 1e-30))
    rows, slots = np.nonzero(sequence.token_ids == sequence.labels[:, None])
    label_logprob = sequence.label_logprob.copy()
    label_logprob[rows] = sequence.logprobs[rows, slots]
    return dataclasses.replace(sequence, log_tail=log_tail, label_logprob=label_logprob)


def write(url: str, sequences: list[ScoredSequence], like: Manifest | None = None) -> None:
    """Write a cache of one shard; with the layout of another cache if given."""
    if like is None:
        start = draft(VOCAB_SIZE, Truncation(k=SLOTS))
    else:
        start = draft(like.shared_vocab_size, like.truncation, like.temperatures, like.precision)
    write_cache(url, start, sequences)


if __name__ == "__main__":
    main()
