"""Shares of several models as bars with the whiskers of their intervals: one SVG element, without any library. Knows no report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLORS = ("#2a6fbb", "#d9822b", "#3a9d5d", "#8e44ad", "#c0504d", "#17a2b8", "#b8860b", "#7a7a7a")
_LEFT, _WIDTH, _ROW, _BAR, _GAP = 150, 560, 18, 11, 12


@dataclass(frozen=True)
class Bar:
    """Of 0 to 1. text: shown where the pointer is."""

    value: float
    low: float
    high: float
    text: str


def bars(groups: Sequence[str], models: Sequence[tuple[str, Mapping[str, Bar]]]) -> str:
    """A legend and the plot: from 0 to 100 %, a group of bars each, in it one bar for each model that has one. Empty without groups."""
    if not groups:
        return ""
    height = len(groups) * (len(models) * _ROW + _GAP) + 24
    shapes = []
    for tick in range(0, 101, 25):
        x = _LEFT + _WIDTH * tick / 100
        shapes.append(f'<line x1="{x}" y1="0" x2="{x}" y2="{height - 20}" stroke="#8885"/>')
        place = f'x="{x}" y="{height - 6}" text-anchor="middle" font-size="11"'
        shapes.append(f'<text {place} fill="currentColor">{tick} %</text>')
    y = 4
    for group in groups:
        place = f'x="{_LEFT - 8}" y="{y + len(models) * _ROW / 2 + 4}" text-anchor="end" font-size="12"'
        shapes.append(f'<text {place} fill="currentColor">{escape(group)}</text>')
        for i, (name, found) in enumerate(models):
            if (bar := found.get(group)) is not None:
                shapes.append(
                    f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH * bar.value:.1f}" height="{_BAR}" fill="{_color(i)}">'
                    f"<title>{escape(name)}: {escape(bar.text)}</title></rect>"
                    f'<line x1="{_LEFT + _WIDTH * bar.low:.1f}" y1="{y + _BAR / 2}" x2="{_LEFT + _WIDTH * bar.high:.1f}" '
                    f'y2="{y + _BAR / 2}" stroke="currentColor" stroke-width="1.5"/>'
                )
            y += _ROW
        y += _GAP
    legend = " ".join(f'<span style="color:{_color(i)}">■</span> {escape(name)}' for i, (name, _) in enumerate(models))
    size = f'viewBox="0 0 {_LEFT + _WIDTH + 30} {height}" width="{_LEFT + _WIDTH + 30}"'
    return f'<p>{legend}</p><svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(shapes)}</svg>'


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]
