"""The plan of a cache whose sequences are there already."""

from collections.abc import Iterable, Sequence

from decant.schemas import ScoredSequence, ShardPlan


def plan_of(shards: Iterable[Sequence[ScoredSequence]]) -> list[ShardPlan]:
    """The plan of a cache that holds these sequences in these shards."""
    plan: list[ShardPlan] = []
    first = 0
    for index, sequences in enumerate(shards):
        plan.append(
            ShardPlan(
                shard=index,
                first_sequence=first,
                num_sequences=len(sequences),
                num_tokens=sum(len(s.input_ids) for s in sequences),
                num_targets=sum(s.num_targets for s in sequences),
                input_xxh3_128="",
            )
        )
        first += len(sequences)
    return plan
