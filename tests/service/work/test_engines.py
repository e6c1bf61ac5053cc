"""Which engine runs the model: what the settings, the machine and the installed packages come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recofuse_core.graphs import runtime
from service.terms.settings import EngineSettings, Settings
from service.work import engines
from service.work.engines import build_engine, choose_runtime, model_engine
from service.work.graph_engine import GraphEngine
from service.work.torch_engine import TorchEngine

BOTH = ("torch", "onnxruntime")


def machine(root: Path, *, flags: str = "avx2 fma", has_gpu: bool = False) -> Path:
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nprocessor\t: 1\nflags\t\t: none\n")
    if has_gpu:
        (root / "proc/driver/nvidia/version").write_text("NVRM version: 580.1\n")
    return root


@pytest.mark.parametrize(
    ("asked", "installed", "here", "expected"),
    [
        ({}, BOTH, {}, "onnx"),
        ({"device": "cpu"}, BOTH, {"has_gpu": True}, "onnx"),
        ({}, BOTH, {"has_gpu": True}, "torch"),
        ({"device": "cuda:1"}, BOTH, {}, "torch"),
        ({}, BOTH, {"flags": "avx512f avx512_bf16"}, "torch"),
        ({"precision": "float32"}, BOTH, {"flags": "avx512f avx512_bf16"}, "onnx"),
        ({"precision": "bfloat16"}, BOTH, {}, "torch"),
        ({"precision": "float16"}, BOTH, {}, "torch"),
        ({}, ("onnxruntime",), {"has_gpu": True}, "onnx"),
        ({}, ("torch",), {}, "torch"),
        ({"model": "other"}, BOTH, {}, "torch"),
        ({"model": "other"}, ("onnxruntime",), {}, "onnx"),  # which then says what is missing
        ({"runtime": "torch"}, BOTH, {}, "torch"),
        ({"runtime": "onnx"}, BOTH, {"has_gpu": True}, "onnx"),
    ],
    ids=str,
)
def test_the_choice(
    asked: dict[str, Any],
    installed: tuple[str, ...],
    here: dict[str, Any],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "_is_there", installed.__contains__)
    monkeypatch.setattr(runtime, "has_graphs", lambda model: model == "compact")
    settings = EngineSettings.model_validate(asked)
    chosen, why = choose_runtime(settings, machine(tmp_path, **here))
    assert chosen == expected
    assert why


@pytest.mark.parametrize(
    ("asked", "installed", "missing"),
    [
        ({}, (), "onnxruntime"),
        ({"device": "cuda"}, ("onnxruntime",), "torch"),
        ({"precision": "bfloat16"}, ("onnxruntime",), "torch"),
        ({"runtime": "torch"}, ("onnxruntime",), "torch"),
        ({"runtime": "onnx"}, ("torch",), "onnxruntime"),
    ],
    ids=str,
)
def test_what_is_missing_is_named(
    asked: dict[str, Any], installed: tuple[str, ...], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_is_there", installed.__contains__)
    with pytest.raises(ModuleNotFoundError) as caught:
        model_engine(EngineSettings.model_validate(asked))
    assert caught.value.name == missing


def test_the_engine_is_that_of_the_choice() -> None:
    assert isinstance(model_engine(EngineSettings(runtime="onnx")), GraphEngine)
    assert isinstance(model_engine(EngineSettings(runtime="torch")), TorchEngine)
    assert isinstance(build_engine(Settings.from_values({"engine": {"runtime": "onnx"}})), GraphEngine)
