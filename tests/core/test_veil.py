"""Veils: what the estimator promises whatever its weights are, and what the shipped ones do to fog."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from recofuse_core.bilateral import BilateralGrid
from recofuse_core.checkpoint import load_pretrained
from recofuse_core.degradations.physics import haze
from recofuse_core.degradations.recipes import degrade_vis
from recofuse_core.degradations.weather import scene_depth
from recofuse_core.errors import ConfigError
from recofuse_core.losses import luma
from recofuse_core.model import ReCoFuse
from recofuse_core.picture import Exposure
from recofuse_core.sampler import Pair
from recofuse_core.scenes.scene import make_scene
from recofuse_core.veil import (
    BRIGHT,
    CERTAIN,
    DOUBTFUL,
    FALLEN,
    MOST_BRIGHTENED,
    MOST_LIFTED,
    NEUTRAL,
    Fall,
    Veil,
    VeilConfig,
    VeilEstimator,
)
from tests.core.test_exposure import WITH_EXPOSURE
from tests.core.tiny import largest_difference, pairs, psnr_of, tiny_model

CLEAR, VEILED = -9.0, 9.0  # log-odds
SMALL = VeilConfig(cells=16, channels=(4, 6, 8), num_levels=3, knows_fall=True)


def veil_model(log_odds: float, seed: int = 0) -> ReCoFuse:
    """A model to which every frame looks as veiled as that, and whose lifting does something."""
    model = tiny_model(replace(WITH_EXPOSURE, veil=SMALL), seed).requires_grad_(False)
    assert model.veil is not None
    model.veil.judge.weight.zero_()
    model.veil.judge.bias.fill_(log_odds)
    return model


@pytest.mark.parametrize("size", [(64, 80), (33, 47)])
def test_a_fresh_estimator_finds_no_veil(size: tuple[int, int]) -> None:
    vis, ir = pairs(2, *size)
    veil = VeilEstimator(SMALL)(vis, ir, vis)
    assert torch.equal(veil.share, torch.zeros(2))
    assert torch.equal(veil.lifted(vis, vis), vis)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), height=st.integers(32, 70), width=st.integers(32, 70))
def test_veils_are_lifted_item_by_item_within_range(seed: int, height: int, width: int) -> None:
    vis, ir = pairs(3, height, width, seed)
    model = veil_model(VEILED, seed)
    frames = Pair(vis, ir)
    lifted = model.lift(frames, frames)
    assert lifted.vis.shape == vis.shape
    assert 0 <= float(lifted.vis.min()) <= float(lifted.vis.max()) <= 1
    second = Pair(vis[1:2], ir[1:2])
    assert torch.allclose(lifted.vis[1:2], model.lift(second, second).vis, atol=5e-5)
    assert torch.equal(lifted.ir, ir)


def of_light(level: float, frames: Pair) -> Pair:
    """Frames as they may have come: of one level, whatever the curves made of them."""
    return frames._replace(vis=torch.full_like(frames.vis, level))


def test_a_veil_is_lifted_the_more_the_surer_it_is() -> None:
    frames = Pair(*pairs(1, 64, 64))
    seen = of_light(NEUTRAL, frames)
    change = []
    for log_odds in (DOUBTFUL - 0.01, (DOUBTFUL + CERTAIN) / 2, CERTAIN + 0.01):
        lifted = veil_model(log_odds).lift(frames, seen).vis
        change.append(float((lifted - frames.vis).abs().mean()))
    assert change[0] == 0 < change[1] < change[2]
    assert change[1] == pytest.approx(change[2] * 0.5 / MOST_LIFTED, rel=1e-3)


def test_the_less_light_came_the_surer_a_veil_must_be() -> None:
    """Curves make a dark frame as flat and bright as one in fog, whatever it looks like to the judge."""
    frames = Pair(*pairs(1, 64, 64))
    halfway = veil_model((DOUBTFUL + CERTAIN) / 2)
    levels = (0.0, NEUTRAL - 0.03, NEUTRAL - 0.01, NEUTRAL, NEUTRAL + 0.01)
    came = [float((halfway.lift(frames, of_light(y, frames)).vis - frames.vis).abs().mean()) for y in levels]
    assert came[0] == came[1] == 0 < came[2] < came[3] < came[4]
    bright, brighter = (veil_model(DOUBTFUL - 1.5).lift(frames, of_light(y, frames)).vis for y in (BRIGHT, 0.9))
    assert torch.allclose(bright, brighter, atol=1e-6)
    assert float((bright - frames.vis).abs().mean()) > 1e-3


@pytest.mark.parametrize("exposure", ["as_shot", "lit"])
def test_a_veil_is_lifted_in_both_renditions(exposure: Exposure) -> None:
    vis, ir = pairs(1, 64, 48)
    found, none = (veil_model(log_odds).fuse(vis, ir, exposure=exposure) for log_odds in (VEILED, CLEAR))
    assert largest_difference(found, none) > 1e-3


def test_where_there_is_no_veil_the_other_frame_stays() -> None:
    (vis, ir), (other, _) = pairs(1, 64, 64), pairs(1, 64, 64, seed=1)
    frames = Pair(vis, ir)
    changes = []
    for log_odds in (CLEAR, (DOUBTFUL + CERTAIN) / 2, VEILED):
        lifted = veil_model(log_odds).lift(frames, of_light(NEUTRAL, frames), onto=Pair(other, ir)).vis
        changes.append(lifted - other)
    assert float(changes[0].abs().max()) == 0
    assert torch.allclose(changes[1], changes[2] * 0.5 / MOST_LIFTED, atol=1e-3)


def test_a_little_of_a_veil_stays() -> None:
    """Else blacks are cut, and lighting gives what holds nothing a colour of its own."""
    vis, ir = pairs(1, 64, 64)
    model = veil_model(VEILED)
    assert model.veil is not None
    model.veil.fade.bias.fill_(-100.0)
    frames = Pair(0.5 * vis, ir)
    lifted = model.lift(frames, frames).vis
    assert float(lifted.amin()) < 0.1 * float(frames.vis.mean())
    assert bool((lifted >= (1 - MOST_LIFTED) * frames.vis - 1e-6).all())


def test_a_night_that_curves_freed_of_haze_is_lit_as_they_left_it() -> None:
    """As it came it is bright enough, and lighting would leave it; a day in haze is lit as it came."""
    vis, ir = pairs(1, 64, 64)
    model = veil_model(CLEAR)
    clear = Pair(vis, ir)
    mean = float(vis.mean())
    for times, of_toned in ((1.0, 0.0), (1.5, 0.0), (3.0, MOST_LIFTED)):
        hazy = Pair(vis + (times - 1) * mean, ir)  # beyond white here, so that the mean is known
        lit = model.lift(clear, hazy, onto=hazy).vis
        assert torch.allclose(lit, hazy.vis + of_toned * (clear.vis - hazy.vis), atol=1e-5)
        assert model.lift(clear, hazy).vis is clear.vis  # as shot


def test_where_rain_or_snow_was_taken_off_there_is_a_veil() -> None:
    """Whatever it looks like; it is another one for what fell, and what had nothing taken off stays the same."""
    vis, ir = pairs(3, 64, 64)
    model = veil_model(CLEAR)
    veil = model.veil
    assert veil is not None
    assert veil.of_fall is not None
    fall = Fall(torch.tensor([1.0, 0.5, 0.0]), vis + torch.tensor([0.2, 0.1, 0.0]).view(3, 1, 1, 1))
    untaught = veil(vis, ir, vis, fall)
    assert torch.allclose(untaught.share, MOST_LIFTED * fall.share)
    assert torch.equal(veil(vis, ir, vis).share, torch.zeros(3))
    for parameter in veil.of_fall.parameters():
        parameter.normal_(0, 0.3, generator=Generator().manual_seed(len(parameter)))
    taught = veil(vis, ir, vis, fall)
    for name in ("light", "left"):
        change = (getattr(taught, name) - getattr(untaught, name)).abs().amax(dim=(1, 2, 3))
        assert change[0] > change[2] == 0, name
    change = (taught.grid.entries - untaught.grid.entries).abs().amax(dim=(1, 2, 3, 4))
    assert change[0] > change[2] == 0
    heavier = veil(vis, ir, vis, fall._replace(before=vis + 0.3))
    assert not torch.allclose(heavier.grid.entries[0], taught.grid.entries[0], atol=1e-4)


def test_what_fell_is_told_by_its_luma_in_cells() -> None:
    vis, ir = pairs(2, 64, 48)
    veil = VeilEstimator(SMALL)
    share = torch.tensor([0.3, 1.0])
    fall = Fall(share, vis + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
    cells, fallen = veil.averages(vis, ir, vis, fall)
    assert fallen is not None
    assert torch.equal(cells, veil.average(vis, ir))
    assert torch.equal(fallen.share, share)
    taken = FALLEN * (0.299 * 0.1 + 0.587 * 0.2 + 0.114 * 0.3)
    assert torch.allclose(fallen.luma, torch.full((2, 1, 16, 16), taken), atol=1e-5)


def test_weights_that_know_nothing_of_rain_judge_by_looks() -> None:
    vis, ir = pairs(1, 64, 64)
    veil = VeilEstimator(replace(SMALL, knows_fall=False))
    fall = Fall(torch.ones(1), vis + 0.2)
    assert veil.of_fall is None
    assert torch.equal(veil(vis, ir, vis, fall).share, torch.zeros(1))


@pytest.mark.parametrize("kind", ["downpour", "snowfall"])
def test_the_shipped_weights_lift_the_veil_of_rain_and_snow(kind: str) -> None:
    """On generated streets, which no training saw: closer to the clear frame than by its looks alone."""
    model = load_pretrained().requires_grad_(False)
    by_looks, told = [], []
    for seed in (2, 9, 12, 15):
        scene = make_scene(seed, 384, 512)
        given = degrade_vis(scene.vis, Generator().manual_seed(seed), "medium", [kind]).image[None]
        frames, fall = model.cleared(Pair(given, scene.ir[None, :1]))
        assert fall is not None
        by_looks.append(psnr_of(model.unveil(frames).vis[0], scene.vis))
        told.append(psnr_of(model.unveil(frames, fall).vis[0], scene.vis))
    assert sum(told) > sum(by_looks) + 4 * 0.3


@pytest.mark.parametrize("colour", [(0.6, 0.7, 0.8), (0.05, 0.95, 0.5), (0.5, 0.5, 0.5)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_was_learnt_an_even_sky_stays_even_and_of_its_colour(
    seed: int, colour: tuple[float, float, float]
) -> None:
    """Whatever contrast a network takes to be lost where: the light of a veil is a colour of the frame."""
    model = veil_model(VEILED, seed)
    assert model.veil is not None
    model.veil.grid.weight.normal_(0, 2, generator=Generator().manual_seed(seed))
    model.veil.fade.weight.zero_()
    model.veil.fade.bias.fill_(-0.2)
    vis = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    veil = model.veil(vis, torch.rand(1, 1, 64, 64, generator=Generator().manual_seed(seed)), vis)
    assert torch.allclose(veil.light, vis[..., :4, :4], atol=1e-5)
    assert float(veil.grid.entries.std()) > 0.01
    frames = Pair(vis, vis[:, :1])
    lifted = model.lift(frames, frames).vis
    expected = (1 - MOST_LIFTED * (1 - math.exp(-0.2))) * vis
    assert torch.allclose(luma(lifted), luma(expected), atol=1e-4)
    strongest = (expected - luma(expected)).abs().amax()
    assert (lifted - expected).abs().amax() <= 0.06 * strongest + 1e-4


def test_the_light_of_a_dark_veil_is_grey() -> None:
    """A lamp's colour would leave its opposite all over a night."""
    model = veil_model(VEILED)
    assert model.veil is not None
    cyan = torch.tensor([0.31, 0.46, 0.42]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    light = model.veil(cyan, cyan[:, :1], cyan).light
    assert float((light - light.mean(dim=1, keepdim=True)).abs().max()) < 1e-5
    assert float(light.mean()) == pytest.approx(0.4105, abs=1e-3)


def test_what_is_dark_behind_a_veil_gets_no_colour_by_its_light() -> None:
    """A veil of grey whose light was told a little green: what it covers is black and must not come out red."""
    light = torch.tensor([0.48, 0.55, 0.53]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    grid = BilateralGrid(torch.full((1, 1, 8, 8, 8), math.log(3.0)))
    veil = Veil(torch.ones(1), light, light, grid)
    greys = torch.tensor([0.36, 0.37, 0.38]).view(1, 1, 1, 3).expand(1, 3, 32, 3)
    lifted = veil.lifted(greys, greys)
    strongest = (lifted.amax(dim=1) - lifted.amin(dim=1))[0, 0]
    assert strongest[0] < 0.02  # of a luma of 0.03; 0.12 to 0.14 where nothing is told from an error
    assert strongest[2] < 0.07  # of 0.09
    lamp = torch.tensor([0.9, 0.5, 0.45]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    kept = veil.lifted(lamp, lamp)[0, :, 16, 16]
    assert float(kept[0] - kept[2]) > 0.7


def test_the_light_of_a_veil_is_left_hardly_brighter() -> None:
    model = veil_model(VEILED)
    assert model.veil is not None
    model.veil.fade.bias.fill_(100.0)
    vis, ir = pairs(1, 64, 64)
    veil = model.veil(vis, ir, vis)
    assert torch.allclose(veil.left, math.exp(MOST_BRIGHTENED) * veil.light, rtol=1e-5)


def test_a_veil_is_lifted_before_a_frame_is_lit() -> None:
    """And a frame without one is lit as it came: the tone curves come behind."""
    vis, ir = pairs(1, 64, 64)
    for log_odds in (VEILED, CLEAR):
        model = veil_model(log_odds)
        frames = Pair(vis, ir)
        lit = model.lift(model.normalise(frames), frames) if log_odds == VEILED else frames
        expected = model.normalise(model.light(Pair(lit.vis, ir)))
        assert torch.allclose(model.levelled(frames, "lit")[0].vis, expected.vis, atol=1e-5)


def test_no_corner_is_told_from_another() -> None:
    """A frame of one colour has one veil all over: where a frame ends is not seen."""
    model = veil_model(VEILED)
    assert model.veil is not None
    rows = model.veil(*(torch.full((1, channels, 64, 64), 0.6) for channels in (3, 1, 3))).grid.entries
    assert torch.allclose(rows[..., :1].expand_as(rows), rows, atol=1e-5)
    assert float((rows[..., 0, :] - rows[..., -1, :]).abs().max()) > 1e-2  # above and below may differ


@pytest.mark.parametrize("wrong", [{"cells": 20}, {"cells": 8}, {"channels": (0, 8, 8)}, {"num_levels": 1}], ids=str)
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        replace(SMALL, **wrong)  # type: ignore[arg-type]


def test_the_shipped_weights_lift_thin_haze() -> None:
    """Which does not look as certain as fog: what tells it is that there is light."""
    model = load_pretrained().requires_grad_(False)
    for seed in (0, 1, 7):
        scene = make_scene(seed, 192, 256)
        through = (-0.3 * scene_depth(scene.vis, Generator().manual_seed(seed))).exp()
        frames = Pair(haze(scene.vis, torch.full((3, 1, 1), 0.8), through)[None], scene.ir[None, :1])
        toned, lifted = model.normalise(frames).vis[0], model.unveil(frames).vis[0]
        assert psnr_of(lifted, scene.vis) > psnr_of(toned, scene.vis) + 2


def test_the_shipped_weights_lift_fog_and_leave_clear_frames_alone() -> None:
    """On generated streets, which no training saw, beside what the tone curves alone make of them.

    One of them is judged to have a thin veil, which changes it little (docs/decisions/0044).
    """
    model = load_pretrained().requires_grad_(False)
    toned, lifted = [], []
    for seed in (2, 6, 9):
        scene = make_scene(seed, 192, 256)
        ir = scene.ir[None, :1]
        clear = Pair(scene.vis[None], ir)
        unveiled = model.unveil(clear).vis
        assert psnr_of(unveiled, clear.vis) > 36
        if seed != 6:
            assert torch.equal(unveiled, clear.vis)
        foggy = degrade_vis(scene.vis, Generator().manual_seed(seed), "medium", ["fog"]).image[None]
        frames = Pair(foggy, ir)
        toned.append(float((model.normalise(frames).vis - scene.vis).square().mean()))
        lifted.append(float((model.unveil(frames).vis - scene.vis).square().mean()))
    assert sum(lifted) < 0.7 * sum(toned)


@pytest.mark.parametrize("size", [(160, 224), (480, 640)], ids=str)
@pytest.mark.parametrize("gain", [0.0, 0.1, 0.25, 0.4])
def test_the_shipped_weights_take_no_dark_frame_for_a_veiled_one(gain: float, size: tuple[int, int]) -> None:
    """Curves make a dark street flat and bright; a veil that is lifted from it would leave it bright."""
    model = load_pretrained().requires_grad_(False)
    for seed in (1, 8):
        scene = make_scene(seed, *size)
        noise = 0.01 * torch.randn(scene.vis.shape, generator=Generator().manual_seed(seed))
        for dark in (gain * scene.vis, (gain * scene.vis + noise).clamp(0, 1)):
            frames = Pair(dark[None], scene.ir[None, :1])
            assert torch.equal(model.unveil(frames).vis, frames.vis)
