"""The answer of an audit, as data and as text."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One thing that was compared, over all targets of the sample."""

    name: str
    unit: str
    """nats, mass, or sd (standard deviations of drawn counts)."""
    compared: int
    """Targets; ranks for draws."""
    median: float
    """Of the deviations, beyond what the stored precision explains."""
    p99: float
    max: float
    control_p99: float
    """The 99 % quantile of the live teacher against itself in other batches."""
    tolerance: float
    beyond: float
    """Share of what was compared that is beyond the tolerance."""
    sequences_beyond: int
    """Sequences most of whose targets do."""
    agrees: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a disagreement looks like, or a remark."""

    kind: str
    """shift, temperature, normalisation, teacher, tokenizer, vocabulary, unscored, control (the
    teacher disagrees with itself), or the name of a quantity; of notes: precision, files, unknown,
    incomplete."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """The outcome; the cache agrees with the teacher if there are no findings."""

    url: str
    teacher: str
    dtype: str
    """In which the live teacher ran; auto = as its weights are saved."""
    sequences: int
    """Scored again."""
    targets: int
    quantities: tuple[Compared, ...]
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether the cache agrees with the teacher."""
        return not self.findings


def report_text(report: AuditReport) -> str:
    """The report for a terminal, findings last."""
    width = max([len(q.name) for q in report.quantities], default=0)
    lines = [
        f"{report.url}: {report.sequences} sequences, {report.targets} targets scored again by "
        f"{report.teacher} ({report.dtype})"
    ]
    if report.quantities:
        lines.append(
            f"  {'':{width}}  unit {'median':>9}{'99 %':>9}{'largest':>9}{'control':>9}"
            f"{'tolerance':>11}{'beyond':>8}"
        )
    for q in report.quantities:
        lines.append(
            f"  {q.name:{width}}  {q.unit:4} {q.median:9.2g}{q.p99:9.2g}{q.max:9.2g}"
            f"{q.control_p99:9.2g}{q.tolerance:11.2g}{q.beyond:8.1%}"
        )
    lines += [f"note: {note.text}" for note in report.notes]
    lines += [finding.text for finding in report.findings]
    if report.ok:
        lines.append("the cache agrees with the teacher")
    return "\n".join(lines)
