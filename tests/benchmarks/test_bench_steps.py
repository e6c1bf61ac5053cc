"""What counts as a loss, and the whole of `recofuse bench steps` on two generated pairs."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import steps
from benchmarks.steps import LESS_IS_BETTER, SCORES, Quality, Setting
from recofuse_core.data import to_uint8, write_image
from recofuse_core.errors import ConfigError
from recofuse_core.evaluation.plots import svg
from recofuse_core.sampler import SamplerName
from recofuse_core.scenes.scene import make_scene
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
    assert paths[2].read_text() == svg(steps.chart(outcome.qualities, ("ode2",), "compact 1"))


def test_the_chart_shows_what_was_tried_over_logarithmic_steps() -> None:
    tried: list[tuple[SamplerName, int, float]]
    tried = [("ode2", 100, 33.0), ("ode2", 1, 30.0), ("ode1", 10, 29.0), ("ode2", 10, 32.0), ("ode1", 1, 28.0)]
    qualities = [quality(db=31.0)]
    qualities += [replace(quality(db=db), setting=Setting(sampler, count)) for sampler, count, db in tried]
    qualities += [replace(quality(db=50.0), setting=Setting("ode2", 1, "float32"))]  # no try: of another precision
    figure = steps.chart(qualities, ("ode1", "ode2"), "<a & b>")
    (axes,) = figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.get_lines()}
    assert lines == {
        "ode1": [[1, 30.0], [10, 30.5]],  # the mean of both pictures' PSNR, 32 dB of ir
        "ode2": [[1, 31.0], [10, 32.0], [100, 32.5]],
        "euler 100 float32": [[0, 31.5], [1, 31.5]],  # from the left edge to the right one
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "10", "100"]
    assert len(axes.get_xticks(minor=True)) == 0
    xs = [axes.transData.transform((count, 32.0))[0] for count in (1, 10, 100)]
    assert xs[1] == pytest.approx((xs[0] + xs[2]) / 2)
    texts = [text.text for text in ElementTree.fromstring(svg(figure)).findall(".//{*}text")]
    assert {"<a & b>: quality against steps", "restored PSNR, dB", "steps", *lines} <= set(texts)


def test_a_missing_matplotlib_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"recofuse\[plot\]"):
        steps.run(tmp_path / "missing", plot_path=tmp_path / "out.svg")
