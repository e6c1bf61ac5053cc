"""ReCoFuse as a library: degraded infrared/visible pairs in, restored and fused images out.

What is named here is imported when it is asked for: networks and training need torch, and what runs the networks as
graphs (`recofuse_core.graphs`) does not.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from recofuse_host.waiting import sleep_while_waiting

if TYPE_CHECKING:
    from recofuse_core.checkpoint import load_checkpoint, load_pretrained, read_header, save_checkpoint
    from recofuse_core.errors import CheckpointError, ConfigError, CoreError, DatasetError, NumericsError, ShapeError
    from recofuse_core.model import PRESETS, ModelConfig, ReCoFuse, build_model
    from recofuse_core.picture import FusionOutput, ModelInfo
    from recofuse_core.published import convert_official
    from recofuse_core.runtime import Runtime
    from recofuse_core.threads import use_threads
    from recofuse_core.tiling import TilingConfig
    from recofuse_core.weights_file import packaged_names

sleep_while_waiting()  # before torch is imported

_WITHOUT_TORCH = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "CoreError": "errors",
    "DatasetError": "errors",
    "FusionOutput": "picture",
    "ModelInfo": "picture",
    "NumericsError": "errors",
    "ShapeError": "errors",
    "TilingConfig": "tiling",
    "packaged_names": "weights_file",
}
_WITH_TORCH = {
    "PRESETS": "model",
    "ModelConfig": "model",
    "ReCoFuse": "model",
    "Runtime": "runtime",
    "build_model": "model",
    "convert_official": "published",
    "load_checkpoint": "checkpoint",
    "load_pretrained": "checkpoint",
    "read_header": "checkpoint",
    "save_checkpoint": "checkpoint",
    "use_threads": "threads",
}

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConfigError",
    "CoreError",
    "DatasetError",
    "FusionOutput",
    "ModelConfig",
    "ModelInfo",
    "NumericsError",
    "ReCoFuse",
    "Runtime",
    "ShapeError",
    "TilingConfig",
    "build_model",
    "convert_official",
    "load_checkpoint",
    "load_pretrained",
    "packaged_names",
    "read_header",
    "save_checkpoint",
    "use_threads",
]


def __getattr__(name: str) -> object:
    if (module := _WITHOUT_TORCH.get(name)) is None:
        module = _WITH_TORCH.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for needed in ("torch", "safetensors"):
            if importlib.util.find_spec(needed) is None:
                raise ModuleNotFoundError(f"recofuse_core needs {needed}: pip install 'recofuse[torch]'", name=needed)
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
