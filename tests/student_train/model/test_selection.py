"""Claims about training on a share of the targets: which they are, and what they are divided by."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from decant.schemas import Truncation
from decant.schemas.selection import num_selected
from decant.storage import CacheReader
from decant.student_train import CacheStream, LossConfig, train
from decant.student_train.config.selection import SelectionConfig
from decant.student_train.data.batch import Batch
from decant.student_train.losses import sparse_divergence
from decant.student_train.model.distiller import Distiller
from decant.student_train.model.selection import highest, teacher_entropy
from decant.student_train.model.student import load_student
from decant.student_train.prepare_data import refuse_unknown_entropy
from tests.support import caches, models, trainings

LOSS = LossConfig(kind="fkl", kd_weight=0.7, ce_weight=0.3)
KINDS = ("teacher_entropy", "student_entropy", "loss")
SHARE = 0.3


@pytest.fixture(scope="module")
def batch(cache: Path) -> Batch:
    return next(iter(CacheStream(cache, batch_size=6)))


def logits_of(student: nn.Module, batch: Batch) -> Tensor:
    """[N, V] what the student says of each target."""
    out = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return out.logits.flatten(0, 1)[batch.predictors][:, : models.VOCAB_SIZE]


def losses_of(logits_NV: Tensor, batch: Batch) -> Tensor:
    """[N] what is minimised."""
    kd_N = sparse_divergence(logits_NV, batch.targets, kind="fkl")
    ce_N = nn.functional.cross_entropy(logits_NV, batch.labels, reduction="none")
    return 0.7 * kd_N + 0.3 * ce_N


def measured(by: str, logits_NV: Tensor, batch: Batch) -> Tensor:
    """[N] by whole distributions, in float64."""
    if by == "loss":
        return losses_of(logits_NV, batch)
    if by == "student_entropy":
        return torch.distributions.Categorical(logits=logits_NV.double()).entropy()
    p_NC = torch.cat([batch.targets.logprobs, batch.targets.log_tail[:, None]], dim=1).exp()
    return torch.distributions.Categorical(probs=p_NC.double()).entropy()


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_loss_is_that_of_the_highest_targets(by: str, architecture: str, batch: Batch) -> None:
    """In value and gradient, fused with the head or not: the mean over the share, nothing else."""
    student = models.build_model(architecture, seed=3)
    logits_NV = logits_of(student, batch)
    count = num_selected(batch.num_targets, SHARE)
    chosen = measured(by, logits_NV.detach(), batch).topk(count).indices
    expected = losses_of(logits_NV, batch)[chosen].mean()
    gradients = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    selection = SelectionConfig(by=by, share=SHARE)
    distiller = Distiller(student, LOSS, models.VOCAB_SIZE, selection)
    for head in (distiller.head, None):
        distiller.head = head
        found = distiller(batch)
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        ours = torch.autograd.grad(found.loss, list(student.parameters()), allow_unused=True)
        for one, other in zip(ours, gradients, strict=True):
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    everything = Distiller(student, LOSS, models.VOCAB_SIZE)
    assert everything(batch).loss.item() == pytest.approx(
        losses_of(logits_NV, batch).mean().item(), rel=1e-5
    )
    terms = LOSS.at(0, 1)
    assert distiller.measure(batch, terms).targets == batch.num_targets  # all are evaluated


def test_of_equal_targets_the_first_are_taken() -> None:
    """The choice follows from the numbers alone; one target at least is taken of any."""
    values = torch.tensor([1.0, 2.0, 1.0, 2.0, 0.5])
    assert highest(values, 3).tolist() == [0, 1, 3]
    assert [num_selected(n, 0.2) for n in (0, 1, 5, 6, 10)] == [0, 1, 1, 2, 2]
    assert num_selected(3, 1 / 3) == 1 and num_selected(3, 1.0) == 3


def test_the_entropy_is_of_the_kept_entries_and_one_class(batch: Batch) -> None:
    """Finite also where no tail is left, or a slot is not used."""
    exact = measured("teacher_entropy", torch.zeros(batch.num_targets, 1), batch)
    torch.testing.assert_close(teacher_entropy(batch).double(), exact, rtol=1e-4, atol=1e-5)
    no_tail = torch.full((batch.num_targets,), -torch.inf)
    bare = dataclasses.replace(
        batch,
        stored=dataclasses.replace(
            batch.stored, log_tail_t1=no_tail, log_tail=no_tail[:, None].expand(-1, 1)
        ),
    )
    assert bool(torch.isfinite(teacher_entropy(bare)).all())


@pytest.mark.parametrize("by", ["teacher_entropy", "student_entropy"])
def test_accumulation_divides_by_the_selected_targets_of_the_step(
    by: str, cache: Path, tmp_path: Path
) -> None:
    """A share of each microbatch is taken, and the step is the mean over all that are taken."""
    selection = SelectionConfig(by=by, share=SHARE)
    run = trainings.config(cache, tmp_path / "run", selection=selection, steps=2, batch_size=2)
    run = dataclasses.replace(run, gradient_accumulation=3, loss=LOSS, plots=False)
    train(run)
    first, _ = trainings.losses(tmp_path / "run")
    stream = CacheStream(cache, batch_size=2, seed=run.seed)
    microbatches = next(stream.steps(3, "none"))
    student, _ = load_student(run.student, stream.reader, run.seed)
    total, count = 0.0, 0
    for batch in microbatches:
        logits_NV = logits_of(student, batch).detach()
        number = num_selected(batch.num_targets, SHARE)
        chosen = measured(by, logits_NV, batch).topk(number).indices
        total += float(losses_of(logits_NV, batch)[chosen].sum())
        count += number
    assert first == pytest.approx(total / count, rel=1e-5)
    assert count < sum(batch.num_targets for batch in microbatches)


def test_a_run_is_the_same_again(cache: Path, tmp_path: Path) -> None:
    """The choice depends on data and weights alone, and is not that of all targets."""
    selection = SelectionConfig(by="loss", share=0.25)
    for name in ("one", "other"):
        train(trainings.config(cache, tmp_path / name, selection=selection, steps=3, plots=False))
    train(trainings.config(cache, tmp_path / "all", steps=3, plots=False))
    assert trainings.losses(tmp_path / "one") == trainings.losses(tmp_path / "other")
    assert trainings.losses(tmp_path / "one")[0] > trainings.losses(tmp_path / "all")[0]
    for name, value in trainings.weights(tmp_path / "one").items():
        assert torch.equal(value, trainings.weights(tmp_path / "other")[name])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"by": "entropy"}, "is not one of"),
        ({"by": "loss", "share": 0.0}, r"must lie in \(0, 1\]"),
        ({"by": "loss", "share": 1.0}, "has no effect with share: 1"),
        ({"share": 0.5}, "no effect without by"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict, match: str) -> None:
    """By name, with what is allowed."""
    with pytest.raises(ValueError, match=match):
        SelectionConfig(**settings)


def test_a_cache_without_entries_has_no_entropy(cache: Path, tmp_path: Path) -> None:
    """It is said before the student is loaded, with what can be selected by instead."""
    settings = caches.Settings(truncation=Truncation(method="label"), temperatures=(1.0,))
    caches.write_cache(tmp_path / "label", settings, caches.random_shards(settings))
    run = trainings.config(cache, tmp_path / "run", selection=SelectionConfig(by="teacher_entropy"))
    refuse_unknown_entropy(run, [CacheReader(cache)])
    with pytest.raises(ValueError, match=r"label has .*no entropy can be had: select by student_e"):
        refuse_unknown_entropy(run, [CacheReader(cache), CacheReader(tmp_path / "label")])
    other = dataclasses.replace(run, selection=SelectionConfig(by="student_entropy"))
    refuse_unknown_entropy(other, [CacheReader(tmp_path / "label")])
