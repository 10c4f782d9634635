"""Trainings whose caches have losses of their own, and trainings on sampled tokens."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.storage.cache.plan import plan_of
from decant.storage.cache.writer import write_cache
from decant.student_train import (
    CacheStream,
    Distiller,
    EvalConfig,
    LossConfig,
    TrainConfig,
    train,
)
from decant.student_train.config.mixture import CacheShare, OwnLoss
from decant.student_train.config.selection import SelectionConfig
from decant.student_train.config.student import StudentConfig
from decant.student_train.data.mixture import MixtureStream
from decant.student_train.dry_run import dry_run
from decant.student_train.verdict import evaluate_student
from tests.support import caches, models
from tests.support.trainings import config, losses

FORMS = {
    "topk": caches.Settings(truncation=Truncation(k=6), temperatures=(1.0, 2.0)),
    "cold": caches.Settings(truncation=Truncation(k=4), temperatures=(1.0,)),
    "labels": caches.Settings(truncation=Truncation(method="label"), temperatures=(1.0,)),
    "drawn": caches.Settings(truncation=Truncation(method="sample", draws=5, seed=1)),
}
SAMPLER = {"path": "runs/student", "fingerprint": "sha256:1", "temperature": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of one vocabulary; `sampled` and `sampled_labels` have their sampler's log probs."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, form in FORMS.items():
        form = dataclasses.replace(form, vocab_size=models.VOCAB_SIZE)
        shards = caches.random_shards(form, num_shards=2, sequences=6, length=5, seed=len(name))
        caches.write_cache(folder / name, form, shards)
        if name in ("topk", "labels"):
            other = "sampled" if name == "topk" else "sampled_labels"
            draft = dataclasses.replace(
                form.draft(),
                sampler_logprobs=True,
                source={"path": "nowhere", "fingerprint": "0", "sampler": SAMPLER},
            )
            generator = np.random.default_rng(3)
            with_sampler = [
                [
                    dataclasses.replace(
                        s,
                        sampler_logprobs=-generator.exponential(size=s.num_targets).astype(
                            np.float32
                        ),
                    )
                    for s in shard
                ]
                for shard in shards
            ]
            sequences = [s for shard in with_sampler for s in shard]
            write_cache(folder / other, draft, sequences, plan_of(with_sampler))
    return {path.name: path for path in folder.iterdir()}


def mixed(output: Path, *entries: CacheShare, **changes: object) -> TrainConfig:
    """A short run on a mixture, a line of metrics per step."""
    changes = {"cache": "", "mixture": list(entries), "steps": 4, **changes}
    return dataclasses.replace(config(Path("-"), output), **changes)


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


def share(path: Path, weight: float = 1, **own: object) -> CacheShare:
    return CacheShare(cache=str(path), weight=weight, loss=OwnLoss(**own) if own else None)


@pytest.mark.parametrize("packing", ["none", "rows"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_of_several_kinds_has_the_sum_of_their_gradients(
    made: dict[str, Path], packing: str, fused: bool
) -> None:
    """Each cache's targets by themselves, each with its loss, at its temperature; in any order."""
    entries = [
        share(made["topk"], kind="skew_rkl", temperature=2.0, kd_weight=0.7),
        share(made["cold"], kind="fkl", ce_weight=0.4),
        share(made["sampled"], kind="opd", clip=0.2),
    ]
    run = mixed(Path("-"), *entries, loss=LossConfig(kind="akl"))
    terms = run.terms(0, 4)
    assert isinstance(terms, tuple)
    urls = [entry.cache for entry in entries]
    temperatures = [loss.temperatures for loss in run.losses]
    found = []
    for by_cache in (True, False):
        stream = MixtureStream(
            urls, [1, 1, 1], temperatures=temperatures, batch_size=9, by_cache=by_cache
        )
        (batch,) = next(stream.steps(1, packing))
        assert len(batch.runs()) == 3 or not by_cache
        model = Distiller(models.build_model(seed=2), LossConfig(), models.VOCAB_SIZE)
        if not fused:
            model.head = None
        out = model(batch, None, terms)
        out.loss.backward()
        whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for parameter in model.parameters():
            parameter.grad = None
        total = kd = 0.0
        for source, one in enumerate(terms):
            rows = (batch.source == source).nonzero()[:, 0]
            alone = model(batch.of_targets(rows), batch.num_targets, one)
            alone.loss.backward()
            total, kd = total + alone.loss.item(), kd + alone.kd.item()
            told = out.by_source[source] / batch.num_targets
            assert told[1:].tolist() == pytest.approx([alone.kd.item(), alone.ce.item()], rel=1e-4)
            assert out.by_source[source, 0] == len(rows)
        assert out.loss.item() == pytest.approx(total, rel=1e-5)
        assert out.kd.item() == pytest.approx(kd, rel=1e-5)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(whole[name], parameter.grad, rtol=1e-3, atol=1e-6)
        found.append(out.loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_run_of_two_kinds_accumulates_resumes_and_is_told_by_cache(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """One microbatch or several give the same; so does a run cut in the middle."""
    entries = (
        share(made["topk"], kind="rkl", temperature=2.0),
        share(made["cold"], 1, kind="tvd", kd_weight=2.0),
    )
    held = EvalConfig(heldout_fraction=0.2)
    whole = mixed(tmp_path / "whole", *entries, batch_size=4, eval=held)
    train(whole)
    parts = {"batch_size": 2, "gradient_accumulation": 2, "save_every_steps": 2}
    cut = dataclasses.replace(whole, output=str(tmp_path / "cut"), **parts)
    train(cut)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    finished = losses(tmp_path / "cut")
    (tmp_path / "cut/summary.json").unlink()
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000004")
    train(cut)
    assert losses(tmp_path / "cut")[-2:] == finished[-2:]
    line = lines(tmp_path / "whole")[1]
    assert {"kd/topk", "ce/topk", "kd/cold", "ce/cold"} <= line.keys()
    assert 0 < line["kd/cold"] < 1  # a total variation
    last = lines(tmp_path / "whole")[-1]
    assert 0 < last["heldout_divergence/cold"] < 1
    kinds = {"topk": ("rkl", 2.0), "cold": ("tvd", 1.0)}
    for name, (kind, temperature) in kinds.items():
        verdict = evaluate_student(
            StudentConfig(path=str(tmp_path / "whole/student")),
            str(made[name]),
            LossConfig(kind=kind, temperature=temperature),
            heldout_fraction=0.2,
        )
        assert verdict.metrics["heldout_divergence"] == pytest.approx(
            last[f"heldout_divergence/{name}"], rel=1e-4
        )
    other = dataclasses.replace(cut, mixture=[entries[0], share(made["cold"], kind="fkl")])
    with pytest.raises(ValueError, match=r"mixture.1.loss.kind: was 'tvd', this run gives 'fkl'"):
        train(other)
    card = (tmp_path / "whole/student/README.md").read_text()
    assert "loss of cache 2" in card and '"kind": "tvd"' in card


def test_presets_train(made: dict[str, Path], tmp_path: Path) -> None:
    """Each side with its kind; a dry run says which; the common loss measures an eval.cache."""
    entries = (
        CacheShare(cache=str(made["topk"]), weight=1, prefixes="teacher"),
        CacheShare(cache=str(made["sampled"]), weight=1, prefixes="student"),
    )
    run = mixed(
        tmp_path / "js",
        *entries,
        loss=LossConfig(preset="js"),
        eval=EvalConfig(cache=str(made["cold"])),
    )
    report = dry_run(dataclasses.replace(run, output=str(tmp_path / "dry")))
    assert "topk: 1 skew_fkl (T=1, bucket, lam 0.5)" in report
    assert "sampled: 1 skew_rkl (T=1, bucket, lam 0.5)" in report
    summary = train(run)
    verdict = evaluate_student(
        StudentConfig(path=str(tmp_path / "js/student")), str(made["cold"]), LossConfig()
    )
    assert verdict.metrics["heldout_divergence"] == pytest.approx(
        summary["heldout_divergence"], rel=1e-4
    )


@pytest.mark.parametrize("name", ["sampled_labels", "sampled", "drawn"])
def test_opd_trains_from_any_cache(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Labels alone, entries, draws: log q - log p of the actual tokens is what is measured.

    Also on held-out text that nobody sampled, whatever the clip.
    """
    clip = 0.0 if name == "drawn" else 0.2
    loss, held = LossConfig(kind="opd", clip=clip), EvalConfig(cache=str(made["cold"]))
    train(config(made[name], tmp_path / "run", loss=loss, eval=held, steps=3, packing="rows"))
    assert all(np.isfinite(losses(tmp_path / "run")))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["heldout_divergence"] == pytest.approx(
        summary["teacher_ce"] - summary["heldout_ce"], abs=1e-4
    )
    verdict = evaluate_student(
        StudentConfig(path=str(tmp_path / "run/student")), str(made[name]), LossConfig(kind="opd")
    )
    found = verdict.metrics
    assert found["heldout_divergence"] == pytest.approx(
        found["teacher_ce"] - found["heldout_ce"], abs=1e-4
    )


def test_labels_and_entries_mix_by_their_kinds(made: dict[str, Path], tmp_path: Path) -> None:
    """Opd on the labels and a divergence on the entries, also on selected targets of entries."""
    entries = (
        share(made["topk"], kind="skew_fkl"),
        share(made["sampled_labels"], kind="opd", clip=0.1),
    )
    train(mixed(tmp_path / "labels", *entries))
    assert {"kd/topk", "kd/sampled_labels"} <= lines(tmp_path / "labels")[0].keys()
    chosen = (entries[0], share(made["sampled"], kind="opd", clip=0.1))
    for by in ("loss", "teacher_entropy"):
        selection = SelectionConfig(by=by, share=0.5)
        train(mixed(tmp_path / by, *chosen, selection=selection, steps=2))
        assert all(np.isfinite(losses(tmp_path / by)))


def test_the_samplers_log_probs_come_with_their_tokens(made: dict[str, Path]) -> None:
    """In a batch beside a cache that has none, and as chunks of one token; NaN where unknown."""
    for name, beside in (("sampled", "topk"), ("sampled_labels", "cold")):
        known = {s.sample_id: s.sampler_logprobs for s in CacheReader(made[name])}
        stream = MixtureStream([made[name], made[beside]], [1, 1], batch_size=10, by_cache=True)
        batch = next(iter(stream))
        mine = batch.source == 0
        assert batch.sampler_logprobs[~mine].isnan().all()
        ids = batch.sample_ids[:5]
        expected = np.concatenate([known[i] for i in ids])
        np.testing.assert_array_equal(batch.sampler_logprobs[mine].numpy(), expected)
        alone = next(iter(CacheStream(made[name], batch_size=3)))
        np.testing.assert_array_equal(
            alone.sampler_logprobs.numpy(), np.concatenate([known[i] for i in alone.sample_ids])
        )
    assert next(iter(CacheStream(made["topk"], batch_size=2))).sampler_logprobs is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [("topk", {"temperature": 2.0}), ("cold", {"kind": "rkl", "temperature": 2.0})],
            r"temperature 2 is not stored in .*cold, which has 1\.",
        ),
        ([("topk", {"kind": "opd", "clip": 0.2})], "topk keeps none: dump it with .*generate.by"),
        ([("labels", {"kind": "tail_kl"})], r"tail_kl compares several kept ids .*labels holds"),
        ([("labels", {"kind": "hinge"})], r"hinge compares several kept ids .*labels holds"),
        ([("labels", {"tail": "uniform"})], r"tail uniform stands for ids .*labels holds"),
        ([("drawn", {"kind": "rkl"})], r"drawn holds 5 draws, and .* not rkl"),
    ],
)
def test_a_cache_that_cannot_serve_a_loss_is_named(
    made: dict[str, Path], tmp_path: Path, entries: list[tuple[str, dict]], message: str
) -> None:
    """Before anything is trained, with what it has and the way out."""
    run = mixed(tmp_path / "run", *(share(made[name], **own) for name, own in entries))
    with pytest.raises(ValueError, match=message):
        train(run)
    assert not (tmp_path / "run/metrics.jsonl").exists()
