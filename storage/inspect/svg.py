"""Bars and lines as SVG."""

import math
from collections.abc import Sequence
from html import escape

from decant.storage.inspect.report import Histogram

LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 44, 10, 8, 22, 360, 180


def share_bar(share: float) -> str:
    """A bar as long as a share in [0, 1]."""
    width = 120
    return (
        f'<svg viewBox="0 0 {width} 10" style="width:{width}px" aria-hidden="true">'
        f'<rect class="one" width="{width * max(share, 0):.1f}" height="10"/></svg>'
    )


def _svg(content: str, label: str, low: str, high: str, top: str) -> str:
    """A frame with three labels: both ends of the x axis and the top of the y axis."""
    base = HEIGHT - BOTTOM
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'<path class="axis" d="M{LEFT} {TOP}V{base}H{WIDTH - RIGHT}"/>{content}'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{low}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{high}</text>'
        f'<text x="{LEFT - 4}" y="{TOP + 9}" text-anchor="end">{top}</text>'
        f'<text x="{LEFT - 4}" y="{base}" text-anchor="end">0</text></svg>'
    )


def bar_chart(histogram: Histogram, label: str) -> str:
    """Bins side by side in equal widths, the share of all values as height."""
    total, top = sum(histogram.counts), max(histogram.counts)
    step = (WIDTH - LEFT - RIGHT) / len(histogram.counts)
    base, tall = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    bars = "".join(
        f'<rect class="one" x="{LEFT + i * step + 0.5:.1f}" y="{base - tall * count / top:.1f}" '
        f'width="{max(step - 1, 0.5):.1f}" height="{tall * count / top:.1f}">'
        f"<title>{low:.4g} to {high:.4g}: {count:,} ({count / total:.2%})</title></rect>"
        for i, (count, low, high) in enumerate(
            zip(histogram.counts, histogram.edges, histogram.edges[1:], strict=False)
        )
    )
    ends = (f"{histogram.edges[0]:.4g}", f"{histogram.edges[-1]:.4g}")
    return _svg(bars, label, *ends, f"{top / total:.0%}")


def line_chart(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    y_top: float | None = None,
    x_range: tuple[float, float] | None = None,
    x_ticks: tuple[str, str] | None = None,
    log_x: bool = False,
    diagonal: bool = False,
) -> str:
    """Lines through points; y starts at 0."""
    points = [point for _, line in series for point in line]
    low, high = x_range or (min(x for x, _ in points), max(x for x, _ in points))
    top = y_top or max(y for _, y in points) or 1.0
    tall, broad = HEIGHT - BOTTOM - TOP, WIDTH - LEFT - RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        if log_x:
            part = math.log(x / low) / (math.log(high / low) or 1)
        else:
            part = (x - low) / ((high - low) or 1)
        return LEFT + broad * part, TOP + tall * (1 - min(y / top, 1))

    content = ""
    if diagonal:
        content += f'<path class="axis" d="M{LEFT} {TOP + tall}L{LEFT + broad} {TOP}"/>'
    for name, line in zip(("one", "two"), series, strict=False):
        label, values = line
        radius = 2.5 if len(values) <= 32 else 1.2
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*value) for value in values))
        content += f'<polyline class="line {name}" points="{path}"/>'
        for x, y in values:
            at = place(x, y)
            content += (
                f'<circle class="{name}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius}">'
                f"<title>{escape(label)} at {x:.4g}: {y:.4g}</title></circle>"
            )
    ticks = x_ticks or (f"{low:.4g}", f"{high:.4g}")
    return _svg(content, ", ".join(name for name, _ in series), *ticks, _short(top))


def _short(value: float) -> str:
    """A number that fits beside an axis."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
