"""What the benchmark of runtimes concludes from its rows, and that its programs are what they are called."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import neighbours, runtimes
from benchmarks.neighbours import Cost, Fuser, Row
from benchmarks.runtimes import Outcome
from recofuse_core.graphs.runtime import GraphRuntime
from recofuse_core.picture import Exposure, OutputName

KINDS = {"torch": "Runtime", "onnxruntime": "GraphRuntime"}
TORCH = Row(name="torch", alone=Cost(1.0, 2.0), busy=Cost(3.0, 4.0))


def test_ratios_are_to_torch_under_the_same_circumstances() -> None:
    outcome = Outcome((TORCH, Row(name="onnxruntime", alone=Cost(9.0, 1.0), busy=Cost(9.0, 3.0))), 2)
    assert outcome.ratios() == {"onnxruntime": (0.5, 0.75)}
    assert outcome.line == "onnxruntime takes 0.50 of torch's processor time, 0.75 beside 2 busy processes"


def test_without_another_runtime_there_is_nothing_to_compare() -> None:
    assert Outcome((TORCH,), 2).line == "nothing is here to compare with torch"


@pytest.mark.parametrize("name", list(KINDS))
def test_programs_fuse_by_what_they_are_called(name: str) -> None:
    assert next(iter(runtimes.ways(1))) == "torch"
    told = f"\nassert type(runtime).__name__ == {KINDS[name]!r}\n"
    program = runtimes.ways(1)[name].replace("480, 640", "48, 64").replace("\nfuse()\n", f"\nfuse(){told}")
    assert told in program
    fuser = Fuser(program)
    try:
        fuser.wait_ready()
        cost = fuser.fuse()
        assert cost.clock_s > 0
        assert cost.cpu_s > 0
    finally:
        fuser.end()


def test_a_run_says_its_ratios_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "SETTLE_S", 0.0)
    light = "import sys\nprint('ready', flush=True)\nfor _ in sys.stdin: print(1.0, {}, flush=True)"
    chosen = {"torch": light.format(2.0), "onnxruntime": light.format(1.5)}
    said: list[str] = []
    path = tmp_path / "figures.json"
    outcome = runtimes.run(repeats=2, num_busy=1, json_path=path, is_all=True, say=said.append, chosen=chosen)
    assert said[-1] == outcome.line
    assert said[-1] == "onnxruntime takes 0.75 of torch's processor time, 0.75 beside 1 busy processes"
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["torch", "onnxruntime"]


@pytest.mark.parametrize("exposure", ["lit", "as_shot"])
def test_openvino_makes_the_same_pictures_of_the_graphs(exposure: Exposure) -> None:
    pytest.importorskip("openvino")
    generator = np.random.default_rng(0)
    vis = generator.integers(0, 256, (1, 3, 64, 96), np.uint8)
    ir = generator.integers(0, 256, (1, 1, 64, 96), np.uint8)
    fused: tuple[OutputName, ...] = ("fused",)
    expected = GraphRuntime("compact", num_threads=1).fuse(vis, ir, outputs=fused, exposure=exposure).fused
    found = runtimes.openvino_runtime(1).fuse(vis, ir, outputs=fused, exposure=exposure).fused
    assert expected is not None
    assert found is not None
    assert np.abs(expected.astype(int) - found.astype(int)).max() <= 1
