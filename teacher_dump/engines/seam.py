"""What every teacher engine offers, how it is configured, and how one is opened."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from decant.schemas import ScoredSequence
from decant.teacher_dump.inputs.records import TokenSequence


class EngineError(ValueError):
    """The engine cannot do what is asked, or the teacher gave something unusable."""


class SequenceError(EngineError):
    """The teacher cannot score one sequence, at `index` of those given; the others it can."""

    def __init__(self, message: str, index: int) -> None:
        """Remember which."""
        super().__init__(message)
        self.index = index


class OwnFault(SequenceError):
    """It cannot be scored whatever the state of the teacher, which is not asked."""


class Unavailable(EngineError):
    """The teacher cannot be had, whatever it is asked: no sequence is at fault."""


def refuse_overlong(sequence: TokenSequence, max_length: int) -> None:
    """Raise EngineError if a sequence is longer than the teacher reads."""
    length = len(sequence.input_ids)
    if length > max_length:
        raise EngineError(
            f"sample {sequence.sample_id} has {length} tokens, this teacher reads at most "
            f"{max_length}; lower max_length"
        )


def not_finite(sequence: TokenSequence, index: int) -> SequenceError:
    """The error that names the sequence, at `index` of those given."""
    return SequenceError(
        f"the teacher gives NaN or infinite logits for sample {sequence.sample_id}; "
        "try teacher.dtype: float32, and look at the record",
        index,
    )


class Engine(Protocol):
    """A loaded teacher."""

    @property
    def dtype(self) -> str:
        """What it computes in: float32, bfloat16 or float16; auto where that is not known."""
        ...

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
    with_logprobs: bool = False
    """Whether responses come with the log probs of their tokens."""


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
    logprobs: NDArray[np.float32] | None = None
    """[R] nats: of each token given what is before it, over the `vocab_size` ids, at T=1 and before
    top-p, if they were asked for."""


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
