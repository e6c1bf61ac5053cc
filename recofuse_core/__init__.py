"""ReCoFuse as a library: degraded infrared/visible pairs in, restored and fused images out."""

import importlib.util

from recofuse_host.waiting import sleep_while_waiting

if missing := [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]:
    raise ModuleNotFoundError(f"recofuse_core needs {missing[0]}: pip install 'recofuse[torch]'", name=missing[0])
sleep_while_waiting()  # before torch is imported

from recofuse_core.checkpoint import load_checkpoint, load_pretrained, packaged_names, read_header, save_checkpoint
from recofuse_core.errors import CheckpointError, ConfigError, CoreError, DatasetError, NumericsError, ShapeError
from recofuse_core.model import PRESETS, ModelConfig, ReCoFuse, build_model
from recofuse_core.picture import FusionOutput, ModelInfo
from recofuse_core.published import convert_official
from recofuse_core.runtime import Runtime
from recofuse_core.threads import use_threads
from recofuse_core.tiling import TilingConfig

use_threads()

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
]
