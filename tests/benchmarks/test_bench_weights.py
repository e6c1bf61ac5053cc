"""`recofuse bench weights` on two tiny models: both are measured at every size, and the last line follows from that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import weights
from recofuse_core.checkpoint import save_checkpoint
from tests.core.tiny import GATED, tiny_model


def test_both_are_measured_and_the_ratio_follows(tmp_path: Path) -> None:
    paths = []
    for version, steps in (("1.0.0", 6), ("2.0.0", 1)):
        model = tiny_model(replace(GATED, steps=steps))
        path = tmp_path / f"{version}.safetensors"
        save_checkpoint(path, model.state_dict(), model.config, name="tiny", version=version, preset="compact")
        paths.append(str(path))
    said: list[str] = []
    sizes = ((64, 48), (96, 64))
    outcome = weights.run(
        *paths, exposure="lit", windows=2, sizes=sizes, json_path=tmp_path / "out.json", say=said.append
    )  # neither can light: both are measured as they are
    assert [(cost.name, cost.width, cost.height) for cost in outcome.costs] == [
        (name, *size) for size in sizes for name in ("old: tiny 1.0.0", "new: tiny 2.0.0")
    ]
    first, second = outcome.costs[:2]
    assert outcome.ratio == pytest.approx(second.seconds / first.seconds)
    assert outcome.median_ratio == pytest.approx(second.median_seconds / first.median_seconds)
    assert outcome.growth == pytest.approx(
        outcome.costs[3].microseconds_per_pixel / outcome.costs[1].microseconds_per_pixel
    )
    assert said[-1].startswith(f"new: tiny 2.0.0 takes {outcome.ratio:.2f} of the processor time of old: tiny 1.0.0")
    assert json.loads((tmp_path / "out.json").read_text())["ratio"] == outcome.ratio


def test_the_runtimes_of_one_set_of_weights_are_compared() -> None:
    said: list[str] = []
    sizes = ((64, 48), (96, 64))
    outcome = weights.run(
        "compact", "compact", exposure="as_shot", windows=1, runtime="onnx", sizes=sizes, say=said.append
    )
    assert len({cost.name for cost in outcome.costs}) == 2
    assert " as graphs takes " in said[-1]
