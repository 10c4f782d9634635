"""The other formats of `benchmarks/bench_format.py` store what their descriptions say."""

import importlib.util
import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard

from decant.storage.cache import logprobs as logprobs_code
from tests.support import ROOT

PATH = ROOT / "benchmarks/bench_format.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_format", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_format"] = module
    sys.path.insert(0, str(PATH.parent))  # as where it is run as a program
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(PATH.parent))
    del sys.modules["bench_format"], sys.modules["common"]


def scored(bench, vocab_size=152_000, n=50, slots=64, draws=None):
    generator = np.random.default_rng(0)
    ids = np.stack([generator.permutation(vocab_size)[:slots] for _ in range(n)])
    logits = -np.sort(generator.exponential(3, size=(n, slots)), axis=1)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.1
    return bench.Scored(
        token_ids=ids.astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        draws=draws,
        vocab_size=vocab_size,
    )


def test_distillkit_takes_200_bytes_at_k_64_and_a_vocabulary_of_152k(bench):
    """18 bits per id, 16 exact bfloat16, 6 float32 coefficients."""
    data = scored(bench)
    blob, decoded = bench.distillkit(data)
    assert len(blob) == 50 * 200
    error = np.abs(decoded - data.logprobs)[:, :16]
    assert (error <= np.abs(data.logprobs[:, :16]) / 256).all()


def test_packed_bits_hold_the_ids(bench):
    """Every id comes back from its 18 bits."""
    ids = scored(bench).token_ids
    bits = np.unpackbits(bench.pack_bits(ids, 18), axis=1, count=64 * 18).reshape(50, 64, 18)
    assert ((bits.astype(np.int64) << np.arange(18)).sum(axis=2) == ids).all()


def test_distillkit_is_exact_on_a_polynomial(bench):
    """A curve of its own terms is rebuilt to float32."""
    data = scored(bench)
    rank = np.arange(48)
    data.logprobs[:, 16:] = (-5 - 0.1 * rank + 1e-4 * rank**2 - 0.2 * np.sqrt(rank))[None, :]
    _, decoded = bench.distillkit(data)
    np.testing.assert_allclose(decoded[:, 16:], data.logprobs[:, 16:], atol=1e-4)


def test_bfloat16_rounds_to_nearest_even(bench):
    """One unit in the last place of 1 is 2^-7; ties go to the even neighbour."""
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7], np.float32)
    expected = np.array([1, 1, 1 + 2**-6, -1 - 2**-7], np.float32)
    np.testing.assert_array_equal(bench.from_bfloat16(bench.to_bfloat16(values)), expected)


def test_megatron_arrays_come_back(bench):
    """float16, uint16 and bool arrays in turn hold 17-bit ids and rounded log probs."""
    data = scored(bench, vocab_size=131_072)
    blob, decoded = bench.megatron(data)
    raw = zstandard.ZstdDecompressor().decompress(blob)
    n = data.token_ids.size
    assert len(raw) == 5 * n
    low = np.frombuffer(raw, "<u2", n, 2 * n).astype(np.int32)
    high = np.frombuffer(raw, bool, n, 4 * n).astype(np.int32)
    np.testing.assert_array_equal((low | high << 16).reshape(-1, 64), data.token_ids)
    np.testing.assert_array_equal(decoded, data.logprobs.astype(np.float16))


def test_plain_lists_are_lossless(bench):
    """Parquet gives both lists back."""
    data = scored(bench)
    table = pq.read_table(io.BytesIO(bench.plain_lists(data)[0]))
    assert table["token_ids"].to_pylist() == data.token_ids.tolist()
    assert table["logprobs"].to_pylist() == data.logprobs.tolist()


def test_json_lines_are_lossless(bench):
    """One line per target, float32 printed so that it comes back."""
    data = scored(bench, n=3)
    raw = zstandard.ZstdDecompressor().decompress(bench.axolotl_jsonl(data)[0])
    lines = [json.loads(line) for line in raw.splitlines()]
    assert [[e["token"] for e in line] for line in lines] == [
        [f"token_id:{i}" for i in row] for row in data.token_ids
    ]
    assert [[e["logprob"] for e in line] for line in lines] == data.logprobs.tolist()


def test_random_sampling_takes_3_bytes_per_distinct_id(bench):
    """17 bits of id, 7 bits of count; it decodes to the shares of the counts."""
    draws = np.zeros((50, 64), np.int32)
    draws[:, :12] = np.random.default_rng(1).integers(1, 9, size=(50, 12))
    data = scored(bench, vocab_size=100_000, draws=draws)
    data.token_ids[:, 12:] = -1
    blob, decoded = bench.random_sampling(data)
    assert len(blob) == 50 * 12 * 3
    packed = np.frombuffer(blob, np.uint8).reshape(-1, 3).astype(np.int32) @ [1, 256, 65536]
    np.testing.assert_array_equal((packed & 0x1FFFF).reshape(50, 12), data.token_ids[:, :12])
    np.testing.assert_array_equal((packed >> 17).reshape(50, 12), draws[:, :12])
    shares = draws / draws.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(decoded), shares, rtol=1e-6)


def test_entropy_of_equally_frequent_values_is_their_log(bench):
    """Eight values, three bits."""
    assert bench.entropy_bits(np.tile(np.arange(8), 10)) == pytest.approx(3)


def test_prefix_moves_what_it_drops_into_the_tail(bench):
    """The kept mass and the tail add up to 1 for every k."""
    data = scored(bench, n=5)
    tail = np.log1p(-np.exp(data.logprobs.astype(np.float64)).sum(axis=1))
    sequence = bench.ScoredSequence(
        sample_id="",
        input_ids=np.zeros(6, np.int32),
        is_target=np.arange(6) > 0,
        positions=np.arange(1, 6, dtype=np.int32),
        token_ids=data.token_ids,
        logprobs=data.logprobs,
        draws=None,
        log_z=np.zeros((5, 1), np.float32),
        log_tail=tail[:, None].astype(np.float32),
        label_logprob=data.logprobs[:, 0],
    )
    for k in (1, 16, 64):
        cut = bench.prefix(sequence, k)
        assert cut.token_ids.shape == (5, k)
        mass = np.exp(cut.logprobs).sum(axis=1) + np.exp(cut.log_tail[:, 0])
        np.testing.assert_allclose(mass, 1, atol=1e-6)
    assert (logprobs_code.decoding_error(data.logprobs, data.logprobs) == 0).all()
