"""A lam of each sequence: DistiLLM-2's curriculum against a loop over sequences and targets."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from decant.schemas import ScoredSequence, Truncation
from decant.storage import CacheReader
from decant.student_train import CacheStream, Distiller, LossConfig, TrainConfig, train
from decant.student_train.config.mixture import CacheShare, OwnLoss
from decant.student_train.config.selection import SelectionConfig
from decant.student_train.data.mixture import MixtureStream
from decant.student_train.losses.skew import lam_of_sequences
from decant.student_train.versus import measure_models
from tests.support import caches, models
from tests.support.trainings import config, losses

LAM = {"skew_fkl": 0.1, "skew_rkl": 0.2}
"""The highest of each kind, here."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache for each kind, whose labels a teacher finds more or less probable."""
    folder = tmp_path_factory.mktemp("skewing")
    for kind, k in (("skew_fkl", 6), ("skew_rkl", 4)):
        form = caches.Settings(
            truncation=Truncation(k=k), temperatures=(1.0,), vocab_size=models.VOCAB_SIZE
        )
        (shard,) = caches.random_shards(form, num_shards=1, sequences=5, length=6, seed=k)
        if kind == "skew_rkl":
            shard = [said(models.build_model(seed=2), sequence) for sequence in shard]
        caches.write_cache(folder / kind, form, [shard])
    return {path.name: path for path in folder.iterdir()}


def said(student: torch.nn.Module, sequence: ScoredSequence) -> ScoredSequence:
    """With the student's most probable tokens as labels, which the teacher finds unlikely."""
    ids = sequence.input_ids.copy()
    for position, kept in zip(sequence.positions, sequence.token_ids, strict=True):
        with torch.no_grad():
            prefix = torch.from_numpy(ids[:position].astype(np.int64))[None]
            logits = student(input_ids=prefix).logits[0, -1, : models.VOCAB_SIZE]
        logits[torch.from_numpy(kept.astype(np.int64))] = -torch.inf
        ids[position] = int(logits.argmax())
    label_logprob = np.full_like(sequence.label_logprob, -9)
    return dataclasses.replace(sequence, input_ids=ids, label_logprob=label_logprob)


def log_q(student: torch.nn.Module, sequence: ScoredSequence) -> Tensor:
    """[n, V] of a sequence's targets: a plain forward of it alone."""
    ids = torch.from_numpy(sequence.input_ids.astype(np.int64))[None]
    logits = student(input_ids=ids).logits[0, sequence.positions - 1, : models.VOCAB_SIZE]
    return logits.double().log_softmax(-1)


def difference(kind: str, log_q_NV: Tensor, sequence: ScoredSequence) -> float:
    """How much more likely the sampling side finds the sequence: geometric means per token."""
    rows = log_q_NV.detach().numpy()
    ours = [row[label] for row, label in zip(rows, sequence.labels, strict=True)]
    p = np.exp(np.mean(sequence.label_logprob.astype(np.float64)))
    q = np.exp(np.mean(ours))
    return float(p - q if kind == "skew_fkl" else q - p)


def lam_by_hand(kind: str, d: float, gap: float) -> float:
    """As DistiLLM-2's published code clips it, for one sequence."""
    return min(max(1 - (1 - LAM[kind]) * gap / (d + 1e-5), 0.01), LAM[kind])


def divergence_by_hand(kind: str, lam: float, log_q_V: Tensor, p_K: Tensor, ids: Tensor) -> Tensor:
    """Of one target, over its kept ids and one class for all others."""
    q_K = log_q_V.exp()[ids]
    p = torch.cat([p_K, 1 - p_K.sum()[None]])
    q = torch.cat([q_K, 1 - q_K.sum()[None]])
    a, b = (p, q) if kind == "skew_fkl" else (q, p)
    return (a * (a / (lam * a + (1 - lam) * b)).log()).sum()


@pytest.mark.parametrize("packing", ["none", "rows"])
@pytest.mark.parametrize("fused", [True, False])
def test_each_sequence_has_its_lam(made: dict[str, Path], packing: str, fused: bool) -> None:
    """Loss and gradients are those of a loop; of each kind some lam lies between the bounds."""
    student = models.build_model(seed=2)
    total, num_targets = torch.zeros((), dtype=torch.float64), 0
    shares = []
    for kind, path in made.items():
        rows = [(one, log_q(student, one)) for one in CacheReader(path)]
        every = sorted(difference(kind, its, one) for one, its in rows)
        gap = (every[2] + 1e-5) * 0.94 / (1 - LAM[kind])
        assert every[2] > 0 and lam_by_hand(kind, every[2], gap) == pytest.approx(0.06)
        for one, its in rows:
            lam = lam_by_hand(kind, difference(kind, its, one), gap)
            for i in range(one.num_targets):
                ids = torch.from_numpy(one.token_ids[i].astype(np.int64))
                p_K = torch.from_numpy(one.logprobs[i]).double().exp()
                total = total + divergence_by_hand(kind, lam, its[i], p_K, ids)
            num_targets += one.num_targets
        own = OwnLoss(kind=kind, options={"lam": LAM[kind]}, gap=gap)
        shares.append(CacheShare(cache=str(path), weight=1, loss=own))
    total = total / num_targets
    total.backward()
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}

    run = TrainConfig(
        output="-", student=config(Path("-"), Path("-")).student, mixture=shares, steps=1
    )
    stream = MixtureStream([s.cache for s in shares], [1, 1], batch_size=10, by_cache=True)
    (batch,) = next(stream.steps(1, packing))
    model = Distiller(models.build_model(seed=2), LossConfig(), models.VOCAB_SIZE)
    if not fused:
        model.head = None
    out = model(batch, None, run.terms(0, 1))
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-4)
    out.loss.backward()
    for name, parameter in model.student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-3, atol=1e-6)


def test_lam_is_between_its_bounds_and_as_published() -> None:
    """1 - (1 - lam) gap / d of each sequence, d being the other way round for skew_rkl."""
    log_p = torch.tensor([0.5, 0.5, 0.31, 0.2, 0.1]).log()
    log_q = torch.tensor([0.2, 0.2, 0.01, 0.1, 0.3]).log()
    sequence = torch.tensor([0, 0, 1, 2, 3])
    lam = lam_of_sequences(log_p, log_q, sequence, kind="skew_fkl", lam=0.1, gap=0.32)
    middle = 1 - 0.9 * 0.32 / 0.30001
    torch.testing.assert_close(lam, torch.tensor([middle, middle, middle, 0.01, 0.1]))
    lam = lam_of_sequences(log_q, log_p, sequence, kind="skew_rkl", lam=0.1, gap=0.32)
    torch.testing.assert_close(lam, torch.tensor([middle, middle, middle, 0.01, 0.1]))
    alike = lam_of_sequences(log_p, log_q, sequence, kind="skew_fkl", lam=0.1, gap=0.0)
    torch.testing.assert_close(alike, torch.full((5,), 0.1))


def test_the_gap_to_give_is_measured(made: dict[str, Path], tmp_path: Path) -> None:
    """Over sequences, by the command that measures models."""
    student = models.save_teacher(tmp_path / "student", seed=2)
    path = made["skew_fkl"]
    each = [difference("skew_fkl", log_q(student, one), one) for one in CacheReader(path)]
    (report,) = measure_models([str(tmp_path / "student")], str(path)).models
    assert report.sequence_gap == pytest.approx(np.mean(each), abs=1e-5)


def test_a_run_with_it_trains(made: dict[str, Path], tmp_path: Path) -> None:
    """The contrastive pair with a gap on either side, also where targets are selected."""
    shares = [
        CacheShare(cache=str(made[kind]), weight=1, prefixes=side, loss=OwnLoss(gap=0.01))
        for kind, side in (("skew_fkl", "teacher"), ("skew_rkl", "student"))
    ]
    for name, selection in (
        ("all", SelectionConfig()),
        ("half", SelectionConfig(by="loss", share=0.5)),
    ):
        run = TrainConfig(
            output=str(tmp_path / name),
            student=config(Path("-"), Path("-")).student,
            mixture=shares,
            loss=LossConfig(preset="contrastive"),
            selection=selection,
            steps=2,
            batch_size=4,
            log_every_steps=1,
        )
        train(run)
        assert all(np.isfinite(losses(tmp_path / name)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "rkl", "gap": 0.1}, "loss.gap is of skew_fkl and skew_rkl, and not of kind rkl"),
        ({"preset": "contrastive", "gap": 0.1}, "give each entry of the mixture its own"),
        ({"kind": "skew_fkl", "gap": -0.1}, r"loss.gap is -0.1: expected .* in \[0, 1\)"),
        ({"kind": "skew_fkl", "gap": 0.1, "options": {"lam": 0.0}}, "lam below .* which is 0"),
    ],
)
def test_a_gap_without_effect_is_refused(fields: dict, message: str) -> None:
    """Other kinds, a preset of two sides, no number of its kind."""
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_labels_alone_have_no_gap(tmp_path: Path) -> None:
    """They are mixed with nothing."""
    form = caches.Settings(truncation=Truncation(method="label"), temperatures=(1.0,))
    caches.write_cache(tmp_path / "labels", form, caches.random_shards(form, num_shards=1))
    run = config(tmp_path / "labels", tmp_path / "run")
    loss = LossConfig(kind="skew_fkl", gap=0.1)
    with pytest.raises(ValueError, match=r"loss.gap moves how .*labels holds .*topk"):
        train(dataclasses.replace(run, loss=loss))
    assert next(iter(CacheStream(tmp_path / "labels", batch_size=1))).lam is None
