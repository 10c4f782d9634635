"""What differs between two caches, as text."""

from decant.storage.cli.terminal import WIDTH, clip, fit, width
from decant.storage.inspect.diff import Difference
from decant.storage.inspect.examples import context_shown, entries_shown, shown


def diff_text(found: Difference) -> str:
    """The difference for a terminal, at most 100 columns wide."""
    lines = [
        clip(f"A  {found.url_a}"),
        clip(f"B  {found.url_b}"),
        f"  {found.targets:,} targets of both in {found.sequences:,} sequences of the same tokens"
        + "".join(
            f"; {count:,} of {name} alone"
            for name, count in (("A", found.targets_only_a), ("B", found.targets_only_b))
            if count
        ),
    ]
    if not found.targets:
        return "\n".join(lines)
    if found.top1_agreement is not None:
        lines.append(f"  same first entry: {found.top1_agreement:.2%} of targets")
    if found.same_ids is not None:
        lines.append(
            f"  kept by both:     {found.same_ids:.2%} of the ids of the one that keeps fewer"
        )
    lines += [
        f"  cross-entropy on the data: A {found.teacher_ce_a:.4f}, B {found.teacher_ce_b:.4f} nats",
        "",
        f"  {'':<30}{'mean':>10}{'p50':>10}{'p95':>10}{'p99':>10}{'max':>10}",
    ]
    spreads = [
        ("label log prob, |A - B|", found.label_difference),
        ("entry log probs, max |A - B|", found.logprob_difference),
    ]
    for at in found.temperatures:
        suffix = f"T={at.temperature:.4g}"
        spreads += [
            (f"KL(A || B)* {suffix}", at.kl_ab),
            (f"KL(B || A)* {suffix}", at.kl_ba),
            (f"mass of A kept by both {suffix}", at.common_mass_a),
            (f"mass of B kept by both {suffix}", at.common_mass_b),
        ]
    for name, spread in spreads:
        if spread is not None:
            values = (spread.mean, spread.p50, spread.p95, spread.p99, spread.max)
            lines.append(f"  {name:<30}" + "".join(f"{value:>10.3g}" for value in values))
    if found.top1_agreement is None:
        return "\n".join([*lines, "  no KL: one of them stores no log probs of kept entries"])
    lines += [
        "  * nats; sum of p log(p/q) - p + q over the ids that both keep and one bucket for all",
        "    others: at most the KL over the vocabulary",
        "",
        "Where they differ most",
        f"  {'KL a,b':>7} {'KL b,a':>7} {'seq.':>7} {'pos.':>5}  {'context':<22} {'token':<10} "
        "top entries, A over B",
    ]
    for worst in found.worst_targets[:10]:
        start = (
            f"  {worst.kl_ab:>7.2g} {worst.kl_ba:>7.2g} {worst.a.sequence:>7} "
            f"{worst.a.position:>5}  {fit(context_shown(worst.a), 22, right=True)} "
            f"{fit(shown(worst.a.token, worst.a.token_id), 10)} "
        )
        lines.append(start + entries_shown(worst.a, WIDTH - width(start)))
        lines.append(" " * width(start) + entries_shown(worst.b, WIDTH - width(start)))
    return "\n".join(lines)
