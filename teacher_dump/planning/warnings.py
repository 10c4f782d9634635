"""What a dump would refuse, leave out, compute slowly, or not have room for."""

import os

from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.inputs.sequences import SequenceCounts
from decant.teacher_dump.job.isolate import allowed_rejections

INPUT_BYTES = 3
"""Bytes per token that wait in the output to be scored, about."""
LEAST_MASS = 0.5
"""Mean retained mass below which most of what a student learns from is one bucket."""


def of_records(config: DumpConfig, counts: SequenceCounts) -> list[str]:
    """Records that stop the dump or are left out."""
    found = []
    if config.sequences.overlong == "error" and counts.truncated_records:
        found.append(
            f"{counts.truncated_records:,} records are longer than max_length="
            f"{config.sequences.max_length}, and overlong: error stops the dump at the first: "
            "raise max_length, or set overlong to truncate or split"
        )
    if counts.records_without_targets:
        found.append(
            f"{counts.records_without_targets:,} of {counts.records:,} records have no target "
            "within max_length and are left out"
        )
    return found


def of_rejections(config: DumpConfig, rejected: int, sample: int, per_shard: float) -> list[str]:
    """Sequences that the teacher cannot score, of the sample and so of a shard."""
    if not rejected:
        return []
    found = [
        f"the teacher cannot score {rejected} of the sample's sequences: the dump leaves such "
        f"out and lists them, up to a share of max_rejected={config.max_rejected:g} per shard"
    ]
    if rejected / sample * per_shard > allowed_rejections(int(per_shard), config.max_rejected):
        found.append(
            f"{rejected} of {sample} is more than max_rejected allows: at that rate the dump "
            "will stop; raise it, or mend the records"
        )
    return found


def of_beginnings(bos: str, without: int, sequences: int) -> list[str]:
    """Sequences that begin `without` the bos token of a tokenizer that has one."""
    if not without:
        return []
    return [
        f"the tokenizer has a bos token, {bos!r}, and {without} of {sequences} sampled sequences "
        "do not begin with it: a teacher that was trained with it says little that is right "
        "without it; then set sequences.add_bos: true"
    ]


def of_masses(masses: dict[float, float]) -> list[str]:
    """Temperatures at which the kept entries hold less than half of the teacher's mass."""
    return [
        f"at temperature {temperature:g} the kept entries hold {mass:.2f} of the teacher's mass "
        "(mean), so most of what a student learns from there is one bucket for all the rest: raise "
        "k, or train at a lower temperature"
        for temperature, mass in masses.items()
        if mass < LEAST_MASS
    ]


def of_space(config: DumpConfig, num_bytes: int, tokens: int, free: int | None) -> list[str]:
    """A disk that is too small."""
    need = num_bytes + INPUT_BYTES * tokens
    if free is None or need <= free:
        return []
    return [
        f"the dump needs about {need / 1e6:,.0f} MB at {os.path.abspath(config.output)}, which "
        f"has {free / 1e6:,.0f} MB free: lower k, or choose another output"
    ]
