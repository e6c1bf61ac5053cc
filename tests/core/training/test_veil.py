"""What the veil estimator learns from, and the stage that trains it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from recofuse_core.errors import ConfigError
from recofuse_core.model import ReCoFuse
from recofuse_core.training import veil
from recofuse_core.training.config import DataConfig, StageName, TrainConfig
from recofuse_core.training.exposure import FrameSource, References
from recofuse_core.training.pairs import PairSource
from recofuse_core.training.trainer import Trainer
from recofuse_core.training.veil import VeilKind, VeilSamples, VeilSource, veil_loss
from tests.core.training.small import scenes, stage

SIZES: dict[str, Any] = {"cells": 16, "channels": (8, 8, 8), "num_levels": 3, "knows_fall": True}
SIDE = 32


def frames() -> FrameSource:
    """Three pairs, a fog over the first, and a photograph, half black and half bright, which is clear for certain."""
    pairs = list(scenes())
    photo = np.zeros((96, 128, 3), np.uint8)
    photo[:, 64:] = 210
    name, vis, _ = pairs[0]
    return FrameSource(pairs, References(photos=[photo], foggy={name: vis // 2 + 110}))


def trainer(
    steps: int = 4, num_frames: int = 12, sizes: dict[str, Any] | None = SIZES, name: StageName = "veil"
) -> Trainer:
    data = DataConfig(root="scenes")
    stages = (replace(stage(name, steps), num_frames=num_frames, batch_size=8, learning_rate=1e-2, warmup_steps=2),)
    config = TrainConfig("compact", "test", data, stages, model={"veil": sizes})
    return Trainer(config, PairSource(data, scenes()), frames=frames())


@pytest.mark.parametrize("kind", VeilKind)
def test_every_kind_veils_a_frame_or_leaves_it(kind: VeilKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(veil, "SHARES", dict.fromkeys(VeilKind, 0.0) | {kind: 1.0})
    for name in ("SENSED", "NOISY", "DUSK"):
        monkeypatch.setattr(veil, f"{name}_PROBABILITY", 0.0)
    source, generator = VeilSource(frames()), Generator().manual_seed(0)
    drawn = [source.frame(SIDE, generator) for _ in range(6)]
    for frame in drawn:
        assert frame.kind is kind
        assert frame.given.shape == frame.clear.shape == (3, SIDE, SIDE)
        assert frame.ir.shape == (1, SIDE, SIDE)
        assert 0 <= float(frame.given.min()) <= float(frame.given.max()) <= 1
    if kind is not VeilKind.NONE:  # a veil takes contrast away
        assert sum(float(frame.clear.std() - frame.given.std()) > 0 for frame in drawn) >= 5


def test_a_frame_without_a_veil_is_asked_for_as_the_curves_leave_it() -> None:
    model = trainer().model
    source = VeilSource(frames())
    samples = VeilSamples.draw(model, source, 30, SIDE, Generator().manual_seed(1))
    assert samples.cells.shape == (30, 4, 16, 16)
    assert samples.clear.shape == (30, 3, 8, 8)
    has_none = samples.squared == 0
    assert 0 < int(has_none.sum()) < 15
    toned = torch.nn.functional.avg_pool2d(samples.cells[:, :3].float(), 2)
    assert torch.allclose(toned[has_none], samples.clear[has_none].float(), atol=1e-3)
    assert int((samples.squared > veil.IS_VEIL).sum()) > 10


def test_the_stage_learns_and_moves_its_estimator_alone() -> None:
    learning = trainer(60, 40)
    before = {name: value.clone() for name, value in learning.model.state_dict().items()}
    reports = list(learning.run_stage())
    assert set(reports[0].losses) == {"veil", "log", "spread", "odds"}
    samples, estimator = learning.veil_samples, learning.model.veil
    assert samples is not None
    assert estimator is not None
    with torch.no_grad():
        trained = veil_loss(estimator, samples)
    after = learning.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if name.startswith("veil.") and ".of_fall." not in name}
    learning.model.load_state_dict(before)
    with torch.no_grad():
        untrained = veil_loss(estimator, samples)
    assert float(trained["veil"]) < 0.92 * float(untrained["veil"])
    assert float(trained["odds"]) < 0.9 * float(untrained["odds"])


def in_any_weather(model: ReCoFuse) -> ReCoFuse:
    """The model, which takes something off of every frame."""
    assert model.weather is not None
    torch.nn.init.constant_(model.weather.judge.bias, 9.0)
    torch.nn.init.normal_(model.weather.head.weight, std=0.02, generator=Generator().manual_seed(0))
    return model


def test_what_rain_and_snow_tell_is_learnt_by_itself() -> None:
    learning = trainer(60, 24, name="veil_fall")
    model = in_any_weather(learning.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reports = list(learning.run_stage())
    after, samples, estimator = model.state_dict(), learning.veil_samples, model.veil
    assert samples is not None
    assert estimator is not None
    assert bool((samples.share > 0.9).all())
    assert float(samples.fallen.abs().max()) > 0
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if name.startswith("veil.of_fall.")
    }
    assert set(reports[0].losses) == {"veil", "log", "spread", "odds"}
    with torch.no_grad():
        trained = veil_loss(estimator, samples)
        model.load_state_dict(before)
        untrained = veil_loss(estimator, samples)
    assert float(trained["veil"]) < 0.97 * float(untrained["veil"])
    assert torch.equal(trained["odds"], untrained["odds"])


def test_rain_and_snow_are_drawn_with_the_veil_they_bring_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(veil, "FALL_SENSED_PROBABILITY", 0.0)
    source, generator = VeilSource(frames(), through_fall=True), Generator().manual_seed(0)
    drawn = [source.frame(SIDE, generator) for _ in range(60)]
    assert {frame.kind for frame in drawn} == {VeilKind.DOWNPOUR, VeilKind.SNOWFALL, VeilKind.NONE}
    for frame in drawn:
        assert frame.given.shape == frame.clear.shape == (3, SIDE, SIDE)
        assert 0 <= float(frame.given.min()) <= float(frame.given.max()) <= 1
        assert not torch.equal(frame.given, frame.clear)


def test_what_takes_no_rain_off_has_nothing_to_teach() -> None:
    learning = trainer(name="veil_fall")
    with pytest.raises(ConfigError, match="train the stage weather first"):
        next(learning.run_stage())


def test_a_sky_that_nobody_sees_is_asked_for_as_bright_as_its_veil_by_day_alone() -> None:
    """A white sky above a street, both in fog that hides the sky; below, the street is asked for as it is."""
    clear = torch.full((2, 3, 16, 16), 0.5)
    clear[:, :, :8] = 0.3
    clear[1] *= 0.2  # the same by night
    toned = 0.6 * clear + 0.4 * 0.8
    toned[:, :, :8] = 0.8
    wanted = veil._with_bright_skies(clear, toned, torch.full((2,), 0.1))
    assert torch.allclose(wanted[0, :, :8], torch.tensor(0.95 * 0.8))
    assert torch.equal(wanted[0, :, 8:], clear[0, :, 8:])
    assert torch.equal(wanted[1], clear[1])
    assert torch.equal(veil._with_bright_skies(clear, toned, torch.zeros(2)), clear)  # without a veil it is known


def test_what_cannot_be_trained_is_named() -> None:
    with pytest.raises(ConfigError, match="veil"):
        trainer(sizes=None)
    learning = trainer()
    learning.frames = None
    with pytest.raises(ConfigError, match=r"data\.references"):
        next(learning.run_stage())
    model: ReCoFuse = trainer().model
    with pytest.raises(ConfigError, match="at least 16 px"):
        VeilSamples.draw(model, VeilSource(frames()), 1, 8, Generator().manual_seed(0))
