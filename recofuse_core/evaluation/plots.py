"""Charts by matplotlib in one look, as SVG that is equal byte for byte whenever what is drawn is equal.

matplotlib is an extra (`plot`) and imported only where something is drawn: importing this module asks for nothing. Its
figures are used as objects, without pyplot, so there is no window, no current figure, and nothing to close.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from recofuse_core.errors import ConfigError
from recofuse_core.evaluation.protocol import DEGRADED, MODEL
from recofuse_core.evaluation.report import FUSION_COLUMNS, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LESS_IS_BETTER = frozenset({"noise", "chroma"})
RESTORATION_PANELS = {
    "vis_psnr_db": "vis PSNR, dB",
    "ir_psnr_db": "ir PSNR, dB",
    "vis_ssim": "vis SSIM",
    "ir_ssim": "ir SSIM",
}
COLUMNS = len(RESTORATION_PANELS)  # so that a row of panels has one set of methods, named once at its left
COLOURS = {MODEL: "#c2410c", DEGRADED: "#9ca3af"}
OTHER, LINE = "#475569", "#d1d5db"
LOOK: dict[str, Any] = {  # on matplotlib's own defaults, whatever the user's matplotlibrc says; their face is white
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,  # inches
    "figure.constrained_layout.w_pad": 0.1,
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],  # the first is measured with, and comes with matplotlib
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "figure.titlesize": 9.0,
    "grid.color": LINE,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "recofuse",  # ids are random without it
    "text.parse_math": False,  # a method's name may hold dollars
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
}
_MAX_LABEL = 32  # letters


def require_matplotlib() -> None:
    """Nothing, or ConfigError if matplotlib is not installed: to be asked before work whose plot is wanted."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'recofuse[plot]'")


@contextmanager
def look() -> Iterator[None]:
    """The one look, while a figure is made or written; also a decorator. Raises ConfigError without matplotlib."""
    require_matplotlib()
    from matplotlib import style

    with style.context(["default", LOOK]):
        yield


@look()
def svg(figure: Figure) -> str:
    """A figure as an SVG document, without a date or a version in it. Raises ConfigError without matplotlib."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # each layout starts from the last, so a second one would be another picture
    return text.getvalue()


def bars(
    axes: Axes,
    values: Mapping[str, float | None],
    text: Callable[[float], str],
    colours: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Horizontal bars from zero either way, one a line in the order given, their values behind them.

    None, a value that is not defined, is a dash and no bar. colours: of names that have one of their own.
    """
    lines, widths = range(len(values)), [value or 0.0 for value in values.values()]
    drawn = axes.barh(lines, widths, height=0.66, color=[colours.get(name, OTHER) for name in values])
    axes.bar_label(drawn, ["-" if value is None else text(value) for value in values.values()], padding=3)
    axes.axvline(0.0, color=LINE)
    low, high = min([0.0, *widths]), max([0.0, *widths])
    room = 0.35 * (high - low or 1.0)  # for a value at its bar's end
    axes.set_xlim(low - room if low < 0 else 0.0, high + room)
    axes.set_xticks([])
    axes.set_yticks(lines, [name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 1]}…" for name in values])
    axes.set_ylim(len(values) - 0.5, -0.5)


@look()
def bar_plots(report: Report) -> Figure:
    """The means of all pairs, a panel a score: restoration where there are references, then the fusion scores.

    Raises ConfigError if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    restored = {method: report.restoration_means(method) for method in report.restorers}
    fused = {method: report.fusion_means(method) for method in report.methods}
    panels = [(title, restored, name) for name, title in RESTORATION_PANELS.items() if restored]
    for name, title in FUSION_COLUMNS.items() if fused else ():
        panels.append((f"{title} (less is better)" if name in LESS_IS_BETTER else title, fused, name))
    heights = [len(means) for _, means, _ in panels[::COLUMNS]] or [1]  # nothing scored: the caption alone
    figure = Figure(figsize=(12.0, 0.5 + sum(0.4 + 0.2 * height for height in heights)))
    figure.suptitle(report.caption(), x=0.005, horizontalalignment="left", wrap=True)
    grid = figure.subplots(len(heights), COLUMNS, sharey="row", squeeze=False, height_ratios=heights).flat
    for axes, (title, means, name) in zip(grid, panels, strict=False):
        axes.set_title(title)
        bars(axes, {method: figures[name] for method, figures in means.items()}, _text, COLOURS)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    return figure


def _text(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
