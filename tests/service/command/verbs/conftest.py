"""What the verbs are tried on: a tiny model's weights and two pairs of pictures; no settings from outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from recofuse_core import build_model, save_checkpoint
from recofuse_core.data import write_image
from recofuse_core.scenes.scene import make_scene
from tests.service.command.calls import TINY


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("RECOFUSE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    state = build_model(TINY).state_dict()
    save_checkpoint(path, state, TINY, name="tiny", version="3", provenance={"data": {"pairs": 17}})
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two folders with the pairs a and b of 48x64."""
    for seed, name in enumerate("ab"):
        scene = make_scene(seed, 48, 64)
        write_image(tmp_path / "vis" / f"{name}.png", scene.vis)
        write_image(tmp_path / "ir" / f"{name}.png", scene.ir)
    return tmp_path
