"""A plan as text."""

import textwrap

from decant.storage.cli.terminal import WIDTH
from decant.storage.inspect.budget import SURE
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.planning.predict import Prediction
from decant.teacher_dump.progress import duration


def plan_text(prediction: Prediction, config: DumpConfig) -> str:
    """The prediction as a table for a terminal."""
    p, counts = prediction, prediction.counts
    lines = [
        f"records              {counts.records:,} ({counts.truncated_records:,} truncated, "
        f"{counts.split_records:,} split, {counts.records_without_targets:,} without targets)",
        f"sequences, tokens    {counts.sequences:,}, {counts.tokens:,} "
        f"({counts.dropped_tokens:,} tokens dropped)",
        f"targets, shards      {counts.targets:,}, {p.shards:,}",
        f"bytes                {p.bytes / 1e6:,.1f} MB, {p.bytes_per_target:.1f} per target",
    ]
    if p.disk_free is not None:
        lines.append(f"free at the output   {p.disk_free / 1e6:,.1f} MB")
    if p.generate_hours is not None:
        lines.append(
            f"sampling             {duration(3600 * p.generate_hours)}; the counts above are "
            f"estimated from one response to each of {p.sample_sequences} prompts"
        )
    for timed in p.engines:
        said = f"{timed.engine}: not measured: {timed.problem}"
        if not timed.problem:
            said = (
                f"{duration(3600 * timed.hours)} at {timed.targets_per_second:,.0f} targets/s, "
                f"{timed.load_seconds:.0f} s to load included: {timed.engine}"
            )
        lines.append(f"time                 {said}")
    lines.append(
        f"from a sample of     {p.sample_sequences} sequences, {p.sample_targets:,} targets, "
        "by file and length"
    )
    lines.append(f"cross-entropy        {p.cross_entropy:.3f} nats per target, the teacher's own")
    if p.mass is not None:
        lines.append(f"retained mass        {p.mass:.4f} with the configured truncation")
    lines += [
        "",
        "      k  retained mass: mean      ±      5 % smallest KL, nats      ± bytes/target     MB",
    ]
    for at in p.ladder:
        lines.append(
            f"{at.k:7d}{at.mass_mean:21.4f} {_half(at.mass_error)} {at.mass_low:8.4f} "
            f"{at.mass_least:8.4f} {at.kl:8.4f} {_half(at.kl_error)} {at.bytes_per_target:12.1f} "
            f"{at.bytes / 1e6:6,.1f}"
        )
    lines += ["", *_notes(p, config)]
    lines += [f"warning: {warning}" for warning in p.warnings]
    return "\n".join(lines)


def _half(error: float | None) -> str:
    """Half of a 95 % interval."""
    return f"{'-':>6}" if error is None else f"{SURE * error:6.4f}"


def _notes(p: Prediction, config: DumpConfig) -> list[str]:
    """What the table does not say of itself, and what a budget asks for."""
    reference = f"k={p.reference_k}"
    if config.teacher.engine == "openai":
        reference += ", all that was asked of the server"
    said = (
        f"KL: what k entries cost against {reference}, forward KL per target; ±: 95 %, by what "
        "differs between sequences."
    )
    if p.beyond_reference:
        said += f" k={p.reference_k} itself may cost up to {p.beyond_reference:.3g} nats more"
        said += " against the whole vocabulary."
    if p.recommendation:
        budget = f"budget: {p.recommendation}"
    else:
        budget = "which k is worth its bytes? --max-bytes 80, --max-bytes 200GB or --max-nats 0.5"
    return [*textwrap.wrap(said, WIDTH), *textwrap.wrap(budget, WIDTH, subsequent_indent="  ")]
