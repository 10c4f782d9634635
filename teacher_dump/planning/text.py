"""A plan as text."""

from decant.storage.inspect.truncation_cost import TOLERANCE
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
        "      k   retained mass: mean      5 %   smallest    KL, nats  bytes/target      MB",
    ]
    for at in p.ladder:
        lines.append(
            f"{at.k:7d}{at.mass_mean:22.4f} {at.mass_low:8.4f} {at.mass_least:10.4f} "
            f"{at.kl:11.5f} {at.bytes_per_target:13.1f} {at.bytes / 1e6:7,.1f}"
        )
    lines += ["", _recommendation(p, config)]
    lines += [f"warning: {warning}" for warning in p.warnings]
    return "\n".join(lines)


def _recommendation(p: Prediction, config: DumpConfig) -> str:
    rule = f"costs at most {TOLERANCE:g} nats against k={p.reference_k}"
    if p.recommended_k is None and config.teacher.engine == "openai":
        return (
            f"no smaller k {rule}, which is what was asked of the server: keep that many, or "
            "serve the teacher with `decant serve` for more of it"
        )
    if p.recommended_k is None:
        return (
            f"no smaller k {rule}: keep that many, or take draws (truncation.method: topk+sample)"
        )
    text = f"recommended: k={p.recommended_k}, the smallest k of this table that {rule}"
    if p.beyond_reference > TOLERANCE / 10:
        text += f" (which may itself be up to {p.beyond_reference:.4f} from the teacher)"
    if config.truncation.rule.has_head and config.truncation.k < p.recommended_k:
        text += f"; configured is {config.truncation.k}"
    return text
