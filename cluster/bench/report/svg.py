"""A chart as one SVG element, without any library: axes, lines, legend. Knows charts; its colors work on light and dark pages."""

import math
from collections.abc import Sequence
from html import escape

from cluster.bench.report.charts import Chart

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 14, 44
COLORS = ("#3b82c4", "#d9822b", "#3d9a50", "#c0504d", "#8064a2", "#7a7a7a", "#17a2b8", "#b8860b")
_LEGEND_LINE = 16


def svg(chart: Chart) -> str:
    lines = [s for s in chart.series if s.xs]
    xs, ys = [x for s in lines for x in s.xs], [y for s in lines for y in s.ys]
    x_ticks = log_ticks(min(xs), max(xs)) if chart.is_log else ticks(0.0, max(xs))
    y_ticks = ticks(0.0, max(ys))
    height = HEIGHT + _LEGEND_LINE * len(lines)

    def x_of(value: float) -> float:
        low, high = x_ticks[0], x_ticks[-1]
        share = math.log(value / low) / math.log(high / low) if chart.is_log else (value - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        low, high = y_ticks[0], y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" fill="currentColor">',
        f"<title>{escape(chart.title)}</title>",
    ]
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick in x_ticks:
        x = x_of(tick)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label(tick)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(chart.y_label)}</text>'
    )
    for i, line in enumerate(lines):
        color = COLORS[i % len(COLORS)]
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(line.xs, line.ys, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        y = HEIGHT + _LEGEND_LINE * i + 4
        parts.append(f'<path d="M{LEFT} {y}h18" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{LEFT + 24}" y="{y + 4}">{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float) -> Sequence[float]:
    """About five round numbers from low to at least high: 0 to 37 has 0, 10, 20, 30, 40."""
    if high <= low:
        high = low + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> Sequence[float]:
    """Numbers 1, 2 and 5 times powers of ten that enclose low to high: 3 to 40 has 2, 5, 10, 20, 50."""
    candidates = [m * 10.0**e for e in range(-3, 9) for m in (1, 2, 5)]
    below = max((i for i, c in enumerate(candidates) if c <= low), default=0)
    above = min((i for i, c in enumerate(candidates) if c >= high), default=len(candidates) - 1)
    if above <= below:
        above = below + 1
    found = candidates[below : above + 1]
    # Too many labels would overlap; the ends stay.
    if len(found) > 10:
        found = [t for t in found if t in (found[0], found[-1]) or math.log10(t).is_integer()]
    return found


def label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
