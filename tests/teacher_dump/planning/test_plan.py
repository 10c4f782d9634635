"""Claims about the plan: its counts are exact, its predictions close, and it writes nothing."""

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.storage.inspect.budget import Budget
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.text import report_text
from decant.teacher_dump import (
    DumpConfig,
    SequenceConfig,
    SourceConfig,
    SourceError,
    TeacherConfig,
    dump,
)
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.job.isolate import TooManyRejected
from decant.teacher_dump.planning.predict import Prediction, predict
from decant.teacher_dump.planning.stratified import StratifiedSample
from decant.teacher_dump.planning.text import plan_text
from examples.demo import corpus
from tests.support import ROOT, models
from tests.support.commands import command
from tests.support.dumps import MODULE, change, save_config, save_records

DEMO = ROOT / "examples" / "demo"


@pytest.fixture
def config(dump_config: DumpConfig, tmp_path: Path) -> DumpConfig:
    """The config of `cache`, into a directory that is not there yet."""
    return dataclasses.replace(dump_config, output=str(tmp_path / "cache"))


def dense_divergence(
    model_path: str, sequences: list[np.ndarray], steps: list[int], reference: int
) -> dict[int, float]:
    """Mean KL(p || u_k) - KL(p || u_reference) for each k, from the model's whole softmax.

    u_k is p on its k most probable ids and spreads the rest evenly over the others.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    sums, targets = dict.fromkeys([*steps, reference], 0.0), 0
    for ids in sequences:
        with torch.no_grad():
            logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
        p = torch.softmax(logits.double(), -1).numpy()
        p = -np.sort(-p, axis=1)
        log_p = np.log(p)
        for k in sums:
            rest = p[:, k:].sum(axis=1)
            even = np.log(rest / (p.shape[1] - k))
            sums[k] += float((p[:, k:] * (log_p[:, k:] - even[:, None])).sum())
        targets += len(p)
    return {k: (sums[k] - sums[reference]) / targets for k in steps}


def test_predictions_for_the_demo_hold_within_a_tenth(tmp_path: Path):
    """Targets, shards, bytes, retained mass and truncation KL, from half of a part of its text."""
    corpus.write("train", tmp_path / "train.jsonl.zst", 70_000)
    settings = yaml.safe_load((DEMO / "dump.yaml").read_text())
    config = DumpConfig(
        output=str(tmp_path / "cache"),
        teacher=TeacherConfig(**settings["teacher"] | {"path": str(DEMO / "teacher")}),
        source=SourceConfig(path=str(tmp_path / "train.jsonl.zst")),
        sequences=SequenceConfig(**settings["sequences"]),
        truncation=Truncation(**settings["truncation"]),
        precision=settings["precision"],
        shard_targets=8_000,
    )
    predicted = predict(config, sample=40)
    manifest = dump(config)
    reader = CacheReader(config.output)
    assert manifest.totals is not None
    assert manifest.num_sequences > 70
    assert predicted.counts.targets == manifest.num_targets
    assert predicted.shards == manifest.num_shards > 2
    assert predicted.bytes == pytest.approx(manifest.totals.bytes, rel=0.1)
    sequences = list(reader)
    mass = np.exp(np.concatenate([s.logprobs for s in sequences])).cumsum(axis=1)
    at = {entry.k: entry for entry in predicted.ladder}
    assert predicted.mass == pytest.approx(mass[:, -1].mean(), rel=0.1)
    for k in (4, 16, 64):
        assert at[k].mass_mean == pytest.approx(mass[:, k - 1].mean(), rel=0.1)
        assert 1 - at[k].mass_mean == pytest.approx(1 - mass[:, k - 1].mean(), rel=0.1)
    assert at[64].bytes == pytest.approx(predicted.bytes, rel=1e-3)
    ids = [s.input_ids for s in sequences]
    expected = dense_divergence(config.teacher.path, ids, [4, 16, 64, 256], 512)
    for k, divergence in expected.items():
        assert at[k].kl == pytest.approx(divergence, rel=0.1)
    assert predicted.recommended_k is None and predicted.recommendation == ""
    assert "--max-bytes 80" in plan_text(predicted, config)


def test_counts_are_those_of_the_dump(config: DumpConfig, cache: Path):
    """Sequences, tokens, targets and shards are counted, not estimated."""
    predicted = predict(config, sample=3)
    manifest = CacheReader(cache).manifest
    assert predicted.counts.records == 90
    assert predicted.counts.sequences == manifest.num_sequences
    assert predicted.counts.tokens == manifest.num_tokens
    assert predicted.counts.targets == manifest.num_targets
    assert predicted.shards == manifest.num_shards
    assert predicted.sample_sequences == 3


def test_retained_mass_is_that_of_the_dump(config: DumpConfig, cache: Path):
    """With every sequence in the sample, to the last digit; with a third of them, within 0.05."""
    mass = np.exp(np.concatenate([s.logprobs for s in CacheReader(cache)])).cumsum(axis=1)
    exact = {at.k: at for at in predict(config, sample=90).ladder}
    assert list(exact) == [4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 300]
    for k in (4, 8, 16):
        of_k = mass[:, k - 1]
        low = np.quantile(of_k, 0.05, method="inverted_cdf")
        expected = [of_k.mean(), low, of_k.min()]
        found = [exact[k].mass_mean, exact[k].mass_low, exact[k].mass_least]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    for at in predict(config, sample=30).ladder:
        assert abs(at.mass_mean - exact[at.k].mass_mean) < 0.05


@pytest.mark.parametrize(
    ("truncation", "precision"),
    [
        (Truncation(k=16), "compact"),
        (Truncation(method="topp", k=32, p=0.6), "f16"),
        (Truncation(method="topk+sample", k=4, draws=10), "f32"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
def test_bytes_are_close_to_those_of_the_dump(config: DumpConfig, truncation, precision):
    """Within 1 % from all sequences, 10 % from a third of them, for shards that are not tiny."""
    config = dataclasses.replace(
        config, truncation=truncation, precision=precision, shard_targets=10_000
    )
    totals = dump(config).totals
    assert totals is not None
    for sample, tolerance in ((90, 0.01), (30, 0.1)):
        assert predict(config, sample=sample).bytes == pytest.approx(totals.bytes, rel=tolerance)


def test_bytes_at_each_k_are_those_of_a_dump_at_that_k(config: DumpConfig):
    """Cutting the sample, tails at both temperatures included, is dumping at that k."""
    ladder = {at.k: at for at in predict(config, sample=90).ladder}
    config = dataclasses.replace(config, truncation=Truncation(k=64), shard_targets=10_000)
    totals = dump(config).totals
    assert totals is not None
    assert ladder[64].bytes_per_target == pytest.approx(totals.bytes / totals.targets, rel=0.05)


def test_a_budget_is_answered_with_a_k(config: DumpConfig, tmp_path: Path):
    """By bytes per target or of the whole cache, and by nats; never with the reference's own k."""
    by_nats = predict(config, sample=8, budget=Budget(max_nats=0.5))
    nats = {at.k: at.kl + 1.96 * (at.kl_error or 0) for at in by_nats.ladder}
    assert by_nats.recommended_k == min(k for k, cost in nats.items() if cost <= 0.5)
    assert f"k={by_nats.recommended_k}" in plan_text(by_nats, config)
    file = save_config(config, tmp_path)
    result = command(MODULE, "plan", "--config", file, "--sample", "2", "--max-bytes", "5")
    assert result.code == 0 and "budget: no k fits 5.0 bytes per target" in result.stdout


def test_a_plan_writes_nothing(config: DumpConfig, cache: Path, tmp_path: Path):
    """No output is made, and one that is there is neither opened nor changed."""
    predict(config, sample=2)
    assert list(tmp_path.iterdir()) == []
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    predict(dataclasses.replace(config, output=str(cache), truncation=Truncation(k=3)), sample=2)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_plan_is_the_same_at_every_run(config: DumpConfig):
    """The sample is drawn with a fixed seed; only the measured time differs."""

    def fixed(prediction: Prediction) -> Prediction:
        return dataclasses.replace(prediction, engines=(), disk_free=None)

    assert fixed(predict(config, sample=5)) == fixed(predict(config, sample=5))


def test_random_entries_have_no_retained_mass(config: DumpConfig):
    """Truncation.method: sample keeps no top entries; the table is of top k all the same."""
    draws = Truncation(method="sample", draws=9)
    config = dataclasses.replace(config, precision="compact", temperatures=[1.0])
    predicted = predict(dataclasses.replace(config, truncation=draws), 2)
    assert predicted.mass is None and predicted.bytes > 0
    assert predicted.ladder[-1].mass_mean == pytest.approx(1, abs=1e-5)
    assert "configured truncation" not in plan_text(predicted, config)


def test_every_file_and_length_is_in_the_sample(config: DumpConfig, tmp_path: Path):
    """A small file of long records is not missed for a large file of short ones."""
    short = [{"text": "the quick fox"} for _ in range(300)]
    save_records(tmp_path / "texts" / "a.jsonl", *short)
    save_records(tmp_path / "texts" / "b.jsonl", {"text": "lazy dog " * 20}, {"text": "a fox"})
    config = change(config, "source.path", str(tmp_path / "texts"))
    predicted = predict(config, sample=4)
    whole = predict(config, sample=302)
    assert predicted.sample_sequences == 4
    for few, all_ in zip(predicted.ladder, whole.ladder, strict=True):  # equal texts: no variance
        assert few.mass_mean == pytest.approx(all_.mass_mean, rel=1e-5)
        assert few.kl == pytest.approx(all_.kl, rel=1e-3, abs=1e-6)


def test_weights_give_back_all_targets():
    """Whatever the strata, the sample stands for the targets that were offered."""
    generator = np.random.default_rng(1)
    for size in (1, 3, 10, 64, 1000):
        sample, targets = StratifiedSample(size), 0
        for index in range(500):
            length = int(generator.integers(2, 300))
            is_target = np.arange(length) > 0
            sequence = TokenSequence(str(index), np.zeros(length, np.int32), is_target)
            sample.offer(sequence, index % 3)
            targets += length - 1
        drawn = sample.draw()
        assert len(drawn) == min(size, 500)
        assert len({entry.sequence.sample_id for entry in drawn}) == len(drawn)
        stands_for = sum(entry.weight * entry.sequence.is_target.sum() for entry in drawn)
        assert stands_for == pytest.approx(targets)


def test_what_the_dump_would_refuse_is_counted(
    config: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Overlong records, those without targets, and an output that is too small."""
    records = [{"text": "the quick fox " * n} for n in (1, 2, 40, 50)]
    nothing = {"input_ids": [5, 6], "loss_mask": [1, 0]}
    save_records(tmp_path / "records.jsonl", *records, nothing)
    config = change(config, "source.path", str(tmp_path / "records.jsonl"))
    config = change(config, "sequences.overlong", "error")
    with pytest.raises(SourceError, match="overlong"):
        dump(config)
    predicted = predict(config)
    text = plan_text(predicted, config)
    assert "warning: 2 records are longer than max_length=64" in text
    assert "warning: 1 of 5 records have no target" in text
    assert "MB free" not in text
    monkeypatch.setattr("shutil.disk_usage", lambda _: collections.namedtuple("u", "free")(1000))
    predicted = predict(config)
    assert predicted.disk_free == 1000
    assert "which has 0 MB free" in plan_text(predicted, config)


def test_a_dump_that_will_reject_too_many_is_foretold(config: DumpConfig, tmp_path: Path):
    """By the rate in the sample, and the command says how many targets are stored, not planned."""
    teacher = tmp_path / "teacher"
    models.save_teacher(teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.embed_tokens.weight"][77] = torch.nan
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    records = [{"id": f"x{i}", "input_ids": [5, 6, 77 if i % 2 else 7, 8]} for i in range(10)]
    source = save_records(tmp_path / "records.jsonl", *records)
    config = change(change(config, "teacher.path", str(teacher)), "source.path", str(source))
    config = change(change(config, "teacher.tokenizer", "none"), "shard_targets", 1000)
    config = change(config, "max_rejected", 0.5)
    assert "will stop" not in plan_text(predict(config, 10), config)
    done = command("teacher_dump", "run", "--config", save_config(config, tmp_path))
    assert f"{config.output}: 15 targets in 1 shards, 5 sequences rejected" in done.stdout
    strict = change(change(config, "max_rejected", 0.2), "output", str(tmp_path / "strict"))
    text = plan_text(predict(strict, 10), strict)
    assert "5 of 10 is more than max_rejected allows: at that rate the dump will stop" in text
    with pytest.raises(TooManyRejected):
        dump(strict)


def test_a_teacher_that_is_too_peaked_for_the_precision_is_warned_of(
    config: DumpConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """By the plan, the dump at its first shard and inspect; with f16 by none of them."""
    teacher = tmp_path / "teacher"
    models.save_teacher(teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 60
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    config = change(config, "teacher.path", str(teacher))
    config = change(config, "teacher.tokenizer", str(Path(config.teacher.path)))
    for precision in ("compact", "f16"):
        caplog.clear()
        output = str(tmp_path / precision)
        its = change(change(config, "precision", precision), "output", output)
        planned = predict(its, sample=5).warnings
        dump(its)
        said = "\n".join(record.message for record in caplog.records)
        shown = " ".join(report_text(inspect(output)).split())
        for text in ("\n".join(planned), said, shown):
            assert ("dump with precision: f16" in text) == (precision == "compact")
            assert ("too coarse for this teacher" in text) == (precision == "compact")


def test_engines_are_timed_or_said_to_be_missing(config: DumpConfig, tmp_path: Path):
    """One line for each; --json has the same figures."""
    file = save_config(config, tmp_path)
    result = command(MODULE, "plan", "--config", file, "--sample", "2", "--engines", "vllm")
    assert result.code == 0, result.stderr
    assert "vllm: not measured: " in result.stdout and "targets/s" in result.stdout
    result = command(MODULE, "plan", "--config", file, "--sample", "2", "--json")
    found = json.loads(result.stdout)
    assert found["counts"]["records"] == 90 and len(found["engines"]) == 1
    assert found["engines"][0]["targets_per_second"] > 0


def test_a_plan_refuses_what_the_dump_refuses(config: DumpConfig, tmp_path: Path):
    """By the same checks, before any scoring."""
    with pytest.raises(ValueError, match="only 300 ids"):
        predict(dataclasses.replace(config, truncation=Truncation(k=301)))
    with pytest.raises(ValueError, match="at most 128 positions"):
        predict(dataclasses.replace(config, sequences=SequenceConfig(max_length=129)))
    with pytest.raises(ValueError, match="sample must be at least 1, found 0"):
        predict(config, sample=0)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds no cache \(thesis\.txt\)"):
        predict(dataclasses.replace(config, output=str(tmp_path / "taken")))
    empty = tmp_path / "records.jsonl"
    empty.write_text('{"input_ids": [5, 6], "loss_mask": [1, 0]}\n')
    source = dataclasses.replace(config.source, path=str(empty))
    with pytest.raises(SourceError, match="no sequence with a target"):
        predict(dataclasses.replace(config, source=source))


def test_the_teachers_own_cross_entropy_is_predicted(config: DumpConfig, cache: Path):
    """The mean of -log p of the actual tokens of the cache, with every sequence in the sample."""
    predicted = predict(config, sample=90)
    labels = np.concatenate([s.label_logprob for s in CacheReader(cache)]).astype(np.float64)
    assert predicted.cross_entropy == pytest.approx(-labels.mean(), abs=1e-5)
    assert f"cross-entropy        {-labels.mean():.3f} nats per target" in plan_text(
        predicted, config
    )


def test_a_bos_that_is_not_put_is_warned_of(config: DumpConfig):
    """The tokenizer has one, which texts begin with only if told so."""
    (warning,) = [w for w in predict(config, sample=20).warnings if "bos" in w]
    assert "'<s>', and 20 of 20 sampled sequences do not begin with it" in warning
    begun = change(config, "sequences.add_bos", True)
    assert not any("bos" in w for w in predict(begun, sample=20).warnings)


def test_a_temperature_that_leaves_most_of_the_mass_is_warned_of(
    config: DumpConfig, tmp_path: Path
):
    """With its retained mass, which is that of the cache; T=1 keeps more than half here."""
    config = change(config, "temperatures", [1.0, 8.0])
    predicted = predict(config, sample=90)
    dump(config)
    tails = np.concatenate([s.log_tail for s in CacheReader(config.output)])
    masses = 1 - np.exp(tails.astype(np.float64)).mean(axis=0)
    assert masses[0] > 0.5 > masses[1]
    assert predicted.mass == pytest.approx(masses[0], abs=1e-6)
    (warning,) = [w for w in predicted.warnings if "temperature" in w]
    assert warning.startswith(f"at temperature 8 the kept entries hold {masses[1]:.2f} of the")
