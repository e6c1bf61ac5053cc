"""Pairs behind the lighting: what their targets are, and a coupled stage that learns from them."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from recofuse_core.errors import ConfigError
from recofuse_core.exposure import ExposureConfig, ExposureEstimator, Lighting
from recofuse_core.model import PRESETS, ReCoFuse
from recofuse_core.sampler import Pair
from recofuse_core.training.config import DataConfig, TrainConfig
from recofuse_core.training.delivered import DeliveredSource, without_noise
from recofuse_core.training.exposure import Frame, FrameKind, FrameSource, References
from recofuse_core.training.pairs import DegradedFrame, PairSource
from recofuse_core.training.trainer import Trainer
from recofuse_core.veil import Fall
from tests.core.training.small import CROP, scenes, stage

SIZES: dict[str, Any] = {"cells": 16, "num_quantiles": 6, "width": 32, "channels": (8, 12, 16), "num_levels": 3}
GAIN = 3.0
SIDE = 64


def even(level: int) -> np.ndarray:
    return np.full((96, 128, 3), level, np.uint8)


def frames_of(kind: FrameKind) -> FrameSource:
    """A source of even frames of one kind alone: 20 levels as night, 115 as what fog hid."""
    is_night = kind is FrameKind.NIGHT
    pair = ("a", even(20 if is_night else 115), np.full((96, 128), 90, np.uint8))
    source = FrameSource([pair], References(foggy={} if is_night else {"a": even(190)}))
    assert source.kinds == [kind]
    return source


class Bare(ReCoFuse):
    """A model of which nothing stands before the encoder but what a test puts there."""

    def __init__(self) -> None:
        super().__init__(replace(PRESETS["compact"], tone=None, exposure=None, weather=None, veil=None))


def source_of(kind: FrameKind, model: ReCoFuse | None = None, lit: float = 1.0, **shares: Any) -> DeliveredSource:
    """Every pair lit unless `shares` says otherwise, by a gain that does not depend on it."""
    estimator = ExposureEstimator(ExposureConfig(**SIZES))
    estimator.curve_head.bias.data[3:6] = math.log(GAIN)
    pairs = PairSource(DataConfig(root="scenes", clean_probability=1.0), scenes())
    return DeliveredSource(pairs, frames_of(kind), model or Bare(), estimator, lit_probability=lit, **shares)


def test_a_nights_target_is_the_lit_night_without_noise_or_weather() -> None:
    source, generator = source_of(FrameKind.NIGHT), Generator().manual_seed(0)
    frames = [source.lit_frame(SIDE, generator) for _ in range(24)]
    for frame in frames:
        assert float(frame.vis.flatten(1).std(dim=1).max()) < 1e-3
        assert 0.10 < float(frame.vis.mean()) < 0.40  # 20 / 255 times the gain, varied by a power and a cast
    assert sum(float(frame.degraded_vis.std()) > 0.01 for frame in frames) > 8  # noise, streaks and flakes, lit too
    assert any(float((frame.degraded_ir - frame.ir).abs().mean()) > 0.01 for frame in frames)


def test_what_fog_hid_is_its_own_target() -> None:
    source, generator = source_of(FrameKind.FOG_PAIR), Generator().manual_seed(0)
    for _ in range(8):
        frame = source.lit_frame(SIDE, generator)
        assert torch.allclose(frame.vis, torch.tensor(115 / 255), atol=1e-4)


def test_pairs_come_lit_as_often_as_asked() -> None:
    source = source_of(FrameKind.NIGHT)
    source.lit_probability = 0.25
    batch = source.draw(64, CROP, Generator().manual_seed(1))
    is_lit = batch.clean.vis.flatten(2).std(dim=2).amax(dim=1) < 1e-3  # generated scenes are never even
    assert 6 <= int(is_lit.sum()) <= 28  # within four deviations
    assert batch.clean.vis.shape == batch.clean.ir.shape == (64, 3, CROP, CROP)
    assert batch.frame.vis.shape[-1] == CROP  # the crop is larger than the cells, and no context was asked for


def test_the_target_of_a_real_night_has_not_its_cameras_noise() -> None:
    scene = torch.where(torch.arange(SIDE) < SIDE // 2, 0.03, 0.15).expand(3, SIDE, SIDE)
    night = scene + 0.004 * torch.randn(3, SIDE, SIDE, generator=Generator().manual_seed(2))
    calm = without_noise(night)
    assert float((calm - scene).square().mean()) < 0.25 * float((night - scene).square().mean())
    assert float((calm - scene).abs().max()) < 0.01  # at the edge, too


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_pairs_as_shot_come_in_weather_as_often_as_asked(probability: float) -> None:
    source = source_of(FrameKind.NIGHT, lit=0.0, weather_probability=probability)
    frames = [source.frame(SIDE, Generator().manual_seed(seed)) for seed in range(6)]
    assert [float((frame.degraded_vis - frame.vis).abs().mean()) > 1e-3 for frame in frames] == 6 * [probability == 1]


def test_degraded_frames_come_as_the_model_encodes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weather goes first, then the veil, under tone curves; then comes the lighting, and tone curves again."""
    model = Bare()
    fell = Fall(torch.ones(1), torch.ones(1, 3, SIDE, SIDE))

    def lifted(frames: Pair, by: Callable[[Tensor], Tensor], fall: Fall | None) -> Pair:
        assert fall is fell
        return frames._replace(vis=by(frames.vis))

    monkeypatch.setattr(model, "cleared", lambda frames: (frames._replace(vis=frames.vis * 0 + 0.1), fell))
    monkeypatch.setattr(model, "normalise", lambda images: Pair(images.vis + 0.2, images.ir * 0))
    monkeypatch.setattr(model, "_lifted", lambda toned, seen, fall: (lifted(toned, lambda vis: vis / 2, fall), None))
    monkeypatch.setattr(model, "unveil", lambda frames, fall: lifted(frames, lambda vis: vis + 0.05, fall))
    source, generator = source_of(FrameKind.NIGHT, model), Generator().manual_seed(3)
    for made, level in (
        (source.lit_frame(SIDE, generator), GAIN * 0.15 + 0.2),
        (source.frame(SIDE, generator), (0.1 + 0.2) / 2),
    ):
        expected = torch.full((3, SIDE, SIDE), level)
        torch.testing.assert_close(made.degraded_vis, expected, atol=0.008, rtol=0)  # relief takes a level or two
        assert float(made.degraded_ir.abs().max()) == 0


@pytest.mark.parametrize(("is_lit", "expected"), [(True, 0.18), (False, 0.1)])
def test_dark_infrared_is_brightened_beside_lit_nights_and_so_is_its_target(
    monkeypatch: pytest.MonkeyPatch, is_lit: bool, expected: float
) -> None:
    """The brightening that the given frame asks for is the target's, too."""
    model = Bare()
    monkeypatch.setattr(model, "normalise", lambda images: Pair(images.vis, images.ir * 0 + 0.1))
    source = source_of(FrameKind.NIGHT, model)
    dark = torch.full((1, SIDE, SIDE), 0.1)
    night = torch.full((3, SIDE, SIDE), 0.1)
    monkeypatch.setattr(source.frames, "scene", lambda *_: (night, night, dark, FrameKind.NIGHT))
    monkeypatch.setattr(model, "cleared", lambda frames: (frames._replace(vis=frames.vis * 0 + 0.1), None))
    generator = Generator().manual_seed(5)
    made = source.lit_frame(SIDE, generator) if is_lit else source.frame(SIDE, generator)
    torch.testing.assert_close(made.degraded_ir, torch.full_like(dark, expected), atol=1e-3, rtol=0)
    if is_lit:
        torch.testing.assert_close(made.ir, torch.full_like(dark, expected), atol=1e-3, rtol=0)


class BySight(ExposureEstimator):
    """Brings the mean of whatever frame it sees to LIT_MEAN, so that a target shows which frame it was lit by."""

    LIT_MEAN = 0.6

    def forward(self, vis: Tensor, ir: Tensor) -> Lighting:
        """See ExposureEstimator."""
        lighting = super().forward(vis, ir)
        gain = (self.LIT_MEAN / vis.mean()).expand_as(lighting.curves.gain)
        return lighting._replace(curves=lighting.curves._replace(gain=gain))


@pytest.mark.parametrize("veil", [0.0, 0.15])
def test_the_clean_frame_is_lit_as_the_given_one_unless_that_lost_a_veil(
    monkeypatch: pytest.MonkeyPatch, veil: float
) -> None:
    """The given frame comes brighter than the clean one: by its own lighting the clean one would be as bright."""
    model, clean, given = Bare(), 0.2, 0.25
    monkeypatch.setattr(model, "cleared", lambda frames: (frames._replace(vis=frames.vis * 0 + given + veil), None))
    monkeypatch.setattr(model, "unveil", lambda frames, _: frames._replace(vis=frames.vis - veil) if veil else frames)
    source = source_of(FrameKind.NIGHT, model)
    source.exposure = BySight(ExposureConfig(**SIZES))
    scene = torch.full((3, SIDE, SIDE), clean)
    monkeypatch.setattr(
        source.frames, "scene", lambda *_: (scene, scene, torch.full((1, SIDE, SIDE), 0.4), FrameKind.DARKENED)
    )
    frame = source.lit_frame(SIDE, Generator().manual_seed(4))
    by = clean if veil else given
    torch.testing.assert_close(frame.vis, scene * (BySight.LIT_MEAN / by), atol=0.01, rtol=0)
    torch.testing.assert_close(frame.degraded_vis, torch.full_like(scene, BySight.LIT_MEAN), atol=0.01, rtol=0)


def trainer(frames: FrameSource | None) -> Trainer:
    coupled = replace(stage("coupled", 2, rollout=True), lit_probability=0.5)
    model = {"exposure": SIZES, "tone": {"width": 4}}
    data = DataConfig(root="scenes")
    config = TrainConfig(preset="compact", version="test", data=data, stages=(coupled,), model=model)
    return Trainer(config, PairSource(data, scenes()), frames=frames)


def test_a_coupled_stage_learns_from_lit_pairs_and_leaves_the_lighting_alone() -> None:
    run = trainer(
        FrameSource([("a", even(20), np.full((96, 128), 90, np.uint8))], References([Frame(even(20), even(90))]))
    )
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    assert all(math.isfinite(loss) for report in run.run_stage() for loss in report.losses.values())
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith("exposure.") for name in changed)


def test_lit_pairs_ask_for_frames_an_estimator_and_a_coupled_stage() -> None:
    with pytest.raises(ConfigError, match=r"data\.references"):
        next(trainer(None).run_stage())
    run = trainer(frames_of(FrameKind.NIGHT))
    run.model.exposure = None
    with pytest.raises(ConfigError, match="exposure estimator"):
        next(run.run_stage())
    with pytest.raises(ConfigError, match="coupled"):
        replace(stage("branches"), lit_probability=0.5)
    with pytest.raises(ConfigError, match="with lit_probability"):
        replace(stage("coupled"), weather_probability=0.5)
    with pytest.raises(ConfigError, match="detail stage with lit_probability"):
        replace(stage("coupled"), lit_probability=0.5, photo_probability=0.5)


def source_of_photographs(probability: float, *, for_detail: bool = False) -> DeliveredSource:
    """Pairs as shot, and photographs of columns one pixel wide."""
    columns = np.broadcast_to(np.arange(128) % 2 * 120 + 60, (96, 128))
    photo = np.ascontiguousarray(np.stack([columns] * 3, axis=-1).astype(np.uint8))
    source = source_of(FrameKind.NIGHT, lit=0.0, photo_probability=probability, for_detail=for_detail)
    source.frames.photos = [photo]
    return source


def test_photographs_come_as_sharp_as_they_are_and_half_of_them_without_noise() -> None:
    source, generator = source_of_photographs(1.0), Generator().manual_seed(6)
    frames = [source.photograph(SIDE, generator) for _ in range(40)]
    sharp = [frame for frame in frames if float(frame.vis.std()) > 0.03]  # neither reduced nor darkened much
    assert len(sharp) > 12
    for frame in frames:
        assert frame.vis.shape == frame.degraded_vis.shape == (3, SIDE, SIDE)
        assert frame.ir.shape == frame.degraded_ir.shape == (1, SIDE, SIDE)
    noise = [float((frame.degraded_vis - frame.vis).abs().mean()) for frame in frames]
    assert 8 < sum(each < 0.004 for each in noise) < 36
    assert any(each > 0.01 for each in noise)


@pytest.mark.parametrize(("probability", "least", "most"), [(0.0, 0, 0), (0.5, 6, 26), (1.0, 16, 32)])
def test_photographs_come_as_often_as_asked(
    probability: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of_photographs(probability)
    drawn: list[DegradedFrame] = []
    photograph = source.photograph

    def counted(side: int, generator: Generator) -> DegradedFrame:
        drawn.append(photograph(side, generator))
        return drawn[-1]

    monkeypatch.setattr(source, "photograph", counted)
    batch = source.draw(32, CROP, Generator().manual_seed(7))
    assert batch.clean.vis.shape == (32, 3, CROP, CROP)
    assert least <= len(drawn) <= most


def test_a_bar_is_in_all_images_of_a_frame() -> None:
    source, generator = source_of_photographs(1.0, for_detail=True), Generator().manual_seed(8)
    batch = source.draw(32, CROP, generator)
    images = torch.cat([*batch.clean, *batch.degraded], dim=1)
    lines = torch.stack([images[..., 0, :], images[..., -1]]).flatten(2)  # of the top, and of the right
    has_bar = ((lines == 0).all(dim=2) | (lines == 1).all(dim=2)).any(dim=0)
    assert 1 <= int(has_bar.sum()) <= 16


@pytest.mark.parametrize("photo_probability", [0.0, 1.0])
def test_a_detail_stage_moves_the_gates_alone(photo_probability: float) -> None:
    detail = replace(stage("detail", 2), lit_probability=0.5, photo_probability=photo_probability)
    detail = replace(detail, fusion_log_weight=0.1)
    model = {"exposure": SIZES, "tone": {"width": 4}}
    data = DataConfig(root="scenes")
    config = TrainConfig(preset="compact", version="test", data=data, stages=(detail,), model=model)
    frames = FrameSource([("a", even(20), np.full((96, 128), 90, np.uint8))], References(photos=[even(90)]))
    run = Trainer(config, PairSource(data, scenes()), frames=frames)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    assert all(math.isfinite(loss) for report in run.run_stage() for loss in report.losses.values())
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in changed} == {
        "detail.vis",
        "detail.ir",
        "detail.fused",
    }
