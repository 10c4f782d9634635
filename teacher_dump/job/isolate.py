"""Score around the sequences that a teacher cannot score: they are found and named, not fatal.

Only what comes out of the engine is taken for the fault of a sequence, and only while the engine
still scores others: one that has broken down is not asked to reject a whole source.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from decant.schemas import ScoredSequence
from decant.teacher_dump.engines import Engine, EngineError
from decant.teacher_dump.engines.seam import OwnFault, SequenceError, Unavailable
from decant.teacher_dump.inputs.records import TokenSequence

log = logging.getLogger(__name__)

FEW = 3
"""Sequences of a shard that may always be rejected, unless none may."""


class TooManyRejected(EngineError):
    """More sequences than allowed cannot be scored."""


@dataclass(frozen=True, slots=True, eq=False)
class Rejection:
    """A sequence that the teacher cannot score."""

    sequence: TokenSequence
    error: Exception

    @property
    def reason(self) -> str:
        """What the teacher said of it."""
        if isinstance(self.error, EngineError):
            return str(self.error)
        return f"{type(self.error).__name__}: {self.error}"


def allowed_rejections(num_sequences: int, share: float) -> int:
    """How many sequences of a shard may be rejected: a share of them, and `FEW` unless it is 0."""
    return max(FEW, int(share * num_sequences)) if share else 0


class Isolator:
    """An engine that goes on after a sequence it cannot score."""

    def __init__(self, engine: Engine, max_rejected: float) -> None:
        """`max_rejected` is the share of the sequences given at a time; 0: none at all."""
        self._engine, self._max_rejected = engine, max_rejected
        self._good: TokenSequence | None = None  # the engine has scored it

    def score(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence | Rejection]:
        """Each sequence scored or rejected, in the order given; arguments as in `Engine.score`.

        A SequenceError rejects that sequence. After any other exception what is left is scored in
        halves, again and again, until one sequence fails alone. It is rejected if the engine can
        still score another. Raises TooManyRejected beyond `max_rejected`, EngineError
        if the engine has scored nothing, and what it raised if it scores nothing any more.
        """
        allowed = allowed_rejections(len(sequences), self._max_rejected)
        rejected: list[Rejection] = []
        held: list[Rejection] = []  # until the engine has shown that it can score anything
        for result in self._each(sequences, first_sequence):
            if isinstance(result, Rejection):
                rejected.append(result)
                held.append(result)
                if len(rejected) > (allowed if self._trusts(rejected) else min(allowed, FEW)):
                    self._refuse(rejected, len(sequences), allowed)
                log.warning("sample %s is rejected: %s", result.sequence.sample_id, result.reason)
            if self._trusts(rejected):
                yield from held
                held.clear()
            if isinstance(result, ScoredSequence):
                yield result
        if held:
            self._refuse(rejected, len(sequences), allowed)

    def _trusts(self, rejected: list[Rejection]) -> bool:
        """Whether the engine can score something, or these say nothing of that."""
        return self._good is not None or all(isinstance(r.error, OwnFault) for r in rejected)

    def _each(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence | Rejection]:
        """As `score`, without a limit."""
        left: list[range | Rejection] = [range(len(sequences))]  # in reverse
        while left:
            todo = left.pop()
            if isinstance(todo, Rejection):
                yield todo
                continue
            at = todo.start
            try:
                for scored in self._engine.score(
                    sequences[at : todo.stop], first_sequence + todo.start
                ):
                    at += 1
                    self._good = self._good or sequences[at - 1]
                    yield scored
                if at < todo.stop:
                    raise EngineError(f"the engine gave {at} results for {todo.stop} sequences")
            except SequenceError as error:
                bad = todo.start + error.index
                assert at <= bad < todo.stop
                left += [range(bad + 1, todo.stop), Rejection(sequences[bad], error)]
                left += [range(at, bad)]
            except Unavailable:
                raise
            except Exception as error:  # whatever a model's code or a device may raise
                rest = range(at, todo.stop)
                if len(rest) > 1:
                    half = (rest.start + rest.stop + 1) // 2
                    log.warning(
                        "the teacher fails on %d sequences, scoring them in halves: %s: %s",
                        len(rest),
                        type(error).__name__,
                        error,
                    )
                    left += [range(half, rest.stop), range(rest.start, half)]
                else:
                    self._refuse_breakdown(error)
                    left.append(Rejection(sequences[at], error))
            left = [entry for entry in left if isinstance(entry, Rejection) or entry]

    def _refuse_breakdown(self, error: Exception) -> None:
        """Raise the error if the engine cannot score now what it could before."""
        if self._good is None:
            return
        try:
            for _ in self._engine.score([self._good], 0):
                pass
        except Exception:
            raise error from None

    def _refuse(self, rejected: list[Rejection], num_sequences: int, allowed: int) -> NoReturn:
        """Stop the dump."""
        error = rejected[-1].error
        if not self._good and not isinstance(error, SequenceError):
            if isinstance(error, EngineError):
                raise error
            raise EngineError(
                f"the teacher scores nothing: {type(error).__name__}: {error}"
            ) from error
        what = f"sample {rejected[-1].sequence.sample_id} cannot be scored: {rejected[-1].reason}"
        if not allowed:
            what += " (max_rejected: 0 stops at the first such sample)"
        elif not self._good:
            what = f"the teacher scores none of the first {len(rejected)} sequences; {what}"
        else:
            what = (
                f"{len(rejected)} of the {num_sequences} sequences of a shard cannot be scored, "
                f"max_rejected: {self._max_rejected} allows {allowed}; the last of them: {what}"
            )
        raise TooManyRejected(what) from error
