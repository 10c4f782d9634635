"""Cut sequences into windows of at most so many tokens."""

from collections.abc import Iterator, Sequence

from decant.teacher_dump.engines.seam import refuse_overlong
from decant.teacher_dump.inputs.records import TokenSequence


def windows(
    sequences: Sequence[TokenSequence], max_tokens: int, *, max_length: int = 0
) -> Iterator[tuple[int, Sequence[TokenSequence]]]:
    """Neighbours that together have at most `max_tokens`, and the index of the first.

    A sequence that alone has more is a window of its own. With `max_length`, raises EngineError at
    a sequence that is longer.
    """
    start = tokens = 0
    for index, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        if max_length:
            refuse_overlong(sequence, max_length)
        if tokens and tokens + length > max_tokens:
            yield start, sequences[start:index]
            start, tokens = index, 0
        tokens += length
    if start < len(sequences):
        yield start, sequences[start:]
