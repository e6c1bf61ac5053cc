"""Bar plots: one bar a figure, as long as the figures say, and the same bytes whenever they are drawn."""

import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from recofuse_core.data import find_pairs, write_image
from recofuse_core.errors import ConfigError
from recofuse_core.evaluation.plots import (
    COLOURS,
    LESS_IS_BETTER,
    OTHER,
    RESTORATION_PANELS,
    bar_plots,
    bars,
    look,
    svg,
)
from recofuse_core.evaluation.protocol import DEGRADED, MODEL, EvaluationSettings, evaluate
from recofuse_core.evaluation.report import FUSION_COLUMNS, Report
from recofuse_core.scenes.scene import make_scene
from tests.core.tiny import tiny_model

SVG = "{http://www.w3.org/2000/svg}"
OTHER_METHOD = "<noise & $more$>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("pairs")
    scene = make_scene(1, 64, 80)
    write_image(root / "vis" / "a.png", scene.vis)
    write_image(root / "ir" / "a.png", scene.ir)
    write_image(root / "others" / "a.png", torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0)))
    scores = [
        each
        for each, _ in evaluate(
            tiny_model(), find_pairs(root), EvaluationSettings(), others={OTHER_METHOD: root / "others"}
        )
    ]
    return Report(tuple(scores), EvaluationSettings(), "tiny", "1", 3, "ode2")


def bars_of(axes: Axes) -> BarContainer:
    (container,) = axes.containers
    assert isinstance(container, BarContainer)
    return container


def widths(axes: Axes) -> list[float]:
    return [bar.get_width() for bar in bars_of(axes)]


def values(axes: Axes) -> list[Annotation]:
    """The texts at the bars' ends."""
    return [text for text in axes.texts if isinstance(text, Annotation)]


def names(axes: Axes) -> list[str]:
    """What a panel's bars are of: it stands at the left of the row of panels that share it."""
    spec = axes.get_subplotspec()
    assert spec is not None
    row = [other for other in axes.figure.axes if (it := other.get_subplotspec()) and it.rowspan == spec.rowspan]
    labels = [[label.get_text() for label in other.get_yticklabels()] for other in row]
    assert not any(labels[1:])
    return labels[0]


def texts_of(document: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(document).iter(f"{SVG}text")]


def test_every_figure_has_its_bar(report: Report) -> None:
    panels = {axes.get_title(loc="left"): axes for axes in bar_plots(report).axes}
    assert len(panels) == len(RESTORATION_PANELS) + len(FUSION_COLUMNS)
    for name, title in RESTORATION_PANELS.items():
        assert names(panels[title]) == report.restorers == [DEGRADED, MODEL]
        assert widths(panels[title]) == [report.restoration_means(method)[name] for method in report.restorers]
    for name, title in FUSION_COLUMNS.items():
        axes = panels[f"{title} (less is better)" if name in LESS_IS_BETTER else title]
        assert names(axes) == report.methods == [MODEL, OTHER_METHOD]
        assert widths(axes) == [report.fusion_means(method)[name] for method in report.methods]


def test_the_document_is_white_and_says_what_is_drawn(report: Report) -> None:
    document = svg(bar_plots(report))
    texts = texts_of(document)
    assert report.caption() in texts
    assert "noise (less is better)" in texts
    assert {"EN", "Qabf", "vis SSIM", MODEL, DEGRADED, OTHER_METHOD} <= set(texts)
    assert f"{report.fusion_means(MODEL)['qabf']:.3f}" in texts
    face = next(ElementTree.fromstring(document).iter(f"{SVG}path"))
    assert face.get("style") == "fill: #ffffff"


def test_everything_is_inside_its_panel_and_nothing_overlaps(report: Report) -> None:
    figure = bar_plots(report)
    svg(figure)  # lays it out
    for axes in figure.axes:
        for bar, value in zip(bars_of(axes), values(axes), strict=True):
            frame = axes.get_window_extent()
            for drawn in (bar.get_window_extent(), value.get_window_extent()):
                assert frame.x0 - 0.01 <= drawn.x0 <= drawn.x1 <= frame.x1 + 0.01
                assert frame.y0 - 0.01 <= drawn.y0 <= drawn.y1 <= frame.y1 + 0.01
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for index, box in enumerate(boxes):
        assert box is not None
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index] if other is not None)


@pytest.mark.parametrize("ends", [(-0.95, 0.95), (-99.0, 9.0), (-1e-5, 1.9), (-1.0, 0.0), (0.0, 0.0), (1e-9, 50.0)])
def test_values_stay_inside_their_panel_either_way(ends: tuple[float, float]) -> None:
    with look():
        figure = Figure(figsize=(3.0, 1.0))
        axes = figure.subplots()
        bars(axes, {"method": ends[0], "other": ends[1]}, "{:.3f}".format)
    svg(figure)
    frame = axes.get_window_extent()
    for value in values(axes):
        assert frame.x0 <= value.get_window_extent().x0 < value.get_window_extent().x1 <= frame.x1


def test_bars_start_at_zero_in_the_order_given_each_in_its_colour() -> None:
    with look():
        figure = Figure()
        axes = figure.subplots()
        bars(axes, {"degraded": -2.0, "none": None, "zero": 0.0, "long": 4.0}, "{:.1f}".format, COLOURS)
    drawn = list(bars_of(axes))
    assert [bar.get_x() for bar in drawn] == [0.0] * 4
    assert [bar.get_width() for bar in drawn] == [-2.0, 0.0, 0.0, 4.0]
    assert [value.get_text() for value in values(axes)] == ["-2.0", "-", "0.0", "4.0"]
    assert [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in drawn] == [COLOURS[DEGRADED], *[OTHER] * 3]
    extents = [bar.get_window_extent() for bar in drawn]
    assert extents[3].width == pytest.approx(2 * extents[0].width)  # in the picture too
    assert extents[3].x0 == pytest.approx(extents[0].x1)
    assert [extent.y0 for extent in extents] == sorted((extent.y0 for extent in extents), reverse=True)


def test_what_is_not_defined_is_no_bar(report: Report) -> None:
    without = replace(report, scores=tuple(replace(score, restoration={}) for score in report.scores))
    figure = bar_plots(without)
    assert [axes.get_title(loc="left").split(" (")[0] for axes in figure.axes] == list(FUSION_COLUMNS.values())
    assert "vis SSIM" not in texts_of(svg(figure))
    nothing = replace(without, scores=tuple(replace(score, fusion={}) for score in without.scores))
    assert bar_plots(nothing).axes == []
    assert texts_of(svg(bar_plots(nothing))) == [nothing.caption()]


def test_equal_figures_are_equal_bytes_whatever_the_users_settings(report: Report) -> None:
    figure = bar_plots(report)
    document = svg(figure)
    assert document == svg(figure)
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 20, "svg.fonttype": "path"}):
        assert document == svg(bar_plots(report))
        assert matplotlib.rcParams["font.size"] == 20  # and they are left as they were
    assert document != svg(bar_plots(replace(report, steps=4)))


def test_without_matplotlib_the_error_names_the_extra(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'recofuse\[plot\]'"):
        bar_plots(report)


def test_no_pyplot_is_needed() -> None:
    probe = (
        "import sys; from recofuse_core.evaluation import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "with plots.look():\n"
        "    from matplotlib.figure import Figure\n"
        "    figure = Figure()\n"
        "    plots.bars(figure.subplots(), {'a': 1.0}, str)\n"
        "assert '<svg' in plots.svg(figure)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", probe], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
