"""What every teacher engine offers, how it is configured, and how one is opened."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas import ScoredSequence, Truncation
from teacher_dump.sequences import TokenSequence

ENGINES = ("transformers", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class EngineError(ValueError):
    """The engine cannot do what is asked, or the teacher gave something unusable."""


class SequenceError(EngineError):
    """The teacher cannot score one sequence, at `index` of those given; the others it can."""

    def __init__(self, message: str, index: int) -> None:
        """Remember which."""
        super().__init__(message)
        self.index = index


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The teacher and the engine that runs it."""

    path: str
    """Directory of a causal language model in transformers format, or a hub id."""
    revision: str = ""
    """Branch, tag or commit of a hub id."""
    tokenizer: str = ""
    """Path of the tokenizer; the teacher's own by default. "none": the source holds ready ids."""
    engine: str = "transformers"
    """transformers | vllm."""
    dtype: str = "auto"
    """Computation dtype: auto (as saved) | float32 | bfloat16 | float16."""
    device: str = "auto"
    """transformers: a torch device, or auto (GPUs if there are any, through accelerate)."""
    attention: str = ""
    """transformers: attention implementation (sdpa, eager, flash_attention_2); "" = its default."""
    max_batch_tokens: int = 8192
    """Tokens per forward, padding included; also bounds memory."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("teacher.path is empty; it must name a model")
        for name, allowed in (("engine", ENGINES), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"teacher.{name} {getattr(self, name)!r} is not one of {allowed}")
        if self.max_batch_tokens < 1:
            raise ValueError(f"teacher.max_batch_tokens is {self.max_batch_tokens}, must be >= 1")
        if self.engine != "transformers" and (self.attention or self.device != "auto"):
            raise ValueError(
                f"teacher.attention and device have no effect with engine {self.engine}"
            )


class Engine(Protocol):
    """A loaded teacher."""

    def score(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence]:
        """The scored sequences in the order given.

        `first_sequence` is the plan index of `sequences[0]`; random draws depend on it.
        Raises SequenceError if the teacher gives NaN or infinite logits for one of them; for
        anything else EngineError or what the engine's library raises. May be called again
        afterwards, with what was not yielded yet.
        """
        ...

    def close(self) -> None:
        """Free the teacher."""
        ...


def open_engine(
    config: TeacherConfig,
    model_path: str,
    *,
    vocab_size: int,
    truncation: Truncation,
    temperatures: tuple[float, ...],
    max_length: int,
) -> Engine:
    """Load the teacher at local directory `model_path` behind the configured engine.

    `vocab_size` is the shared vocabulary: logits beyond it are cut before normalisation.
    `max_length` is the longest sequence that will be scored. Raises EngineError if the engine is
    not installed or cannot give this truncation or these temperatures.
    """
    if truncation.slots > vocab_size:
        raise EngineError(f"truncation keeps {truncation.slots} entries of {vocab_size} ids")
    chosen: Callable[..., Engine]
    if config.engine == "vllm":
        from teacher_dump.engines.vllm_engine import VllmEngine

        chosen = VllmEngine
    else:
        from teacher_dump.engines.transformers_engine import TransformersEngine

        chosen = TransformersEngine
    return chosen(
        config,
        model_path,
        vocab_size=vocab_size,
        truncation=truncation,
        temperatures=temperatures,
        max_length=max_length,
    )
