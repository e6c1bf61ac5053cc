"""Bar plots: well-formed, one bar a figure, as long as the figures say."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from recofuse_core.data import find_pairs, write_image
from recofuse_core.evaluation import FUSION_COLUMNS, MODEL, EvaluationSettings, Report, evaluate
from recofuse_core.plots import RESTORATION_PANELS, bar_plots
from recofuse_core.scenes import make_scene
from tests.core.tiny import tiny_model

SVG = "{http://www.w3.org/2000/svg}"


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
            tiny_model(), find_pairs(root), EvaluationSettings(), others={"<noise & more>": root / "others"}
        )
    ]
    return Report(tuple(scores), EvaluationSettings(), "tiny", "1", 3, "ode2")


def drawn(svg: str) -> tuple[list[str], list[ElementTree.Element]]:
    """All texts, and the bars without the background."""
    tree = ElementTree.fromstring(svg)
    return [text.text or "" for text in tree.iter(f"{SVG}text")], list(tree.iter(f"{SVG}rect"))[1:]


def test_every_figure_has_its_bar(report: Report) -> None:
    texts, bars = drawn(bar_plots(report))
    assert len(bars) == 2 * len(RESTORATION_PANELS) + 2 * len(FUSION_COLUMNS)
    assert texts[0] == report.caption()
    assert "noise (less is better)" in texts
    assert {"EN", "Qabf", "vis SSIM", MODEL, "degraded", "<noise & more>"} <= set(texts)
    assert f"{report.fusion_means(MODEL)['qabf']:.3f}" in texts


def test_bars_are_in_proportion_and_inside_their_document(report: Report) -> None:
    svg = bar_plots(report)
    tree = ElementTree.fromstring(svg)
    _, bars = drawn(svg)
    for bar in bars:
        assert float(bar.get("x", "")) >= 0
        assert float(bar.get("x", "")) + float(bar.get("width", "")) <= float(tree.get("width", ""))
        assert float(bar.get("y", "")) + float(bar.get("height", "")) <= float(tree.get("height", ""))
    lengths = [float(bar.get("width", "")) for bar in bars[:2]]  # vis PSNR: degraded, then the model
    means = [report.restoration_means(name)["vis_psnr_db"] or 0.0 for name in report.restorers]
    assert lengths[0] / lengths[1] == pytest.approx(means[0] / means[1], rel=0.01)


def test_what_is_not_defined_is_no_bar(report: Report) -> None:
    without = replace(report, scores=tuple(replace(score, restoration={}) for score in report.scores))
    texts, bars = drawn(bar_plots(without))
    assert len(bars) == 2 * len(FUSION_COLUMNS)
    assert "vis SSIM" not in texts
