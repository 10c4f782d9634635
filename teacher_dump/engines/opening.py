"""What every engine that samples responses offers, and how one is opened.

Knows nothing about records, templates or text: token ids in, token ids out. A response depends on
its prompt, its seed and the settings; what else runs beside it may move it by rounding alone, so
that equal calls give equal answers.
"""

import functools
from collections.abc import Callable
from typing import Any

from decant.schemas import Truncation
from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.seam import Engine, EngineError, Generator, Sampling

GENERATING_ENGINES = ("transformers", "vllm", "openai")

ANSWERS_ALONE = (
    "teacher.api chat gives log probs of what it generates alone, and can score nothing that is "
    "given"
)


def refuse_answers_alone(config: TeacherConfig) -> None:
    """Raise EngineError for a teacher that cannot score what is given."""
    if config.is_chat:
        raise EngineError(
            f"{ANSWERS_ALONE}: use a server of the same model that scores prompts (teacher.api: "
            "auto), or another engine"
        )


def check_engine(config: TeacherConfig, model_path: str) -> list[str]:
    """Raise EngineError for what would fail when the teacher is loaded, as far as can be told now.

    Reads no weights. Returns warnings about what works, but slowly.
    """
    if config.engine == "transformers":
        from decant.teacher_dump.engines.transformers.check import check

        return check(config, model_path)
    if config.engine == "vllm":
        from decant.teacher_dump.engines.vllm.process import require_vllm

        require_vllm()
    return []


def open_generator(
    config: TeacherConfig,
    model_path: str,
    *,
    sampling: Sampling,
    max_length: int,
    tokenizer: Any | None = None,
) -> Generator:
    """Load the teacher at local path `model_path` for sampling, in the engine that `config` names.

    `max_length` is the longest prompt with its response, in tokens; engine openai needs the
    teacher's `tokenizer`. Raises EngineError if the engine is not installed or cannot sample.
    """
    chosen: Callable[..., Generator]
    if config.engine == "transformers":
        from decant.teacher_dump.engines.transformers.generate import TransformersGenerator

        chosen = TransformersGenerator
    elif config.engine == "vllm":
        try:
            from decant.teacher_dump.engines.vllm.generate import VllmGenerator
        except ModuleNotFoundError as error:
            raise EngineError(
                f"source.generate with teacher.engine vllm needs {error.name}, which is not "
                "installed here: use teacher.engine transformers, or pip install 'decant[vllm]'"
            ) from error
        chosen = VllmGenerator
    elif config.engine == "openai":
        from decant.teacher_dump.engines.openai.generate import OpenAIGenerator

        chosen = functools.partial(OpenAIGenerator, tokenizer=tokenizer)
    else:
        raise EngineError(
            f"source.generate cannot sample with teacher.engine {config.engine}: set one of "
            f"{GENERATING_ENGINES}, and score with another engine from the cache's generated text"
        )
    return chosen(config, model_path, sampling=sampling, max_length=max_length)


def open_engine(
    config: TeacherConfig,
    model_path: str,
    *,
    vocab_size: int,
    truncation: Truncation,
    temperatures: tuple[float, ...],
    max_length: int,
    fingerprint: str = "",
    tokenizer: Any | None = None,
) -> Engine:
    """Load the teacher at local path `model_path` in the configured engine.

    With engines http and openai there is no path; the servers' teacher must have this
    `fingerprint`, if one is given, and openai needs its `tokenizer`. `vocab_size` is the shared
    vocabulary: logits beyond it are cut before normalisation. `max_length` is the longest sequence
    that will be scored. Raises EngineError if the engine is not installed or cannot give this
    truncation or these temperatures.
    """
    refuse_answers_alone(config)
    if truncation.slots > vocab_size:
        raise EngineError(f"truncation keeps {truncation.slots} entries of {vocab_size} ids")
    chosen: Callable[..., Engine]
    if config.engine == "http":
        from decant.teacher_dump.engines.http.engine import HttpEngine

        chosen = functools.partial(HttpEngine, config, fingerprint)
    elif config.engine == "openai":
        from decant.teacher_dump.engines.openai.engine import OpenAIEngine

        chosen = functools.partial(OpenAIEngine, config, fingerprint, tokenizer)
    elif config.engine == "vllm":
        from decant.teacher_dump.engines.vllm.engine import VllmEngine

        chosen = functools.partial(VllmEngine, config, model_path)
    else:
        from decant.teacher_dump.engines.transformers.engine import TransformersEngine

        chosen = functools.partial(TransformersEngine, config, model_path)
    return chosen(
        vocab_size=vocab_size,
        truncation=truncation,
        temperatures=temperatures,
        max_length=max_length,
    )
