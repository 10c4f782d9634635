"""How good is a finished student on the targets of a cache? Nothing is trained."""

import dataclasses
from pathlib import Path

import torch
from accelerate import Accelerator

from decant.student_train.config.alignment import AlignConfig
from decant.student_train.config.loss import LossConfig
from decant.student_train.config.student import StudentConfig
from decant.student_train.data.served import refuse_unserved
from decant.student_train.data.stream import CacheStream
from decant.student_train.evaluation.evaluate import evaluate
from decant.student_train.model.alignment import Alignment, label_bytes
from decant.student_train.model.distiller import Distiller
from decant.student_train.model.student import load_student, student_vocab_size
from decant.student_train.outputs.save import STUDENT


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How good a student is on the targets of a cache."""

    student: str
    cache: str
    sequences: int
    kind: str
    """The divergence that `heldout_divergence` is."""
    temperature: float
    metrics: dict[str, float]
    """Means over all targets, by the names that a training's metrics.jsonl has."""


def evaluate_student(
    student: StudentConfig,
    cache: str,
    loss: LossConfig | None = None,
    *,
    batch_size: int = 16,
    heldout_fraction: float = 0.0,
    mixed_precision: str = "no",
    tokenizer_mismatch: str = "refuse",
    align: AlignConfig | None = None,
) -> Verdict:
    """The metrics of a student over the targets of a cache, or of a held-out part of it.

    `heldout_fraction` takes the part that a training with the same `eval.heldout_fraction` never
    saw. `loss` says which divergence to measure: by default the forward KL at T=1.
    `tokenizer_mismatch` and `align` are as in a training. In a process group every process takes
    its share, and all get the same verdict. Raises ValueError if student and cache do not fit, or
    the temperature is not stored.
    """
    loss = dataclasses.replace(loss or LossConfig(), router_weight=0.0)  # which is not measured
    accelerator = Accelerator(mixed_precision=mixed_precision)
    alignment = None
    if tokenizer_mismatch == "align":
        alignment = Alignment(student, align or AlignConfig())
    stream = CacheStream(
        cache,
        batch_size=batch_size,
        temperature=loss.temperatures,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        part="heldout" if heldout_fraction else "all",
        heldout_fraction=heldout_fraction,
        **(alignment.stream_options if alignment else {}),
    )
    aligned = (alignment.tokenizer, stream.vocab_size) if alignment and alignment.any else None
    if loss.preset:
        raise ValueError(
            f"loss.preset {loss.preset} is of the training on a mixture: measure with a kind"
        )
    refuse_unserved(loss, stream.reader, aligned=stream.is_aligned(0))
    model, tokenizer = load_student(student, stream.reader, seed=0, aligned=aligned)
    vocab_size = stream.vocab_size
    if not aligned:
        vocab_size = student_vocab_size(model, tokenizer, stream.reader, loss.tail)
    model.to(accelerator.device)
    with accelerator.autocast():
        measured = label_bytes(tokenizer, vocab_size)
        distiller = Distiller(model, loss, vocab_size, label_bytes=measured)
        terms = loss.at(0, 1)
        with torch.no_grad():
            metrics = evaluate(distiller, {"": stream}, accelerator, terms)
    return Verdict(
        student=student.path,
        cache=cache,
        sequences=stream.num_sequences,
        kind=terms.kind,
        temperature=terms.temperature,
        metrics=metrics,
    )


def student_folder(path: str) -> str:
    """The student of a training's output folder; any other path as it is."""
    inside = Path(path, STUDENT)
    is_output = not Path(path, "config.json").exists() and Path(inside, "config.json").exists()
    return str(inside) if is_output else path


def verdict_text(verdict: Verdict) -> str:
    """The verdict as a table for a terminal."""
    found = dict(verdict.metrics)
    lower, upper = found.get("acceptance_lower"), found.get("acceptance_upper")
    rows = [
        ("student", verdict.student),
        ("cache", f"{verdict.cache}, {verdict.sequences:,} sequences"),
        (
            "cross-entropy",
            f"{found['heldout_ce']:.4f} nats; the teacher's {found['teacher_ce']:.4f}",
        ),
        ("perplexity", f"{found['heldout_perplexity']:.3f}"),
        (
            "divergence",
            f"{found['heldout_divergence']:.4f} nats ({verdict.kind}, T={verdict.temperature:g})",
        ),
        *_per_byte(found),
        ("top-1 accuracy", f"{found['top1_accuracy']:.4f} of the actual tokens"),
    ]
    if "top1_agreement" in found:
        rows.append(("top-1 agreement", f"{found['top1_agreement']:.4f} with the teacher"))
    if lower is not None:
        rows.append(("acceptance", f"{lower:.4f} to {upper:.4f} of its tokens, as a draft model"))
    rows.append(("calibration error", f"{found['ece']:.4f}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _per_byte(found: dict[str, float]) -> list[tuple[str, str]]:
    """What compares students of several tokenizers, where the bytes of tokens are known."""
    if "heldout_bits_per_byte" not in found:
        return []
    bits, nats = found["heldout_bits_per_byte"], found["heldout_divergence_per_byte"]
    return [("per byte", f"cross-entropy {bits:.4f} bits, divergence {nats:.4f} nats")]
