"""Small runs for the tests of training: three generated pairs, stages of a few steps, and a configuration file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recofuse_core.scenes.scene import make_scene
from recofuse_core.training.config import DataConfig, StageConfig, StageName, TrainConfig
from recofuse_core.training.pairs import PairSource
from recofuse_core.training.trainer import Trainer

ROOT = Path(__file__).parents[3]
CROP = 32


def as_bytes(image: Tensor) -> np.ndarray:
    pixels: np.ndarray = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return pixels


def scenes() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for seed, name in enumerate(("street_a", "street_b", "other_c")):
        scene = make_scene(seed, 64, 80)
        yield name, as_bytes(scene.vis), as_bytes(scene.ir)[..., 0]


def stage(name: StageName, steps: int = 4, *, rollout: bool = False) -> StageConfig:
    return StageConfig(
        name=name, steps=steps, batch_size=2, crop=CROP, learning_rate=1e-3, rollout=rollout, num_frames=4
    )


def trainer(*stages: StageConfig, context: int = 0) -> Trainer:
    data = DataConfig(root="scenes", group_weights={"street": 0.9}, other_weight=0.1, context=context)
    config = TrainConfig(preset="compact", version="test", data=data, stages=stages)
    return Trainer(config, PairSource(data, scenes()))


CONFIG = """
preset = "compact"
version = "9"
ema_interval = 1
checkpoint_interval = 1
log_interval = 1
validation_interval = 2
[data]
root = "pairs"
validation_root = "pairs"
[[stages]]
name = "autoencoder"
steps = 2
batch_size = 2
crop = 32
learning_rate = 1e-3
[[stages]]
name = "coupled"
rollout = true
steps = 2
batch_size = 2
crop = 32
learning_rate = 1e-3
optimizer = "lion"
"""
