"""The baseline computes what the model computes, and the table says what was measured."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from benchmarks import engine
from benchmarks.engine import Ceilings, Check, Row, Variant, cases, count_costs, judge, ladder, measure
from benchmarks.straightforward import WRITTEN_OUT, straightforward
from recofuse_core.errors import ConfigError
from recofuse_core.evaluation.plots import svg
from recofuse_core.model import PRESETS, ModelConfig, build_model
from recofuse_core.recording import EagerRecorder
from recofuse_core.runtime import Runtime
from tests.core.tiny import GATED, PUBLISHED, largest_difference, pairs, tiny_model

CPU = torch.device("cpu")
CONFIGS = pytest.mark.parametrize("config", [GATED, PUBLISHED], ids=["gated", "published"])


def row(**changes: object) -> Row:
    values: dict[str, object] = {
        "preset": "paper", "width": 640, "height": 480, "batch": 1, "variant": "baseline", "sampler": "euler",
        "steps": 100, "step_ms": 900.0, "image_ms": 96000.0, "images_s": 0.01, "step_ratio": 1.0, "ratio": 1.0,
        "peak_mib": 2000.0, "roofline": 0.1, "extrapolated": True,
    }  # fmt: skip
    return Row(**{**values, **changes})  # type: ignore[arg-type]


@CONFIGS
@pytest.mark.parametrize("fused_attention", [False, True])
def test_the_baseline_gives_the_models_pictures(config: ModelConfig, fused_attention: bool) -> None:
    model = tiny_model(config)
    plain = straightforward(model, fused_attention=fused_attention)
    vis, ir = pairs(2, 40, 50)
    expected = model.fuse(vis, ir, seeds=[3, 4])
    assert largest_difference(plain.fuse(vis, ir, seeds=[3, 4]), expected) < 1e-3
    assert largest_difference(model.fuse(vis, ir, seeds=[3, 4]), expected) == 0  # the original is as it was
    kinds = {type(module) for module in plain.modules()}
    assert kinds.isdisjoint(set(WRITTEN_OUT) - set(list(WRITTEN_OUT)[:1] * fused_attention))


@CONFIGS
def test_nothing_in_the_baseline_is_channels_last(config: ModelConfig) -> None:
    plain = straightforward(tiny_model(config))
    outputs: list[Tensor] = []
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    plain.fuse(*pairs(1, 32, 48), steps=2)
    assert len(outputs) > 20
    assert all(output.is_contiguous() for output in outputs)


def test_each_row_adds_one_improvement() -> None:
    for on_gpu in (False, True):
        variants = ladder(on_gpu)
        assert variants[0] == Variant("baseline")
        for before, after in pairwise(variants):
            changed = [f.name for f in fields(Variant) if getattr(before, f.name) != getattr(after, f.name)]
            assert changed[0] == "name"
            assert len(changed) == 2 or changed == ["name", "sampler", "steps"]
        assert variants[-1].half
        assert variants[-1].recorded is on_gpu


def test_work_is_counted_on_the_meta_device() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1, device="meta")
    image = torch.empty(1, 3, 8, 10, device="meta")
    work, _ = engine._counted(conv, lambda: conv(image), 2)
    assert work.flops == 2 * 8 * 10 * 3 * 5 * 9
    assert work.weight_bytes == 2 * (3 * 5 * 9 + 5)
    assert work.activation_bytes == 2 * 8 * 10 * (3 + 5)
    ceilings = Ceilings(flops_s=work.flops, bytes_s=work.weight_bytes + 4 * work.activation_bytes, dtype="bfloat16")
    assert work.floor_s(4, ceilings) == pytest.approx(4)  # the multiplications rule
    assert work.floor_s(4, replace(ceilings, bytes_s=1)) == work.weight_bytes + 4 * work.activation_bytes


def test_the_published_model_costs_what_the_specification_says() -> None:
    """Multiply-accumulates at 640x480: encode 8.96 G, decode 48.0 G, a step 11.35 G."""
    with torch.device("meta"):
        model = build_model(PRESETS["paper"])
    costs = count_costs(model, 480, 640, 2)
    assert costs.encode.flops / 2e9 == pytest.approx(8.96, rel=0.02)
    assert costs.decode.flops / 2e9 == pytest.approx(48.0, rel=0.02)
    assert costs.step.flops / 2e9 == pytest.approx(11.35, rel=0.02)


def test_a_case_is_measured_from_the_baseline_to_everything() -> None:
    rows = list(measure(tiny_model(PUBLISHED), "tiny", (48, 32), 2, CPU, Ceilings(1e11, 1e10, "bfloat16")))
    assert [r.variant for r in rows] == [variant.name for variant in ladder(False)]
    assert rows[0].ratio == rows[0].step_ratio == 1
    assert all(r.step_ms > 0 and r.image_ms > r.step_ms and r.extrapolated and 0 < r.roofline < 1 for r in rows)
    assert [r.steps for r in rows] == [100] * (len(rows) - 2) + [4, 4]
    for r in rows:
        assert r.ratio == pytest.approx(rows[0].image_ms / r.image_ms)
        assert r.images_s == pytest.approx(1e3 / r.image_ms)
        assert r.peak_mib > 10
        assert r.variant in r.text()


def test_runs_that_are_timed_whole_are_recorded() -> None:
    """The way of a GPU, with a recorder that runs again."""
    model = tiny_model(PUBLISHED)
    candidate = engine.Candidate(model, replace(ladder(True)[-1], stacked=False), CPU)
    assert candidate.runtime is not None
    candidate.runtime = Runtime(model, precision="float32", graphs=True, recorder=EagerRecorder())
    timing = candidate.whole_runs(*pairs(1, 32, 32))
    assert candidate.runtime.num_recorded == 2  # 4 steps, which are asked for, and 12
    assert timing.whole_s is not None
    assert timing.run_s(99) == timing.whole_s
    plain = engine.Candidate(model, Variant("baseline"), CPU)
    assert plain.whole_runs(*pairs(1, 32, 32)).whole_s is None  # 100 steps are not waited for


def test_targets_are_judged_by_the_fastest_row() -> None:
    rows = [row(), row(variant="+ all", step_ratio=3.0, ratio=11.0, roofline=0.5, steps=20)]
    step, whole, compact = judge(rows, on_gpu=False, compact_s=0.9)
    assert (step.value, step.is_met) == (3.0, True)
    assert (whole.value, whole.is_met) == (11.0, False)
    assert whole.text() == "end to end (euler 20, fused only) 11x (>=12, MISSED)"
    assert compact.is_met
    assert not replace(compact, value=2.1).is_met
    eight = row(batch=8, variant="+ all", roofline=0.05, images_s=120.0)
    checks = judge([*rows, eight], on_gpu=True, compact_s=None)
    assert [check.is_met for check in checks] == [False, False, False, True]
    assert checks[2].text() == "batch 8 above the roofline floor 20x (<=10, MISSED)"


def test_quick_is_a_part_of_everything() -> None:
    for on_gpu in (False, True):
        everything = cases(on_gpu, False, ("paper", "compact"))
        assert set(cases(on_gpu, True, ("paper", "compact"))) <= set(everything)
        assert len(everything) == len(set(everything))
    assert len(cases(True, False, ("paper",))) == 12


def test_everything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "preset_model", lambda name, device: tiny_model(GATED))
    monkeypatch.setattr(engine, "measure_ceilings", lambda device, dtype: Ceilings(1e11, 1e10, "bfloat16"))
    said: list[str] = []
    paths = [tmp_path / name for name in ("out.json", "out.csv", "out.svg")]
    outcome = engine.run(
        device="cpu", presets=("paper",), only=[("paper", (48, 32), 1)],
        json_path=paths[0], csv_path=paths[1], plot_path=paths[2], say=said.append,
    )  # fmt: skip
    assert said[-1] == outcome.line
    assert outcome.all_met  # nothing to judge: no 640x480
    assert "no target is for these cases" in outcome.line
    document = json.loads(paths[0].read_text())
    assert len(document["rows"]) == len(outcome.rows) == len(ladder(False))
    with paths[1].open() as stream:
        assert [line["variant"] for line in csv.DictReader(stream)] == [r.variant for r in outcome.rows]
    assert paths[2].read_text() == svg(engine.chart(outcome.rows, document["device"]))
    assert engine.markdown(outcome.rows).count("\n") == 1 + len(outcome.rows)


def test_the_chart_shows_seconds_of_the_named_size() -> None:
    named = [row(), row(variant="+ <all>", image_ms=6176.0)]
    others = [row(width=320, height=256, image_ms=9e5), row(batch=4, image_ms=9e5), row(preset="compact", image_ms=9e5)]
    figure = engine.chart([others[0], *named, *others[1:]], "a & b")
    (axes,) = figure.axes
    (bars,) = axes.containers
    assert [bar.get_width() for bar in bars] == [96.0, 6.176]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["baseline", "+ <all>"]
    texts = [text.text for text in ElementTree.fromstring(svg(figure)).findall(".//{*}text")]
    assert {"paper, 640x480, one image (a & b)", "96 s", "6.18 s", "baseline", "+ <all>"} == set(texts)


def test_a_missing_matplotlib_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"recofuse\[plot\]"):
        engine.run(plot_path=tmp_path / "out.svg", only=[])


def test_a_check_says_what_was_asked() -> None:
    assert Check("pairs", 120.0, 100.0, " pairs/s").text() == "pairs 120 pairs/s (>=100)"
