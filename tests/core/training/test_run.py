"""A whole run from a configuration file."""

from pathlib import Path

import cv2
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recofuse_core import checkpoint, load_pretrained
from recofuse_core.errors import CheckpointError
from recofuse_core.model import ReCoFuse
from recofuse_core.training.config import read_config
from recofuse_core.training.run import train_from_config
from tests.core.training.small import CONFIG, scenes


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration file beside its pairs."""
    for folder in ("vis", "ir"):
        (tmp_path / "pairs" / folder).mkdir(parents=True)
    for name, vis, ir in scenes():
        cv2.imwrite(str(tmp_path / "pairs" / "vis" / f"{name}.png"), vis[..., ::-1])
        cv2.imwrite(str(tmp_path / "pairs" / "ir" / f"{name}.png"), ir)
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def test_a_configuration_file_becomes_a_model_that_fuses(config: Path, tmp_path: Path) -> None:
    path = train_from_config(config, tmp_path / "run", quiet=True)
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


def test_weights_of_an_earlier_recipe_are_trained_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file that no model loads: its autoencoder lacks a tensor, and has one that there is no more."""
    model, earlier, lacking = (
        read_config(config).model_config,
        tmp_path / "earlier.safetensors",
        "autoencoder.stem.bias",
    )
    with torch.random.fork_rng():
        state = ReCoFuse(model).state_dict()
    state["autoencoder.older.bias"] = state.pop(lacking)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "require_match", lambda *_: None)
        checkpoint.save_checkpoint(earlier, state, model, name="earlier", version="1")
    with pytest.raises(CheckpointError, match=f"missing {lacking}"):
        load_pretrained(earlier)
    with pytest.raises(CheckpointError, match=f"1 weights to start from are missing, such as {lacking}"):
        train_from_config(config, tmp_path / "late", initial=earlier, first_stage="coupled", quiet=True)
    path = train_from_config(config, tmp_path / "whole", initial=earlier, quiet=True)
    trained, given = load_pretrained(path).state_dict(), checkpoint.load_state(earlier)
    assert torch.equal(trained["tone.layers.0.weight"], given["tone.layers.0.weight"])  # no stage here trains it
