"""The sampled sequences, scored by a teacher of today."""

from collections.abc import Callable
from dataclasses import dataclass

from decant.schemas import Manifest, ScoredSequence, Truncation
from decant.teacher_dump.audit.report import Finding
from decant.teacher_dump.engines import TeacherConfig, open_engine
from decant.teacher_dump.engines.seam import SequenceError
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.teacher import Teacher

LIVE_ENTRIES = 256
"""Live entries per target, at least; twice the cache's slots where that is more."""


@dataclass(frozen=True, slots=True, eq=False)
class Live:
    """What of a sample the teacher could score."""

    cached: list[ScoredSequence]
    """As the cache has it."""
    together: list[ScoredSequence]
    """Scored in common batches."""
    alone: list[ScoredSequence]
    """Scored one by one, if that was asked for."""
    failed: list[Finding]
    """One for each of the others."""
    dtype: str
    """What the teacher computed in."""


def score_live(
    config: TeacherConfig,
    teacher: Teacher,
    manifest: Manifest,
    cached: list[ScoredSequence],
    progress: Callable[[int, int], None] | None = None,
    temperatures: tuple[float, ...] = (),
) -> Live:
    """The sample scored in common batches and, if there is `progress`, one by one too.

    Neighbours of the targets are scored as well, so that a shift can be recognised. Raises
    EngineError if the teacher can score none.
    """
    slots = manifest.truncation.slots
    entries = min(manifest.shared_vocab_size, max(LIVE_ENTRIES, 2 * slots))
    if teacher.sample_entries:
        entries = min(entries, max(teacher.sample_entries, slots))
    engine = open_engine(
        config,
        teacher.model_path,
        vocab_size=manifest.shared_vocab_size,
        truncation=Truncation(k=entries),
        temperatures=temperatures or manifest.temperatures,
        max_length=max(len(s.input_ids) for s in cached),
        fingerprint=teacher.info.fingerprint,
        tokenizer=teacher.tokenizer,
    )
    inputs = []
    for s in cached:
        near = s.is_target.copy()
        near[:-1] |= s.is_target[1:]
        near[1:] |= s.is_target[:-1]
        near[0] = False
        inputs.append(TokenSequence(s.sample_id, s.input_ids, near))
    together: list[ScoredSequence] = []
    alone: list[ScoredSequence] = []
    failed: list[Finding] = []
    cached, dtype = list(cached), engine.dtype
    try:
        while (done := len(together)) < len(inputs):
            try:
                for live in engine.score(inputs[done:], done):
                    together.append(live)
                    if progress:
                        progress(len(together), 2 * len(inputs))
            except SequenceError as error:
                bad = done + error.index
                failed.append(Finding(kind="unscored", text=str(error)))
                if len(inputs) == 1:
                    raise
                del inputs[bad], cached[bad]
        for index, sequence in enumerate(inputs if progress else []):
            alone += engine.score([sequence], index)
            if progress:
                progress(len(inputs) + len(alone), 2 * len(inputs))
    finally:
        engine.close()
    return Live(cached, together, alone, failed, dtype)
