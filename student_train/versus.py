"""One model, or two, against the teacher's word in a cache: no teacher is loaded, nothing trained.

Models are measured one after the other on the same sequences; logits are held for some targets at a
time, figures as sums per sequence.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decant.storage import CacheReader
from decant.storage.cache.tokenizer_files import TokenizerFiles
from decant.storage.inspect.examples import Entry, read_tokenizer, target, with_texts
from decant.student_train.alignment.aligner import Aligner
from decant.student_train.config.loss import LossConfig
from decant.student_train.config.verdict import ModelOptions
from decant.student_train.data.batch import Batch
from decant.student_train.data.collate import collate
from decant.student_train.evaluation.chunk_figures import (
    AlignedBatch,
    aligned_batches,
    chunk_figures,
    count_chunks,
)
from decant.student_train.evaluation.gathered import (
    Candidate,
    Gathered,
    intervals,
    paired_differences,
)
from decant.student_train.evaluation.heldout_sums import rows_at_once
from decant.student_train.evaluation.model_report import (
    COMPARED,
    MEANS,
    PER_BYTE,
    Chunks,
    Difference,
    ModelReport,
    ModelsReport,
    WorstTarget,
)
from decant.student_train.evaluation.target_figures import target_figures
from decant.student_train.losses import SparseTargets
from decant.student_train.model.alignment import label_bytes
from decant.student_train.model.distiller import Distiller
from decant.student_train.model.measured import form_of, load_measured

SHOWN = 8
"""Entries shown of a worst target."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Which sequences are looked at."""

    limit: int = 0
    """The first of them; 0 = all."""
    sample: int = 0
    """So many at random; 0 = all."""
    seed: int = 0
    """Of the choice, and of the bootstrap."""

    def choose(self, count: int) -> NDArray[np.intp]:
        """Ascending indices of `count` sequences."""
        if self.sample and self.sample < count:
            chosen = np.random.default_rng(self.seed).choice(count, self.sample, replace=False)
            return np.sort(chosen)
        return np.arange(min(self.limit or count, count))

    def text(self) -> str:
        """For people."""
        if self.sample:
            return f"chosen at random (seed {self.seed})"
        return "the first" if self.limit else "all"


AS_SAVED, EVERYTHING = ModelOptions(), Part()


def measure_models(
    paths: Sequence[str],
    cache: str,
    options: ModelOptions = AS_SAVED,
    *,
    part: Part = EVERYTHING,
    batch_size: int = 16,
    worst: int = 10,
    progress: Progress | None = None,
) -> ModelsReport:
    """One or two models against a cache, on the same targets.

    `progress` is called with (sequences done, in all, of all models). Raises ValueError if a model
    cannot be loaded or is of another tokenizer, or where there is no target.
    """
    reader = CacheReader(cache)
    manifest = reader.manifest
    chosen = part.choose(len(reader))
    total = len(chosen) * len(paths)
    found: list[tuple[ModelReport, Gathered]] = []
    for number, path in enumerate(paths):

        def step(done: int, before: int = number * len(chosen)) -> None:
            if progress:
                progress(before + done, total)

        found.append(_measured(path, reader, options, part, chosen, batch_size, worst, step))
    plain = [its for report, its in found if not report.aligned]
    gathered = plain[0] if plain else found[0][1]
    differences: dict[str, Difference] = {}
    if len(found) == 2:
        both_plain = not any(report.aligned for report, _ in found)
        compared = COMPARED if both_plain else PER_BYTE
        pairs = paired_differences(found[0][1], found[1][1], compared, part.seed)
        names = {figure: key for key, figure in MEANS.items()}
        differences = {
            names[name]: Difference(mean=mean, interval=interval)
            for name, (mean, interval) in pairs.items()
        }
    teacher_ce = gathered.mean("teacher_ce")
    assert teacher_ce is not None
    tail = gathered.mean("teacher_tail")
    return ModelsReport(
        cache=reader.url,
        cache_id=manifest.cache_id,
        teacher=manifest.teacher.name,
        kept=manifest.truncation.text(),
        of_entries=manifest.truncation.rule.has_entries,
        exact=tail == 0,
        estimated=bool(plain) and manifest.truncation.rule.has_entries and tail is None,
        sequences=len(chosen),
        of_sequences=len(reader),
        targets=int(sum(gathered.counts["teacher_ce"])),
        chosen=part.text(),
        seed=part.seed,
        teacher_cross_entropy=teacher_ce,
        teacher_perplexity=_exp(teacher_ce),
        teacher_calibration_error=gathered.calibration_error("teacher"),
        models=tuple(report for report, _ in found),
        differences=differences,
    )


def _measured(
    path: str,
    reader: CacheReader,
    options: ModelOptions,
    part: Part,
    chosen: NDArray[np.intp],
    batch_size: int,
    worst: int,
    step: Callable[[int], None],
) -> tuple[ModelReport, Gathered]:
    model, vocab_size, aligner = load_measured(path, options, reader)
    device = model.get_input_embeddings().weight.device
    distiller = Distiller(model, LossConfig(), vocab_size)
    gathered = Gathered(worst)
    done = 0
    chunks = Chunks() if aligner else None
    num_bytes = None
    if not aligner and reader.manifest.tokenizer.files:
        num_bytes = label_bytes(TokenizerFiles.of_cache(reader), vocab_size)
    with torch.no_grad():
        if aligner and chunks:
            for some in aligned_batches(reader, aligner, chosen, batch_size):
                _look_aligned(distiller, some, str(device), aligner, gathered, chunks, reader)
                done += len(some.indices)
                step(done)
        else:
            for batch, indices in _batches(reader, chosen, batch_size):
                if batch is not None:
                    here = batch.to(device, non_blocking=False)
                    _look(distiller, here, indices, gathered, num_bytes)
                done += len(indices)
                step(done)
    if aligner and not sum(gathered.targets):
        aligner.refuse(aligner.figures)
    if not sum(gathered.targets):
        raise ValueError(f"{reader.url}: none of the {len(chosen)} sequences has a target")
    report = _report(path, model, str(device), reader, gathered, part.seed)
    if chunks:
        report = dataclasses.replace(report, aligned=chunks, sequence_gap=None)
    return report, gathered


def _batches(
    reader: CacheReader, chosen: NDArray[np.intp], batch_size: int
) -> Iterator[tuple[Batch | None, list[int]]]:
    """Batches of the chosen sequences with their plan indices, like lengths together.

    None stands for sequences without a target.
    """
    layout = reader.manifest.layout
    start = 0
    for group in reader.row_groups():
        members = chosen[(chosen >= start) & (chosen < start + group.sequences)] - start
        if len(members):
            rows = reader.read_stored(group)
            lengths, targets = np.diff(rows.row_starts), np.diff(rows.target_starts)
            empty = [start + int(m) for m in members if not targets[m]]
            if empty:
                yield None, empty
            scored = sorted((m for m in members.tolist() if targets[m]), key=lengths.__getitem__)
            for at in range(0, len(scored), batch_size):
                some = scored[at : at + batch_size]
                batch = collate([(rows, member) for member in some], layout, (0,))
                yield batch, [start + member for member in some]
        start += group.sequences


def _look_aligned(
    distiller: Distiller,
    some: AlignedBatch,
    device: str,
    aligner: Aligner,
    gathered: Gathered,
    chunks: Chunks,
    reader: CacheReader,
) -> None:
    """Gather the figures of a batch in the tokens of a model that has its own."""
    if some.batch is None:
        chunks.left_out += len(some.indices)
        return
    batch, has_entries = some.batch, reader.manifest.truncation.rule.has_entries
    assert batch.events is not None
    count_chunks(chunks, some.num_teacher, batch.events.sizes.numpy())
    owner = (batch.predictors // batch.input_ids.shape[1]).numpy()
    starts = np.searchsorted(owner, np.arange(len(some.indices) + 1))
    here = batch.to(device, non_blocking=False)
    found = distiller.with_logits(
        here,
        lambda logits_of: chunk_figures(
            logits_of, here, some.num_teacher, distiller.vocab_size, has_entries=has_entries
        ),
    )
    whole = {name: values.cpu().numpy() for name, values in found.items()}
    whole["bytes"] = aligner.matching.student.lengths[batch.labels.numpy()].astype(np.float64)
    _refuse_broken(whole["ce"], owner, some.indices)
    for at, sequence in enumerate(some.indices):
        own = {name: values[starts[at] : starts[at + 1]] for name, values in whole.items()}
        gathered.add(sequence, own | {"teacher_ce": some.teacher_ce[at]})


def _look(
    distiller: Distiller,
    batch: Batch,
    indices: list[int],
    gathered: Gathered,
    num_bytes: Tensor | None,
) -> None:
    """Gather the figures of a batch's targets; `num_bytes` [V] of each token, if known."""
    assert batch.stored is not None
    targets = batch.targets_at(1.0) if batch.stored.topk_lo.shape[1] else None
    assert targets is None or isinstance(targets, SparseTargets)
    size = rows_at_once(distiller.vocab_size)
    badness_of = "kl_forward" if targets is not None else "ce"
    parts: list[dict[str, Tensor]] = []
    length = batch.input_ids.shape[1]
    owner = (batch.predictors // length).cpu().numpy()
    starts = np.searchsorted(owner, np.arange(len(indices) + 1))

    def figures(logits_of: Callable[[slice], Tensor]) -> None:
        for start in range(0, batch.num_targets, size):
            rows = slice(start, min(start + size, batch.num_targets))
            logits_RV = logits_of(rows)[:, : distiller.vocab_size].float()
            some = None if targets is None else targets[rows]
            part = target_figures(logits_RV, batch.labels[rows], some)
            part["teacher_ce"] = -batch.label_logprob[rows].double()
            parts.append({name: values.cpu() for name, values in part.items()})
            _offer(logits_RV, parts[-1], start)

    def _offer(logits_RV: Tensor, part: dict[str, Tensor], start: int) -> None:
        """Hand on the worst targets of a chunk with the model's own entries."""
        badness = part[badness_of] if targets is not None else part["ce"] - part["teacher_ce"]
        count = min(gathered.num_worst, len(badness))
        for row in badness.topk(count).indices.tolist():
            if not float(badness[row]) > gathered.threshold:
                break
            probs, ids = logits_RV[row].softmax(0).topk(min(SHOWN, logits_RV.shape[1]))
            at = int(owner[start + row])
            candidate = Candidate(
                sequence=indices[at],
                target=start + row - int(starts[at]),
                figures={name: float(values[row]) for name, values in part.items()},
                token_ids=ids.tolist(),
                probabilities=probs.tolist(),
            )
            gathered.offer(float(badness[row]), candidate)

    distiller.with_logits(batch, figures)
    _refuse_broken(torch.cat([part["ce"] for part in parts]).numpy(), owner, indices)
    whole = {name: torch.cat([p[name] for p in parts]).numpy() for name in parts[0]}
    if num_bytes is not None:
        whole["bytes"] = num_bytes[batch.labels.cpu()].double().numpy()
    for at, sequence in enumerate(indices):
        own = slice(starts[at], starts[at + 1])
        gathered.add(sequence, {name: values[own] for name, values in whole.items()})


def _refuse_broken(ce: NDArray[np.float64], owner: NDArray[np.int64], indices: list[int]) -> None:
    """Raise ValueError where the model gives no finite log prob."""
    bad = np.flatnonzero(~np.isfinite(ce))
    if len(bad):
        raise ValueError(
            f"the model gives the actual token of {len(bad)} targets of sequence "
            f"{indices[owner[bad[0]]]} the log prob {-ce[bad[0]]}: its weights or its dtype "
            "(--dtype float32) do not work"
        )


def _report(
    path: str, model: Any, device: str, reader: CacheReader, gathered: Gathered, seed: int
) -> ModelReport:
    names = [key for key, figure in MEANS.items() if gathered.mean(figure) is not None]
    sums = np.stack([gathered.sums[MEANS[key]] for key in names], axis=1)
    counts = np.stack([gathered.counts[MEANS[key]] for key in names], axis=1)
    known = dict(zip(names, intervals(sums, counts, seed), strict=True))
    ce = gathered.mean("ce")
    assert ce is not None
    bins = gathered.bins["model"]
    return ModelReport(
        model=path,
        architecture=type(model).__name__,
        form=form_of(model, path),
        device=device,
        means={key: gathered.mean(figure) for key, figure in MEANS.items()},
        intervals={key: known.get(key) for key in MEANS},
        perplexity=_exp(ce),
        calibration_error=gathered.calibration_error("model"),
        spreads={name: gathered.spread(name) for name in ("kl_forward", "kl_reverse", "ce")},
        reliability=[
            (float(n), float(total / n), float(correct / n)) if n else (0.0, 0.0, 0.0)
            for n, correct, total in bins
        ],
        sequence_gap=gathered.sequence_gap(),
        worst_targets=_worst_targets(reader, gathered),
    )


def _worst_targets(reader: CacheReader, gathered: Gathered) -> tuple[WorstTarget, ...]:
    """The worst targets with their contexts and texts."""
    tokenizer = read_tokenizer(reader)
    found = []
    for candidate in gathered.worst():
        shown = target(reader[candidate.sequence], candidate.target, candidate.sequence, SHOWN)
        entries = tuple(
            Entry(token_id=token, text=None, probability=p)
            for token, p in zip(candidate.token_ids, candidate.probabilities, strict=True)
        )
        if tokenizer is not None:
            (shown,) = with_texts([shown], tokenizer)
            (texts,) = with_texts([dataclasses.replace(shown, entries=entries)], tokenizer)
            entries = texts.entries
        figures = candidate.figures
        found.append(
            WorstTarget(
                target=shown,
                kl_forward=figures.get("kl_forward"),
                kl_reverse=figures.get("kl_reverse"),
                model_probability=math.exp(-figures["ce"]),
                model_entries=entries,
            )
        )
    return tuple(found)


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
