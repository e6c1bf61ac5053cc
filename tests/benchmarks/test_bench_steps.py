"""What counts as a loss, and the whole of `recofuse bench steps` on two generated pairs."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import plot, steps
from benchmarks.steps import LESS_IS_BETTER, SCORES, Quality, Setting
from recofuse_core.data import to_uint8, write_image
from recofuse_core.scenes import make_scene
from tests.core.tiny import tiny_model


def quality(db: float = 30.0, scores: dict[str, float] | None = None) -> Quality:
    return Quality(steps.YARDSTICK, db, 32.0, 99.0, dict.fromkeys(SCORES, 1.0) | (scores or {}))


def test_better_is_no_loss_and_worse_is() -> None:
    best = quality()
    assert quality(db=31.0).loses_nothing(best)
    assert quality(db=29.91).loses_nothing(best)
    assert not quality(db=29.89).loses_nothing(best)
    for name in SCORES:
        sign = 1 if name in LESS_IS_BETTER else -1
        assert not quality(scores={name: 1 + sign * 0.006}).loses_nothing(best)
        assert quality(scores={name: 1 - sign * 0.2}).loses_nothing(best)
        loss, worst = quality(scores={name: 1 + sign * 0.02}).loss(best)
        assert worst == name
        assert loss == pytest.approx(0.02)


def test_a_folder_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "YARDSTICK", Setting("euler", 6, "float32"))  # a tiny model, and few steps of it
    monkeypatch.setattr(steps, "load_pretrained", lambda weights, device: tiny_model())
    for seed in range(3):
        scene = make_scene(seed, 96, 128)
        write_image(tmp_path / "pairs" / "vis" / f"{seed}.png", to_uint8(scene.vis))
        write_image(tmp_path / "pairs" / "ir" / f"{seed}.png", to_uint8(scene.ir))
    said: list[str] = []
    paths = [tmp_path / name for name in ("out.json", "out.csv", "out.svg")]
    outcome = steps.run(
        tmp_path / "pairs", limit=2, side=64, steps=(1, 3), samplers=("ode2",), device="cpu",
        json_path=paths[0], csv_path=paths[1], plot_path=paths[2], say=said.append,
    )  # fmt: skip
    settings = [q.setting for q in outcome.qualities]
    assert settings[0] == steps.YARDSTICK
    assert len(settings) == len(set(settings)) == 5  # the default is one of those tried
    assert outcome.qualities[0].fused_psnr_db == 99.0
    best = outcome.qualities[0]
    fitting = [q.setting.steps for q in outcome.qualities if steps._is_try(q, "ode2") and q.loses_nothing(best)]
    assert outcome.enough["ode2"] == (min(fitting) if fitting else None)
    assert said[-1] == "\n" + outcome.line
    assert json.loads(paths[0].read_text())["num_pairs"] == 2
    with paths[1].open() as stream:
        assert len(list(csv.reader(stream))) == 1 + len(settings)
    svg = ElementTree.fromstring(paths[2].read_text())
    assert len(svg.findall("{*}circle")) == 2


def test_charts_are_readable_and_escape_their_text() -> None:
    bars = ElementTree.fromstring(plot.bars("a < b", {"one & two": 1.0, "half": 0.5}, "s"))
    widths = [float(rect.get("width", "")) for rect in bars.findall("{*}rect")[1:]]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    lines = ElementTree.fromstring(plot.lines("t", "x", "y", {"a": [(1, 2.0), (100, 3.0), (10, 2.5)]}, mark=2.0))
    points = [point.split(",") for point in lines.findall("{*}polyline")[0].get("points", "").split()]
    xs, ys = ([float(point[axis]) for point in points] for axis in (0, 1))
    assert xs == sorted(xs)
    assert xs[1] == pytest.approx((xs[0] + xs[2]) / 2, abs=0.2)  # logarithmic
    assert ys == sorted(ys, reverse=True)
