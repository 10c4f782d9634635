"""Does a cache say what the teacher says? Score a random sample again, live, and compare.

What the live teacher says of itself when the same sequences are batched otherwise is the tolerance;
nothing here is tuned to a model. A disagreement is tried against its usual causes, each of which
has a number that only it explains. Reads the cache, never writes.
Shapes: n targets, K slots of the cache, M live entries, T temperatures, V vocabulary.
"""

import dataclasses
import logging
from collections.abc import Callable

import numpy as np

from decant.schemas import check_same_tokenizer, tokenizer_fingerprint
from decant.storage import CacheReader
from decant.storage.cache.tokenizer_files import TokenizerFiles
from decant.teacher_dump.audit.causes import disagreements, find_causes, find_precision
from decant.teacher_dump.audit.compare import control_deviations
from decant.teacher_dump.audit.judge import (
    compare_quantities,
    find_unsteady,
    rounding_nats,
    tolerances_from,
)
from decant.teacher_dump.audit.report import AuditReport, Compared, Finding
from decant.teacher_dump.audit.scoring import score_live
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.config import DTYPES, QUANTIZATIONS, REMOTE
from decant.teacher_dump.engines.opening import refuse_answers_alone
from decant.teacher_dump.teacher import (
    Teacher,
    describe_teacher,
    fingerprint_like,
    hash_weights,
)

log = logging.getLogger(__name__)


UNKNOWN = "unknown"
"""Fingerprint of the teacher of an imported cache."""


def audit(
    url: str,
    config: TeacherConfig,
    *,
    sample: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AuditReport:
    """Compare `sample` random sequences of a cache, chosen by `seed`, with the teacher, live.

    `config.dtype` auto runs the dtype that the manifest names. `progress` gets sequences scored
    and to score. Raises ValueError (FormatError, EngineError) where nothing can be compared.
    """
    if sample < 1:
        raise ValueError(f"sample must be at least 1, found {sample}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, found {seed}")
    reader = CacheReader(url, allow_incomplete=True)
    manifest = reader.manifest
    if not len(reader):
        raise ValueError(f"{url}: no shard is committed yet; there is nothing to compare")
    dtype, _, quantization = manifest.teacher.dtype.partition("+")
    if config.dtype == "auto" and dtype in DTYPES and config.engine not in REMOTE:
        config = dataclasses.replace(config, dtype=dtype)
    if config.engine == "transformers" and quantization in QUANTIZATIONS:
        config = dataclasses.replace(config, quantization=quantization)
    refuse_answers_alone(config)
    teacher = hash_weights(describe_teacher(config), progress=log.info)
    findings, notes = _identity(reader, teacher)
    if not manifest.is_final:
        notes.append(Finding(kind="incomplete", text="the cache is not complete yet"))
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(reader), min(sample, len(reader)), replace=False)
    cached = [s for s in (reader[int(i)] for i in np.sort(chosen)) if s.num_targets]
    if not cached:
        raise ValueError(f"{url}: none of {len(chosen)} sequences chosen at random has a target")
    quantities: list[Compared] = []
    if teacher.info.vocab_size >= manifest.shared_vocab_size:
        scored = score_live(config, teacher, manifest, cached, progress)
        cached, live = scored.cached, scored.together
        findings += scored.failed
        control = [
            control_deviations(c, a, b, manifest)
            for c, a, b in zip(cached, live, scored.alone, strict=True)
        ]
        saved = teacher.info.dtype.partition("+")[2]
        dtype = "+".join(filter(None, (scored.dtype, saved)))
        rounding = rounding_nats(dtype)
        tolerances = tolerances_from(control, rounding)
        findings += find_unsteady(tolerances, rounding, dtype)
        quantities = compare_quantities(manifest, cached, live, tolerances)
        stored = manifest.teacher.fingerprint
        given = fingerprint_like(teacher.info.fingerprint, stored)
        differs = f"(fingerprint {stored} in the manifest, {given} given)"
        causes: list[Finding] = []
        if not all(q.agrees for q in quantities):
            causes = find_causes(config, teacher, manifest, cached, live, quantities)
            if not causes and stored not in (given, UNKNOWN):
                causes = [Finding(kind="teacher", text=f"another teacher {differs}")]
            elif not causes:
                precision = find_precision(config, teacher, manifest, cached, live, quantities)
                notes += precision
                causes = [] if precision else disagreements(quantities)
        if stored != given and not any(cause.kind == "teacher" for cause in causes):
            notes.append(Finding(kind="files", text=f"the teacher's files are others {differs}"))
        findings = causes + findings
    return AuditReport(
        url=reader.url,
        teacher=teacher.info.name,
        dtype=config.dtype,
        sequences=len(cached),
        targets=sum(s.num_targets for s in cached),
        quantities=tuple(quantities),
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _identity(reader: CacheReader, teacher: Teacher) -> tuple[list[Finding], list[Finding]]:
    """What a cache and a teacher say of tokenizer and vocabulary."""
    manifest = reader.manifest
    findings, notes = [], []
    rows, vocab_size = teacher.info.vocab_size, manifest.shared_vocab_size
    if rows < vocab_size:
        text = f"another vocabulary: the cache has {vocab_size} ids, the teacher {rows} output rows"
        findings.append(Finding(kind="vocabulary", text=text))
    stored = manifest.tokenizer.fingerprint
    given = ""
    if teacher.tokenizer is not None:
        given = tokenizer_fingerprint(teacher.tokenizer, like=stored)
    if not stored or not given:
        text = "tokenizers were not compared: the {} has none".format(
            "given teacher" if stored else "cache"
        )
        notes.append(Finding(kind="unknown", text=text))
    elif stored != given:
        try:
            kept = TokenizerFiles.of_cache(reader)
            same = check_same_tokenizer(kept, teacher.tokenizer, "cache", vocab_size=vocab_size)
            text = f"the given teacher's tokenizer means the same by every id: {same.text()}"
            notes.append(Finding(kind="tokenizer", text=text))
        except ValueError:  # another one, or none that can be read
            text = f"another tokenizer (fingerprint {stored} in the manifest, {given} given)"
            findings.append(Finding(kind="tokenizer", text=text))
    return findings, notes
