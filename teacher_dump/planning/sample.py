"""The sample that a plan scores."""

import dataclasses
import time

import numpy as np

from decant.schemas.selection import num_selected
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.inputs.sequences import SequenceCounts
from decant.teacher_dump.inputs.sources import iter_records, source_names
from decant.teacher_dump.job.responses import prompts_for, questions
from decant.teacher_dump.job.sampler import open_sampler
from decant.teacher_dump.job.shard_inputs import sharded
from decant.teacher_dump.planning.stratified import Drawn, FileGroups, StratifiedSample
from decant.teacher_dump.progress import progress
from decant.teacher_dump.teacher import Teacher


def draw_sequences(
    config: DumpConfig, teacher: Teacher, counts: SequenceCounts, size: int
) -> tuple[list[Drawn], int]:
    """The sample, the same at every run, and how many shards there will be."""
    if config.sequences.overlong == "error":  # counted, where a dump stops at the first
        sequences = dataclasses.replace(config.sequences, overlong="truncate")
        config = dataclasses.replace(config, sequences=sequences)
    drawing = StratifiedSample(size)
    groups = FileGroups(source_names(config.source))
    records = groups.watch(iter_records(config.source))
    shards = 0
    with progress("tokenise", "sequences") as bar:

        def tokenised(counts: SequenceCounts) -> None:
            bar.to(counts.sequences)

        for shard in sharded(config, teacher, counts, tokenised, records):
            shards += 1
            for sequence in shard:
                drawing.offer(sequence, groups.of(sequence.sample_id))
    return drawing.draw(), shards


def draw_responses(
    config: DumpConfig, teacher: Teacher, counts: SequenceCounts, size: int
) -> tuple[list[Drawn], int, float]:
    """Responses to a sample of the prompts; how many shards, and hours to sample all, about."""
    drawing = StratifiedSample(size)
    groups = FileGroups(source_names(config.source))
    with progress("tokenise", "prompts") as bar:
        for question in questions(config, teacher, groups.watch(iter_records(config.source))):
            counts.records += 1
            counts.records_without_targets += not question.room
            bar.add(1)
            if question.room:
                one = np.arange(len(question.token_ids)) == 0  # every prompt counts the same
                prompt = TokenSequence(str(question.number), question.token_ids, one)
                drawing.offer(prompt, groups.of(question.record.sample_id))
    drawn = drawing.draw()
    if not drawn:
        return [], 0, 0.0
    start = time.monotonic()
    generator = open_sampler(config, teacher)
    try:
        loaded = time.monotonic() - start
        asked = [
            prompts_for(config, int(entry.sequence.sample_id), entry.sequence.input_ids)[0]
            for entry in drawn
        ]
        start = time.monotonic()
        with progress("generate", "prompts", total=len(asked)) as bar:
            responses = generator.generate(asked)
            bar.add(len(asked))
        seconds = time.monotonic() - start
    finally:
        generator.close()
    n = config.source.generate.n
    answered, sums = [], np.zeros(3)
    for entry, response in zip(drawn, responses, strict=True):
        ids = np.concatenate([entry.sequence.input_ids, response.token_ids])
        is_target = np.arange(len(ids)) >= len(entry.sequence.input_ids)
        is_target |= config.sequences.targets == "all"
        is_target[0] = False
        sampler = None
        if response.logprobs is not None:
            sampler = np.zeros(len(ids), np.float32)
            sampler[len(entry.sequence.input_ids) :] = response.logprobs
        sequence = TokenSequence(entry.sequence.sample_id, ids, is_target, "", sampler)
        answered.append(Drawn(sequence, entry.weight * n))
        kept = num_selected(int(is_target.sum()), config.sequences.target_share)
        sums += entry.weight * n * np.array([1, len(ids), kept])
    counts.sequences, counts.tokens, counts.targets = (round(value) for value in sums.tolist())
    shards = -(-counts.targets // config.shard_targets)
    hours = (loaded + seconds * counts.sequences / len(asked)) / 3600
    return answered, shards, hours
