"""Two kinds of small charts as SVG, so that a plot is a text file that any browser shows and a diff can be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

COLOURS = ("#1f6f8b", "#d1495b", "#66a182", "#8d6a9f", "#edae49")
_FONT = 'font-family="sans-serif" font-size="12"'


def bars(title: str, values: Mapping[str, float], unit: str) -> str:
    """Horizontal bars from zero, one a line, in the order given."""
    width, left, row = 720, 250, 24
    height = 40 + row * len(values) + 10
    longest = max(values.values(), default=1.0) or 1.0
    parts = [_text(10, 22, title, weight="bold")]
    for index, (label, value) in enumerate(values.items()):
        y = 40 + row * index
        length = (width - left - 110) * value / longest
        parts.append(_text(left - 8, y + 13, label, anchor="end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{row - 8}" fill="{COLOURS[0]}"/>')
        parts.append(_text(left + length + 6, y + 13, f"{value:.3g} {unit}"))
    return _svg(width, height, parts)


def lines(
    title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, float]]], *, mark: float = 0.0
) -> str:
    """Lines over a logarithmic x axis, ticks where points are; a dashed level at `mark`."""
    width, height, left, right, top, bottom = 720, 380, 70, 130, 40, 50
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points] + [mark]
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.06 or 1.0
    low, high = low - margin, high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log(x) - math.log(xs[0])) / ((math.log(xs[-1]) - math.log(xs[0])) or 1.0)
        return left + share * (width - left - right), top + (high - y) / (high - low) * (height - top - bottom)

    parts = [_text(10, 22, title, weight="bold"), _text(left, height - 10, x_label), _text(10, 38, y_label)]
    for x in xs:
        parts.append(_text(at(x, low)[0], height - bottom + 18, f"{x:g}", anchor="middle"))
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 7)
    for index in range(math.ceil(low / step), math.floor(high / step) + 1):
        y = at(xs[0], index * step)[1]
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y + 4, f"{index * step:.4g}", anchor="end"))
    y = at(xs[0], mark)[1]
    parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#555" stroke-dasharray="5 4"/>')
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [at(x, y) for x, y in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts.append(f'<rect x="{width - right + 14}" y="{top + 20 * index}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(width - right + 32, top + 11 + 20 * index, name))
    return _svg(width, height, parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {_FONT} text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"
