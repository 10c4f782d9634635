"""The model card beside a student: which teacher, which cache, which loss, and the metrics."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import EvalResult, ModelCardData

from decant.schemas import Manifest
from decant.storage.hub.card import escaped
from decant.student_train.config.evaluation import NAMES, ROUGE
from decant.student_train.config.loss import LossConfig
from decant.student_train.config.run import TrainConfig
from decant.student_train.config.student import StudentConfig
from decant.student_train.evaluation.heldout_sums import NUM_BINS

PLAIN = re.compile(r"(?!.*(?://|www\.|\b_|_\b|__))[\w./:-]{0,200}", re.ASCII | re.IGNORECASE)
"""What paths, hub ids and fingerprints are made of; none of it is markup or becomes a link."""
MEANINGS = {
    "heldout_ce": "cross-entropy of the actual tokens, nats per token",
    "heldout_perplexity": "its exponential",
    "heldout_divergence": "the divergence that was minimised, nats per token",
    "heldout_loss": "the weighted sum that was minimised",
    "heldout_bits_per_byte": "cross-entropy in bits per byte of text: compares tokenizers",
    "heldout_divergence_per_byte": "the divergence in nats per byte of text",
    "teacher_ce": "the teacher's cross-entropy of the same tokens",
    "ece": f"expected calibration error of the most probable token, {NUM_BINS} equal-width bins",
    "top1_accuracy": "share of tokens whose most probable token is the actual one",
    "top1_agreement": "share of tokens whose most probable token is the teacher's",
    "acceptance_lower": "speculative decoding would accept at least this share, Σ min(p, q)",
    "acceptance_upper": "and at most this",
    **{name: "mean F-measure of generated answers" for name in ROUGE},
}


def model_card(config: TrainConfig, manifests: Sequence[Manifest], summary: dict[str, Any]) -> str:
    """The text of the student's README.md; `manifests` are those of the caches trained on."""
    metrics = {
        name: summary[name]
        for name in (*NAMES, *ROUGE)
        if isinstance(summary.get(name), int | float)
    }
    name = Path(config.output).name or "student"
    adapter_alone = bool(config.adapter.r) and not config.adapter.merge
    data = ModelCardData(
        model_name=name,
        base_model=config.student.path if _is_hub_id(config.student.path) else None,
        library_name="peft" if adapter_alone else "transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation", "decant", *(["lora"] if config.adapter.r else [])],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="decant-cache",
                dataset_name="held-out targets",
                metric_type=metric,
                metric_name=metric,
                metric_value=round(value, 6),
            )
            for metric, value in metrics.items()
        ]
        or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        "Distilled with Decant: a teacher's next-token distributions were stored once, and this "
        "student was trained from the files.",
        "## Teacher and data",
        _table(("", *(f"cache {i}" for i in range(1, len(manifests) + 1))), _cache_rows(manifests)),
        "## Training",
        _table(("", "value"), _training_rows(config, summary)),
    ]
    if metrics:
        rows = [(f"`{m}`", f"{value:.4f}", MEANINGS[m]) for m, value in metrics.items()]
        if "best_step" in summary:
            rows.append(("step", str(summary["best_step"]), f"the best {config.eval.keep_best}"))
        parts += ["## Metrics", _table(("metric", "value", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _cache_rows(manifests: Sequence[Manifest]) -> list[tuple[str, ...]]:
    rows = {
        "teacher": lambda m: (
            f"{_text(m.teacher.name)} ({_text(m.teacher.architecture)}, {_text(m.teacher.dtype)})"
        ),
        "teacher fingerprint": lambda m: _code(m.teacher.fingerprint),
        "cache id": lambda m: f"`{m.cache_id}`",
        "tokenizer fingerprint": lambda m: _code(m.tokenizer.fingerprint),
        "kept": lambda m: f"{_truncation(m)}, {m.precision}",
        "temperatures": lambda m: ", ".join(f"{t:g}" for t in m.temperatures),
        "sequences": lambda m: f"{m.num_sequences:,}",
        "targets": lambda m: f"{m.totals.targets if m.totals else m.num_targets:,}",
    }
    return [(name, *(value(m) for m in manifests)) for name, value in rows.items()]


def _text(text: str) -> str:
    """A text of a cache: a name as it is, anything else without markup, links and HTML."""
    return text if PLAIN.fullmatch(text) else escaped(text)


def _code(text: str) -> str:
    return f"`{text}`" if PLAIN.fullmatch(text) else escaped(text)


def _truncation(manifest: Manifest) -> str:
    truncation = manifest.truncation
    shown = [f"{name}={getattr(truncation, name)}" for name in truncation.rule.options]
    return f"{truncation.method} {', '.join(shown)}".strip()


def _training_rows(config: TrainConfig, summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("loss", _yaml(dataclasses.asdict(config.loss))),
        ("student", _student(config.student)),
        ("steps", f"{summary['steps']:,} ({summary['epochs']} epochs)"),
        ("sequences per step", _step(config)),
        ("packing", config.packing),
        ("optimizer", _yaml(dataclasses.asdict(config.optimizer))),
        ("precision", f"{config.student.dtype}, mixed precision {config.mixed_precision}"),
        ("seed", str(config.seed)),
    ]
    if config.eval.cache:
        rows.append(("held-out targets", f"all of `{config.eval.cache}`"))
    elif config.eval.heldout_fraction:
        part = f"{config.eval.heldout_fraction:g} of the sequences, never trained on"
        rows.append(("held-out targets", part))
    if config.mixture:
        shares = ", ".join(f"{share.weight:g}" for share in config.mixture)
        rows.insert(1, ("mixture", f"weights {shares}"))
        if len({str(loss) for loss in config.losses}) > 1:
            each = [(f"loss of cache {i}", _loss(loss)) for i, loss in enumerate(config.losses, 1)]
            rows[2:2] = each
    if config.adapter.r:
        rows.insert(2, ("adapter", _yaml(dataclasses.asdict(config.adapter))))
    return rows


def _loss(loss: LossConfig) -> str:
    """What differs between the losses of caches."""
    fields = dataclasses.asdict(loss)
    for name in ("preset", "router_weight", "clip"):
        del fields[name]
    return _yaml({**fields, "options": loss.of_kind})


def _student(student: StudentConfig) -> str:
    if student.from_teacher.is_given:
        text = f"cut from the teacher: {_yaml(dataclasses.asdict(student.from_teacher))}"
    else:
        text = student.path or f"from scratch: {_yaml(student.config)}"
    qat = f"; trained for {_yaml(dataclasses.asdict(student.qat))}" if student.qat.scheme else ""
    return text + qat


def _step(config: TrainConfig) -> str:
    sizes = f"batch size {config.batch_size} x accumulation {config.gradient_accumulation}"
    if not PartialState._shared_state:  # outside of a run the number of processes is not known
        return f"{sizes}, per process"
    count = PartialState().num_processes
    total = config.batch_size * config.gradient_accumulation * count
    return f"{total}: {sizes} x processes {count}"


def _yaml(value: dict[str, Any]) -> str:
    return f"`{json.dumps(value, separators=(', ', ': '))}`"


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )
