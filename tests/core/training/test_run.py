"""A whole run from a configuration file."""

from pathlib import Path

import cv2
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recofuse_core import load_pretrained
from recofuse_core.training.run import train_from_config
from tests.core.training.small import CONFIG, scenes


def test_a_configuration_file_becomes_a_model_that_fuses(tmp_path: Path) -> None:
    for folder in ("vis", "ir"):
        (tmp_path / "pairs" / folder).mkdir(parents=True)
    for name, vis, ir in scenes():
        cv2.imwrite(str(tmp_path / "pairs" / "vis" / f"{name}.png"), vis[..., ::-1])
        cv2.imwrite(str(tmp_path / "pairs" / "ir" / f"{name}.png"), ir)
    (tmp_path / "config.toml").write_text(CONFIG)
    path = train_from_config(tmp_path / "config.toml", tmp_path / "run", quiet=True)
    model = load_pretrained(path)
    assert model.info.version == "9"
    assert model.info.provenance["stage"] == "coupled"
    output = model.fuse(torch.rand(1, 3, 40, 48), torch.rand(1, 1, 40, 48))
    assert output.fused is not None
    assert output.fused.shape == (1, 3, 40, 48)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "autoencoder.safetensors",
        "best.safetensors",
        "coupled.safetensors",
        "model.safetensors",
        "state.pt",
        "tensorboard",
    ]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"autoencoder/clean", "coupled/vis", "coupled/learning_rate", "coupled/psnr_ir"} <= set(tags["scalars"])
    assert set(tags["images"]) == {f"coupled/{row}" for row in range(3)}  # degraded, restored and fused, one row a pair
    (row,) = events.Images("coupled/0")
    assert (row.height, row.width) == (64, 5 * 80)
