"""The batches of held-out sequences."""

from collections.abc import Iterator

from decant.student_train.data.batch import Batch
from decant.student_train.data.stream import CacheStream, Found


def heldout_batches(
    stream: CacheStream,
) -> Iterator[tuple[Batch, bool]]:
    """One pass over a stream's part in stored order: this rank's batches, and whether each counts.

    Every rank gets the same number of batches; a batch that does not count repeats an earlier one,
    so that models which communicate in their forward stay in step.
    """
    share = -(-stream.num_sequences // (stream.batch_size * stream.world_size))
    given = 0
    pending: list[Found] = []
    batch: Batch | None = None
    position = 0
    for group, where in enumerate(stream.reader.row_groups()):
        members = stream.order.members(group)
        if not len(members):
            continue
        rows = stream.read(where)
        for index in members.tolist():
            found = Found(rows, index, 0)
            if position // stream.batch_size % stream.world_size == stream.rank:
                pending.append(found)
            elif batch is None:  # a rank without a share still needs something to repeat
                batch = stream.collate([found])
            position += 1
            if len(pending) == stream.batch_size:
                batch = stream.collate(pending)
                pending = []
                given += 1
                yield batch, True
    if pending:
        batch = stream.collate(pending)
        given += 1
        yield batch, True
    while given < share:
        assert batch is not None
        given += 1
        yield batch, False
