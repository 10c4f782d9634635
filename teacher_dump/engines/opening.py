"""What every engine that samples responses offers, and how one is opened.

Knows nothing about records, templates or text: token ids in, token ids out. A response depends on
its prompt, its seed and the settings; what else runs beside it may move it by rounding alone, so
that equal calls give equal answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from decant.teacher_dump.engines.seam import EngineError, TeacherConfig

GENERATING_ENGINES = ("transformers", "vllm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How every response is sampled."""

    temperature: float
    """Divides the logits; 0 takes the most probable token."""
    top_p: float
    """Draw from the smallest set of most probable tokens whose mass, after the temperature, reaches
    this; 1 is all."""
    stop_ids: tuple[int, ...]
    """A response ends with the first of these, which is part of it."""
    vocab_size: int
    """Ids from here on are padding of the output layer and never drawn."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """What one response is asked of."""

    token_ids: NDArray[np.int32]
    """[P], P >= 1."""
    max_new_tokens: int
    """At least 1; P + max_new_tokens is at most the generator's max_length."""
    seed: int
    """Of this response, in [0, 2^63)."""
    name: str = "a prompt"
    """What an error calls it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Response:
    """One sampled response."""

    token_ids: NDArray[np.int32]
    """[R], 1 <= R <= max_new_tokens; the stop token is included if it was drawn."""
    finish_reason: str
    """stop (the last token is one of `stop_ids`) | length."""


class Generator(Protocol):
    """A loaded teacher that samples."""

    def generate(self, prompts: Sequence[Prompt]) -> list[Response]:
        """One response per prompt, in the order given.

        The same prompts in the same order give the same responses, in another process too. Raises
        EngineError, which names the prompt where that is known, if the teacher gives no usable
        logits.
        """
        ...

    def close(self) -> None:
        """Free the teacher."""
        ...


def open_generator(
    config: TeacherConfig, model_path: str, *, sampling: Sampling, max_length: int
) -> Generator:
    """Load the teacher at local directory `model_path` for sampling, behind `config.engine`.

    `max_length` is the longest prompt with its response, in tokens. Raises EngineError if the
    engine is not installed or cannot sample.
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
                "installed here: use teacher.engine transformers, or see 'Engines' in the README"
            ) from error
        chosen = VllmGenerator
    else:
        raise EngineError(
            f"source.generate cannot sample with teacher.engine {config.engine}: set one of "
            f"{GENERATING_ENGINES}, and score with another engine from the cache's generated text"
        )
    return chosen(config, model_path, sampling=sampling, max_length=max_length)
