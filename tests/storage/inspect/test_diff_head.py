"""What diff and head say equals what the dense distributions give; their commands behave."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import xxhash
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from decant.schemas import ScoredSequence, TokenizerInfo, Truncation, to_json
from decant.storage import CacheReader, CacheWriter, Store
from decant.storage.__main__ import main
from decant.storage.cli import process as cli
from decant.storage.cli.terminal import escaped, fit, width
from decant.storage.inspect.diff import Difference, diff
from decant.storage.inspect.diff_text import diff_text
from decant.storage.inspect.examples import shown
from decant.storage.inspect.head import head, head_text
from tests.support import caches

SETTINGS = caches.Settings(temperatures=(1.0, 2.0))
WORDS = ["Ġthe", "Ġcat", "Ċ", "é", *(f"w{i}" for i in range(46))]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two caches of the same tokens by two teachers."""

    a: Path
    b: Path
    sequences: tuple[list[ScoredSequence], list[ScoredSequence]]
    dense: tuple[NDArray[np.float64], NDArray[np.float64]]
    """[n, V] log probs of all targets in order."""


def write_pair(folder: Path, a: caches.Settings, b: caches.Settings) -> Pair:
    """Teacher B is A with noise; shards and row groups are cut elsewhere."""
    generator = np.random.default_rng(5)
    sides: tuple[list[ScoredSequence], list[ScoredSequence]] = [], []
    dense: tuple[list[NDArray], list[NDArray]] = [], []
    for i in range(5):
        one, p = caches.random_sequence(
            generator, a, length=9 + 4 * i, prompt=1 + i % 3, sample_id=f"s{i}"
        )
        q = p + generator.normal(scale=0.7, size=p.shape)
        q -= caches.log_sum_exp(q)[:, None]
        other = caches.scored_sequence(q, one.input_ids, one.is_target, b, f"s{i}", generator)
        for side, found in zip(sides, (one, other), strict=True):
            side.append(found)
        for side, found in zip(dense, (p, q), strict=True):
            side.append(found)
    caches.write_cache(folder / "a", a, [sides[0][:2], sides[0][2:]])
    caches.write_cache(folder / "b", b, [sides[1]])
    return Pair(folder / "a", folder / "b", sides, tuple(map(np.concatenate, dense)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Top 8 against top 5. Never write to it."""
    other = dataclasses.replace(SETTINGS, truncation=Truncation(k=5), temperatures=(2.0, 1.0)[::-1])
    return write_pair(tmp_path_factory.mktemp("pair"), SETTINGS, other)


def dense_divergences(pair: Pair, temperature: float) -> NDArray[np.float64]:
    """[n, 4] KL(A || B), KL(B || A), common mass of A and of B, a target at a time."""
    kept = [[ids[ids >= 0] for s in side for ids in s.token_ids] for side in pair.sequences]
    rows = []
    for one, other, log_p, log_q in zip(*kept, *pair.dense, strict=True):
        p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (log_p, log_q))
        common = np.intersect1d(one, other)
        p, q = (np.append(x[common], np.delete(x, common).sum()) for x in (p, q))
        rows.append([(p * np.log(p / q)).sum(), (q * np.log(q / p)).sum(), 1 - p[-1], 1 - q[-1]])
    return np.array(rows)


@pytest.mark.parametrize("method", ["topk", "topp", "topk+sample"])
def test_divergences_equal_a_dense_computation(method: str, tmp_path: Path, pair: Pair) -> None:
    """Over the ids that both keep and one bucket, in both directions, at each temperature."""
    if method != "topk":
        truncation = {
            "topp": Truncation(method="topp", k=9, p=0.8),
            "topk+sample": Truncation(method="topk+sample", k=2, draws=9),
        }[method]
        pair = write_pair(tmp_path, SETTINGS, dataclasses.replace(SETTINGS, truncation=truncation))
    found = diff(pair.a, pair.b)
    assert [at.temperature for at in found.temperatures] == [1, 2]
    for at in found.temperatures:
        expected = dense_divergences(pair, at.temperature)
        for column, spread in enumerate((at.kl_ab, at.kl_ba, at.common_mass_a, at.common_mass_b)):
            assert spread.mean == pytest.approx(expected[:, column].mean(), abs=2e-6)
            assert spread.max == pytest.approx(expected[:, column].max(), abs=5e-6)
        p, q = (np.exp(x / at.temperature) for x in pair.dense)
        p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
        assert at.kl_ab.mean <= (p * np.log(p / q)).sum(axis=1).mean()


def test_agreement_equals_a_dense_computation(pair: Pair) -> None:
    """First entries, common ids, cross-entropies, differences of log probs."""
    found, (p, q) = diff(pair.a, pair.b), pair.dense
    n = len(p)
    labels = np.concatenate([s.labels for s in pair.sequences[0]])
    assert (found.targets, found.sequences) == (n, 5)
    assert found.targets_only_a == found.targets_only_b == 0
    assert found.top1_agreement == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    top = np.argsort(-p, axis=1)[:, :8], np.argsort(-q, axis=1)[:, :5]
    common = [np.intersect1d(a, b) for a, b in zip(*top, strict=True)]
    assert found.same_ids == pytest.approx(sum(map(len, common)) / (5 * n))
    rows = np.arange(n)
    assert found.teacher_ce_a == pytest.approx(-p[rows, labels].mean(), abs=1e-6)
    assert found.teacher_ce_b == pytest.approx(-q[rows, labels].mean(), abs=1e-6)
    apart = np.abs(p - q)
    assert found.label_difference is not None and found.logprob_difference is not None
    assert found.label_difference.mean == pytest.approx(apart[rows, labels].mean(), abs=2e-6)
    largest = [apart[i, ids].max(initial=0) for i, ids in enumerate(common)]
    assert found.logprob_difference.mean == pytest.approx(np.mean(largest), abs=2e-6)


def test_the_worst_targets_differ_most(pair: Pair) -> None:
    """By KL in both directions, each as its own cache has it."""
    found = diff(pair.a, pair.b)
    expected = dense_divergences(pair, 1.0)[:, :2].sum(axis=1)
    places = [(i, int(p)) for i, s in enumerate(pair.sequences[0]) for p in s.positions]
    order = np.argsort(-expected)[:20]
    assert [(d.a.sequence, d.a.position) for d in found.worst_targets] == [places[i] for i in order]
    for worst, row in zip(found.worst_targets, order, strict=True):
        assert worst.kl_ab + worst.kl_ba == pytest.approx(expected[row], abs=1e-5)
        assert worst.b.entries[0].token_id == pair.dense[1][row].argmax()
        assert (worst.b.sequence, worst.b.context_ids) == (worst.a.sequence, worst.a.context_ids)


def test_a_cache_does_not_differ_from_itself(pair: Pair) -> None:
    """Zero in every divergence, one in every agreement."""
    found = diff(pair.a, pair.a)
    assert found.top1_agreement == found.same_ids == 1
    assert all(at.kl_ab.max == at.kl_ba.max == 0 for at in found.temperatures)


@pytest.mark.parametrize("pair_of", [("compact", "f16"), ("f16", "compact"), ("f32", "f16")])
def test_what_rounding_takes_from_a_mass_is_no_divergence(
    pair_of: tuple[str, str], tmp_path: Path
) -> None:
    """Of one peaked teacher in two precisions: the generalised KL, never below 0, in float64.

    Without - p + q the rounding of the mass passes for a divergence of either sign, and the mean
    of what is above 0 is up to 500 times the truth.
    """
    form = caches.Settings(truncation=Truncation(k=64), vocab_size=1000)
    generator = np.random.default_rng(0)
    dense = caches.random_logprobs(generator, 100, 1000, spread=8)
    ids = generator.integers(0, 1000, 101).astype(np.int32)
    for precision in pair_of:
        its = dataclasses.replace(form, precision=precision)
        one = caches.scored_sequence(dense, ids, np.arange(101) > 0, its)
        caches.write_cache(tmp_path / precision, its, [[one]])
    a, b = (CacheReader(tmp_path / name)[0] for name in pair_of)
    found = diff(tmp_path / pair_of[0], tmp_path / pair_of[1])
    for i, at in enumerate(found.temperatures):
        log_p, log_q = (
            np.concatenate(
                [s.logprobs / at.temperature - s.log_z[:, [i]], s.log_tail[:, [i]]],
                axis=1,
                dtype=np.float64,
            )
            for s in (a, b)
        )
        order = [np.argsort(s.token_ids, axis=1) for s in (a, b)]
        assert np.array_equal(*(np.sort(s.token_ids, axis=1) for s in (a, b)))
        for x, at_ids in zip((log_p, log_q), order, strict=True):
            x[:, :-1] = np.take_along_axis(x[:, :-1], at_ids, axis=1)
        p, q = np.exp(log_p), np.exp(log_q)
        plain = (p * (log_p - log_q)).sum(axis=1)
        true = (p * (log_p - log_q) - p + q).sum(axis=1)
        assert at.kl_ab.mean == pytest.approx(true.mean(), rel=1e-5)
        assert at.kl_ab.min >= 0 and at.kl_ba.min >= 0
        assert np.maximum(plain, 0).mean() > 1.5 * true.mean()


def test_two_precisions_differ_by_the_decoding_error(tmp_path: Path) -> None:
    """KL(scored || decoded) of compact against f32 is what the commit records state."""
    shards = caches.random_shards(SETTINGS)
    compact = dataclasses.replace(SETTINGS, precision="compact")
    caches.write_cache(tmp_path / "f32", SETTINGS, shards)
    caches.write_cache(tmp_path / "compact", compact, shards)
    (at, _) = diff(tmp_path / "f32", tmp_path / "compact").temperatures
    records = CacheReader(tmp_path / "compact").index
    targets = sum(r.targets for r in records)
    stated = sum(r.kl_error_mean * r.targets for r in records) / targets
    assert at.kl_ab.mean == pytest.approx(stated, abs=1e-6) and stated > 0


def test_targets_of_one_cache_alone_are_counted_apart(tmp_path: Path) -> None:
    """Where masks differ, the rest is of the targets of both."""
    generator = np.random.default_rng(0)
    one, dense = caches.random_sequence(generator, SETTINGS, length=12)
    is_target = one.is_target & (np.arange(12) > 4)
    other = caches.scored_sequence(dense[4:], one.input_ids, is_target, SETTINGS)
    caches.write_cache(tmp_path / "a", SETTINGS, [[one]])
    caches.write_cache(tmp_path / "b", SETTINGS, [[other]])
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (found.targets, found.targets_only_a, found.targets_only_b) == (7, 4, 0)
    assert found.temperatures[0].kl_ab.max == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: dataclasses.replace(s, vocab_size=60), "shared_vocab_size 50 against 60"),
        (lambda s: s, "hold other data: sequence 0 .* differs from position"),
    ],
)
def test_other_data_is_refused(
    change: Callable[[caches.Settings], caches.Settings], words: str, tmp_path: Path, pair: Pair
) -> None:
    """With the first thing that differs."""
    generator = np.random.default_rng(9)
    settings = change(SETTINGS)
    made = [caches.random_sequence(generator, settings, length=9 + 4 * i)[0] for i in range(5)]
    caches.write_cache(tmp_path / "other", settings, [made])
    with pytest.raises(ValueError, match=words):
        diff(pair.a, tmp_path / "other")


def test_nothing_in_common_is_no_crash(tmp_path: Path) -> None:
    """No target of both: nulls."""
    made, dense = caches.random_sequence(np.random.default_rng(0), SETTINGS, length=6)
    halves = [made.is_target & (np.arange(6) < 3), made.is_target & (np.arange(6) >= 3)]
    for name, mask, rows in zip("ab", halves, (dense[:2], dense[2:]), strict=True):
        scored = caches.scored_sequence(rows, made.input_ids, mask, SETTINGS)
        caches.write_cache(tmp_path / name, SETTINGS, [[scored]])
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.targets == 0 and found.top1_agreement is None and found.temperatures == ()
    assert "0 targets of both" in diff_text(found)


# head


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a tokenizer of byte-level words. Never write to it."""
    path = tmp_path_factory.mktemp("worded") / "cache"
    shards = caches.random_shards(SETTINGS)
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    data = tokenizer.to_str().encode()
    files = {"tokenizer.json": xxhash.xxh3_128(data).hexdigest()}
    draft = dataclasses.replace(
        SETTINGS.draft(), tokenizer=TokenizerInfo(fingerprint="sha256:1", files=files)
    )
    writer = CacheWriter.create(path, draft, caches.plan_of(shards))
    for index, sequences in enumerate(shards):
        caches.write_shard(writer, index, sequences)
    writer.finalize()
    Store(path).publish("tokenizer/tokenizer.json", data)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == cli.DONE
    return capsys.readouterr().out


def test_head_shows_what_is_stored(pair: Pair) -> None:
    """The targets of a sequence, by plan index or by sample id, in order."""
    scored = pair.sequences[0][3]
    found = head(pair.a, sequence=3, targets=4, entries=6)
    assert found == head(pair.a, sample="s3", targets=4, entries=6) and len(found) == 4
    for index, shown_target in enumerate(found):
        position = int(scored.positions[index])
        assert (shown_target.sequence, shown_target.position) == (3, position)
        assert shown_target.context_ids == tuple(scored.input_ids[:position])
        assert shown_target.token_id == scored.input_ids[position]
        assert shown_target.probability == pytest.approx(math.exp(scored.label_logprob[index]))
        assert [e.token_id for e in shown_target.entries] == list(scored.token_ids[index, :6])
        np.testing.assert_allclose(
            [e.probability for e in shown_target.entries], np.exp(scored.logprobs[index, :6])
        )
        assert shown_target.tail_mass == pytest.approx(math.exp(scored.log_tail[index, 0]))
    assert head(pair.a)[0].sequence == 0 and len(head(pair.a, targets=1000)) == 8


def test_head_names_what_is_not_there(pair: Pair) -> None:
    """A sequence beyond the end, or a sample id of none."""
    for options in ({"sequence": 5}, {"sequence": -1}, {"sample": "nobody"}):
        with pytest.raises(ValueError, match="holds no sequence"):
            head(pair.a, **options)  # type: ignore[arg-type]


def test_head_goes_by_the_plan_in_an_incomplete_cache(tmp_path: Path) -> None:
    """Sequence 5 of the plan, though the first shard is not there."""
    shards = caches.random_shards(SETTINGS)
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    with pytest.raises(ValueError, match="no sequence yet"):
        head(tmp_path / "cache")
    caches.write_shard(writer, 1, shards[1])
    assert head(tmp_path / "cache", sequence=5)[0].sample_id == "sample-1-1"
    assert head(tmp_path / "cache")[0].sequence == 4
    with pytest.raises(ValueError, match="holds no sequence 3: it has 4 of the 8 planned"):
        head(tmp_path / "cache", sequence=3)


def test_texts_come_from_the_tokenizer_of_the_cache(worded: Path) -> None:
    """Leading spaces and line breaks of a token are kept, and shown in the table."""
    found = head(worded, targets=30, entries=8)
    texts = {e.token_id: e.text for target in found for e in target.entries}
    expected = {0: " the", 1: " cat", 2: "\n", 7: "w3"}
    assert {i: texts[i] for i in expected if i in texts} == {
        i: text for i, text in expected.items() if i in texts
    }
    assert {0, 1, 2} & texts.keys()
    assert all(t.context is not None and t.token == texts.get(t.token_id, t.token) for t in found)
    text = head_text(found)
    assert "#" not in text.replace("sample-", "") and max(map(width, text.splitlines())) <= 100


def test_tokens_are_shown_on_one_line() -> None:
    """Spaces at the ends visible, line breaks escaped, wide letters counted as two columns."""
    assert shown(" the", 0) == "␣the" and shown("  ", 0) == "␣␣" and shown(None, 7) == "#7"
    assert escaped("a\n\x1b[1m") == "a\\n\\x1b[1m"
    assert width("漢字a") == 5 and fit("漢字", 4) == "漢字" and fit("漢字字", 4) == "漢… "
    assert fit("abcdef", 4) == "abc…" and fit("abcdef", 4, right=True) == "…def"


def test_the_commands_print_text_and_json(
    pair: Pair, worded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At most 100 columns; --json is the same data, strictly JSON."""
    refuse = pytest.fail
    text = run(capsys, "head", pair.a, "--sequence", 3, "--targets", 4)
    assert "sample 's3'" in text and len(text.splitlines()) == 7
    out = run(capsys, "head", pair.a, "--sample", "s3", "--json")
    assert json.loads(out, parse_constant=refuse) == to_json(head(pair.a, sequence=3))
    text += run(capsys, "diff", pair.a, pair.b) + run(capsys, "inspect", worded)
    assert "KL(A || B)" in text and "same first entry" in text
    assert max(map(width, text.splitlines())) <= 100
    out = run(capsys, "diff", pair.a, pair.b, "--json")
    found = json.loads(out, parse_constant=refuse)
    assert found == to_json(diff(pair.a, pair.b))
    assert set(found) == {field.name for field in dataclasses.fields(Difference)}
    with pytest.raises(FileNotFoundError, match="no such directory"):
        main(["diff", str(pair.a), "/nowhere/cache"])
