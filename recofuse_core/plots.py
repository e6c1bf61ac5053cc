"""Bar plots of an evaluation as one SVG text: a panel a score, a bar a method, the model's in colour.

SVG needs no plotting library, stays sharp at any size, and is shown by every browser and by code hosts.
"""

from collections.abc import Iterator, Mapping
from html import escape

from recofuse_core.evaluation import DEGRADED, FUSION_COLUMNS, MODEL, Figure, Report

LESS_IS_BETTER = frozenset({"noise", "chroma"})
RESTORATION_PANELS = {
    "vis_psnr_db": "vis PSNR, dB",
    "ir_psnr_db": "ir PSNR, dB",
    "vis_ssim": "vis SSIM",
    "ir_ssim": "ir SSIM",
}
COLUMNS = 4
_PANEL_WIDTH, _LABEL_WIDTH, _VALUE_WIDTH = 300, 110, 52  # px
_ROW, _BAR, _TITLE, _GAP, _MARGIN = 18, 12, 24, 22, 16
_COLOURS = {MODEL: "#c2410c", DEGRADED: "#9ca3af"}
_OTHER, _INK, _LINE = "#475569", "#111827", "#d1d5db"
_MAX_LABEL = 17  # letters


def bar_plots(report: Report) -> str:
    """The means of all pairs as an SVG document: restoration where there are references, then the fusion scores."""
    panels: list[tuple[str, dict[str, Figure]]] = []
    restored = {method: report.restoration_means(method) for method in report.restorers}
    if restored:
        panels += [(title, _column(restored, name)) for name, title in RESTORATION_PANELS.items()]
    fused = {method: report.fusion_means(method) for method in report.methods}
    if fused:
        for name, title in FUSION_COLUMNS.items():
            note = " (less is better)" if name in LESS_IS_BETTER else ""
            panels.append((title + note, _column(fused, name)))
    height_of = [_TITLE + _ROW * len(figures) + _GAP for _, figures in panels]
    rows = [height_of[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    width = 2 * _MARGIN + COLUMNS * _PANEL_WIDTH
    height = 2 * _MARGIN + _TITLE + sum(max(row) for row in rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11" fill="{_INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(_MARGIN, _MARGIN + 10, report.caption(), size=12),
    ]
    y = _MARGIN + _TITLE
    for index, row in enumerate(rows):
        for column, (title, figures) in enumerate(panels[index * COLUMNS : (index + 1) * COLUMNS]):
            parts += _panel(_MARGIN + column * _PANEL_WIDTH, y, title, figures)
        y += max(row)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _column(means: Mapping[str, Mapping[str, Figure]], name: str) -> dict[str, Figure]:
    return {method: figures[name] for method, figures in means.items()}


def _panel(left: int, top: int, title: str, figures: Mapping[str, Figure]) -> Iterator[str]:
    """One score: labels, bars from zero (either way), values behind them."""
    known = [value for value in figures.values() if value is not None]
    low, high = min(0.0, *known, 0.0), max(0.0, *known, 0.0)
    scale = (_PANEL_WIDTH - _LABEL_WIDTH - _VALUE_WIDTH - _GAP) / ((high - low) or 1.0)
    zero = left + _LABEL_WIDTH - low * scale
    yield _text(left, top + 12, title, size=12, weight="bold")
    for row, (method, value) in enumerate(figures.items()):
        y = top + _TITLE + row * _ROW
        label = method if len(method) <= _MAX_LABEL else method[: _MAX_LABEL - 1] + "…"
        yield _text(left + _LABEL_WIDTH - 6, y + 10, label, anchor="end")
        if value is None:
            yield _text(zero + 4, y + 10, "-")
            continue
        start, length = zero + min(value, 0.0) * scale, abs(value) * scale
        colour = _COLOURS.get(method, _OTHER)
        yield f'<rect x="{start:.1f}" y="{y}" width="{length:.1f}" height="{_BAR}" fill="{colour}"/>'
        yield _text(max(start + length, zero) + 4, y + 10, f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}")
    bottom = top + _TITLE + len(figures) * _ROW - (_ROW - _BAR)
    yield f'<path d="M{zero:.1f} {top + _TITLE - 3}V{bottom + 3}" stroke="{_LINE}"/>'


def _text(x: float, y: float, text: str, *, size: int = 0, weight: str = "", anchor: str = "") -> str:
    attributes = "".join(
        f' {name}="{value}"'
        for name, value in (("font-size", size), ("font-weight", weight), ("text-anchor", anchor))
        if value
    )
    return f'<text x="{x:.1f}" y="{y}"{attributes}>{escape(text)}</text>'
