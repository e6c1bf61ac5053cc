"""Which engine runs what the settings ask for."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Literal

from service.terms.settings import EngineSettings, Settings
from service.work.engine import Engine, FixedCostEngine, NullEngine
from service.work.graph_engine import GraphEngine
from service.work.torch_engine import TorchEngine

logger = logging.getLogger(__name__)

Runtime = Literal["torch", "onnx"]

# Where torch computes in bfloat16 natively, which halves its time; graphs are float32.
NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16"}


def build_engine(settings: Settings) -> Engine:
    """The engine that the settings ask for, not loaded yet. Raises as `model_engine` does."""
    engine = settings.engine
    if engine.kind == "null":
        return NullEngine()
    if engine.kind == "fixed":
        return FixedCostEngine(engine.fixed_batch_s, engine.fixed_item_s)
    return model_engine(engine.model_copy(update={"batch_sizes": settings.batch_sizes}), settings.worker.per_host)


def model_engine(settings: EngineSettings, per_host: int = 1) -> Engine:
    """An engine that runs the model, not loaded yet.

    Raises ModuleNotFoundError if what it needs is not installed, and CheckpointError for weights that are not there.
    """
    runtime, why = choose_runtime(settings)
    logger.info("runtime of the model", extra={"runtime": runtime, "why": why})
    engine = GraphEngine if runtime == "onnx" else TorchEngine
    return engine(settings, per_host)


def choose_runtime(settings: EngineSettings, root: Path = Path("/")) -> tuple[Runtime, str]:
    """Torch or ONNX Runtime, and why, in words. root: where the files of the system are.

    ONNX Runtime is for processors, and there for the shipped weights and others that graphs lie beside. Raises as
    `model_engine` does.
    """
    if settings.runtime != "auto":
        _require({"torch": "torch", "onnx": "onnxruntime"}[settings.runtime])
        return settings.runtime, "as asked"
    has_torch, has_onnx = map(_is_there, ("torch", "onnxruntime"))
    if not (has_torch or has_onnx):
        _require("onnxruntime")
    if settings.device.startswith("cuda"):
        _require("torch")
        return "torch", f"device {settings.device}"
    if settings.precision in ("bfloat16", "float16"):
        _require("torch")
        return "torch", f"precision {settings.precision}"
    if not has_torch:
        return "onnx", "torch is not installed"
    if not has_onnx:
        return "torch", "ONNX Runtime is not installed"
    if settings.device == "auto" and _sees_gpu(root):
        return "torch", "there is a GPU"
    if settings.precision == "auto" and _flags(root) & NATIVE_BFLOAT16:
        return "torch", "this processor computes in bfloat16"
    from recofuse_core.graphs.runtime import has_graphs

    if not has_graphs(settings.model):
        return "torch", "no graphs lie beside the weights"
    return "onnx", "it is faster on this processor"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # None stands in its place
        return False


def _require(module: str) -> None:
    if not _is_there(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def _sees_gpu(root: Path) -> bool:
    return (root / "proc/driver/nvidia/version").is_file() or any((root / "dev").glob("nvidia[0-9]*"))


def _flags(root: Path) -> set[str]:
    """What this processor can, by the names of /proc/cpuinfo; nothing where that cannot be read."""
    try:
        lines = (root / "proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
