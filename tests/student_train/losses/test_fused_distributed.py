"""Gradients of the fused head over two processes, DDP and FSDP2, against those of one process.

Two processes run every case once; the tests read what they found. The student is sharded in every
way that leaves the head, whose own forward the fused loss does not run, in another FSDP unit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from decant.student_train.config.loss import LossConfig
from decant.student_train.losses import EventTargets, SparseTargets
from decant.student_train.model.distiller import Distiller
from tests.support import dense_reference as reference
from tests.support import models

WORLD_SIZE = 2
LENGTH = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to wrap and set up the student."""

    wrap: str
    model: str = "llama"
    """llama has a head of its own, qwen2 one tied to the embedding."""
    frozen_head: bool = False
    checkpointing: bool = False
    bf16: bool = False
    """Mixed precision as accelerate sets it up, which casts inputs and outputs."""
    sequences: tuple[int, int] = (3, 2)
    """Sequences of each rank; 0 is a batch that carries no target."""
    events: bool = False
    """Targets of another tokenizer, chunks of one row and of two."""


CASES = {
    "ddp": Case("ddp"),
    "ddp, tied": Case("ddp", "qwen2"),
    "ddp, frozen head": Case("ddp", frozen_head=True),
    "ddp, gradient checkpointing": Case("ddp", "qwen2", checkpointing=True),
    "ddp, a rank without targets": Case("ddp", sequences=(3, 0)),
    "ddp, events": Case("ddp", events=True),
    "ddp, events, a rank without targets": Case("ddp", events=True, sequences=(3, 0)),
    "fsdp2, one unit": Case("root"),
    "fsdp2, one unit, tied": Case("root", "qwen2"),
    "fsdp2, blocks": Case("blocks"),
    "fsdp2, blocks, tied": Case("blocks", "qwen2"),
    "fsdp2, blocks, frozen head": Case("blocks", frozen_head=True),
    "fsdp2, blocks, gradient checkpointing": Case("blocks", "qwen2", checkpointing=True),
    "fsdp2, blocks, a rank without targets": Case("blocks", sequences=(3, 0)),
    "fsdp2, blocks, events": Case("blocks", "qwen2", events=True),
    "fsdp2, blocks, events, a rank without targets": Case("blocks", events=True, sequences=(3, 0)),
    "fsdp2, head apart": Case("head"),
    "fsdp2, head apart, events": Case("head", events=True),
    "fsdp2, head apart and frozen": Case("head", frozen_head=True),
    "fsdp2, embedding and head together, tied": Case("head", "qwen2"),
    "fsdp2, head apart, bf16": Case("head", bf16=True),
    "fsdp2, student apart from its loss, bf16": Case("student", bf16=True),
    "fsdp2, student apart from its loss": Case("student"),
    "fsdp2, accelerate's units": Case("accelerate"),
    "fsdp2, accelerate's units, tied": Case("accelerate", "qwen2"),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a student needs of a training batch."""

    input_ids: Tensor
    attention_mask: Tensor
    predictors: Tensor
    labels: Tensor
    targets: SparseTargets | EventTargets
    position_ids: Tensor | None = None
    lam: Tensor | None = None

    @property
    def num_targets(self) -> int:
        return len(self.labels)

    def targets_at(self, temperature: float) -> SparseTargets | EventTargets:
        return self.targets


def events_at(labels: Tensor, generator: torch.Generator) -> EventTargets:
    """Chunks of one row and of two in turn, with five events and a rest of random probabilities."""
    sizes = torch.tensor([1, 2]).repeat(len(labels))
    sizes = sizes[: int((sizes.cumsum(0) <= len(labels)).sum())]
    missing = len(labels) - int(sizes.sum())
    sizes = torch.cat([sizes, torch.ones(missing, dtype=torch.int64)])
    last = labels[sizes.cumsum(0) - 1]
    scores = torch.rand(len(sizes), models.VOCAB_SIZE, generator=generator)
    scores[torch.arange(len(sizes)), last] = 2.0  # what was observed is an event
    log_p = torch.randn(len(sizes), 6, generator=generator).log_softmax(1)
    return EventTargets(
        token_ids=scores.topk(5).indices,
        log_p=log_p[:, :5],
        log_rest=log_p[:, 5],
        labels=labels,
        sizes=sizes,
    )


def batch_of(rank: int, num_sequences: int, events: bool = False) -> Any:
    """A rank's own batch; rank 1's targets are fewer, so means per rank would not do."""
    generator = torch.Generator().manual_seed(rank)
    num_rows = max(num_sequences, 1)
    input_ids = torch.randint(0, models.VOCAB_SIZE, (num_rows, LENGTH), generator=generator)
    predictors = torch.arange(num_rows * LENGTH).reshape(num_rows, LENGTH)[:, : LENGTH - 1 - rank]
    predictors = predictors.flatten() if num_sequences else predictors[:0].flatten()
    labels = input_ids.flatten()[predictors + 1]
    teacher = torch.randn(len(predictors) or 1, models.VOCAB_SIZE, generator=generator) * 2
    targets: Any = reference.targets_of(teacher, reference.top_kept(teacher, [6] * len(teacher)))
    if events:
        targets = events_at(labels, generator)
    return Batch(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        predictors=predictors,
        labels=labels,
        targets=targets[: len(predictors)],
    )


def distiller_of(case: Case) -> Distiller:
    """The student of a case inside its loss, whole."""
    student = models.build_model(case.model).train()
    if case.frozen_head:
        student.get_output_embeddings().requires_grad_(False)
    if case.checkpointing:
        student.gradient_checkpointing_enable()
    return Distiller(student, LossConfig(kind="akl", ce_weight=0.5), models.VOCAB_SIZE)


def total_targets(case: Case) -> int:
    """The targets of both ranks."""
    return sum(batch_of(rank, size).num_targets for rank, size in enumerate(case.sequences))


def wrapped(case: Case, model: Distiller) -> nn.Module:
    """Shard or replicate over the processes."""
    if case.wrap == "ddp":
        return DistributedDataParallel(model)
    if case.wrap == "accelerate":
        return _prepared_by_accelerate(model)
    student: Any = model.student
    policy: dict[str, Any] = {}
    if case.bf16:
        policy["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16
        )
    if case.wrap == "blocks":
        for block in student.model.layers:
            fully_shard(block, reshard_after_forward=True, **policy)
    if case.wrap == "head":
        head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
        tied = head.weight is embedding.weight
        fully_shard([embedding, head] if tied else head, **policy)
    if case.wrap == "student":
        fully_shard(student, reshard_after_forward=True, **policy)
    return fully_shard(model, reshard_after_forward=case.wrap == "blocks", **policy)


def _prepared_by_accelerate(model: Distiller) -> nn.Module:
    """What accelerate makes of it; its launcher offers FSDP on accelerators alone."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.student.model.layers[0]).__name__],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=True,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        torch_device_mesh=None,
    )
    return fsdp2_prepare_model(accelerator, model)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, gathered from the processes."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            gradients[name.removeprefix("module.")] = gradient
    return gradients


def run_cases(rank: int, folder: Path) -> None:
    """Run every case as one of the processes; the first writes what came out."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE
    )
    init_device_mesh("cpu", (WORLD_SIZE,))
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        model = wrapped(case, distiller_of(case))
        out = model(batch_of(rank, case.sequences[rank], case.events), float(total_targets(case)))
        (out.loss * WORLD_SIZE).backward()  # both average over ranks, as `train` expects
        loss = out.loss.detach().clone()
        dist.all_reduce(loss)
        found[name] = (loss, whole_gradients(model))
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of every case over two processes."""
    folder = tmp_path_factory.mktemp("processes")
    mp.start_processes(run_cases, (folder,), nprocs=WORLD_SIZE, start_method="forkserver")
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradients_of_one(
    name: str, found: dict[str, tuple[Tensor, dict[str, Tensor]]]
) -> None:
    """The same global batch gives the same loss and, for the same parameters, gradients."""
    case, (loss, gradients) = CASES[name], found[name]
    model = distiller_of(case)
    if case.bf16:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    total = torch.zeros(())
    for rank, num_sequences in enumerate(case.sequences):
        part = model(batch_of(rank, num_sequences, case.events), float(total_targets(case))).loss
        part.backward()
        total += part.detach()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    expected = whole_gradients(model)
    assert gradients.keys() == expected.keys()
    assert ("student.lm_head.weight" in gradients) == (
        case.model == "llama" and not case.frozen_head
    )
    for parameter, gradient in gradients.items():
        truth = expected[parameter].float()
        assert truth.norm() > 0, parameter
        assert (gradient - truth).norm() <= (1e-2 if case.bf16 else 1e-5) * truth.norm(), parameter
