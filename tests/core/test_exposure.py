"""Lighting: what the estimator promises whatever its weights are, and how a model gives the rendition asked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from recofuse_core.bilateral import BilateralGrid
from recofuse_core.checkpoint import load_pretrained, save_checkpoint
from recofuse_core.errors import ConfigError
from recofuse_core.exposure import (
    CLIMB,
    RELIEF,
    ExposureConfig,
    ExposureEstimator,
    Lighting,
    _box,
    _pooled,
    averaged,
    contrasted,
    with_relief,
)
from recofuse_core.losses import luma
from recofuse_core.model import ReCoFuse
from recofuse_core.networks import ToneCurves
from recofuse_core.picture import Exposure
from recofuse_core.recording import EagerRecorder
from recofuse_core.runtime import Runtime
from recofuse_core.sampler import Pair
from recofuse_core.tiling import TilingConfig
from tests.core.tiny import GATED, images_of, largest_difference, pairs, tiny_model

SMALL = ExposureConfig(cells=16, num_quantiles=6, width=12, channels=(4, 6, 8), num_levels=3)
WITH_EXPOSURE = replace(GATED, exposure=SMALL)


def estimator(seed: int = 0, config: ExposureConfig = SMALL) -> ExposureEstimator:
    """One whose weights do something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = ExposureEstimator(config).requires_grad_(False)
    generator = Generator().manual_seed(seed)
    for head in (made.curve_head, made.grid_head):
        head.weight.copy_(0.1 * torch.randn(head.weight.shape, generator=generator))
    return made


def lit_model(seed: int = 0) -> ReCoFuse:
    return tiny_model(WITH_EXPOSURE, seed).requires_grad_(False)


# --- the estimator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 80), (33, 47), (32, 32), (101, 38)])
def test_a_fresh_estimator_leaves_every_frame_alone(size: tuple[int, int]) -> None:
    vis, ir = pairs(2, *size)
    lit = ExposureEstimator(SMALL)(vis, ir)(vis)
    assert lit.shape == vis.shape
    assert torch.allclose(lit, vis.clamp(1e-5, 1), atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), height=st.integers(32, 70), width=st.integers(32, 70))
def test_a_batch_is_lit_item_by_item_within_range(seed: int, height: int, width: int) -> None:
    vis, ir = pairs(3, height, width, seed)
    lit = estimator(seed)(vis, ir)(vis)
    assert lit.shape == vis.shape
    assert 0 <= float(lit.min()) <= float(lit.max()) <= 1
    alone = estimator(seed)(vis[1:2], ir[1:2])(vis[1:2])
    assert torch.allclose(lit[1:2], alone, atol=1e-5)


def test_features_are_ordered_quantiles_then_spread() -> None:
    made = estimator()
    vis, ir = pairs(1, 48, 64)
    cells = made.average(vis, ir)
    features = made.features(cells)[0]
    count = SMALL.num_quantiles
    for channel, plane in enumerate(cells[0].flatten(1)):
        quantiles = features[count * channel : count * (channel + 1)]
        assert torch.equal(quantiles[[0, -1]], torch.stack([plane.min(), plane.max()]))
        assert (quantiles.diff() >= 0).all()
        assert torch.allclose(features[4 * count + channel], plane.std())
    assert made.infrared_features().tolist() == [False] * 3 * count + [True] * count + [False] * 3 + [True]


def test_noise_hardly_moves_the_lighting() -> None:
    made = estimator(config=replace(SMALL, cells=32))
    vis, ir = pairs(1, 320, 320)
    noisy = vis + 0.05 * torch.randn(vis.shape, generator=Generator().manual_seed(3))
    calm, moved = made(vis, ir)(vis), made(noisy, ir)(vis)
    assert float((moved - calm).abs().max()) < 0.02
    assert float((calm - vis).abs().max()) > 0.05  # it does something


def lit_by(gain: float, gamma: float = 1.0) -> Lighting:
    """The same curve everywhere."""
    curves = ToneCurves(torch.zeros(1, 3, 1, 1), torch.full((1, 3, 1, 1), gain), torch.full((1, 3, 1, 1), gamma))
    return Lighting(curves, BilateralGrid(torch.zeros(1, 6, 2, 2, 2)))


def test_writing_on_a_bright_sign_in_the_dark_can_still_be_read() -> None:
    vis = torch.full((1, 3, 96, 96), 0.05)
    vis[..., 32:64, 32:64] = 0.8
    vis[..., 44:52, 36:60] = 0.45
    lighting = lit_by(3.0, 0.7)
    sign = (slice(None), 0, slice(46, 50), slice(40, 56)), (slice(None), 0, slice(34, 40), slice(36, 60))
    burnt = lighting.levels(vis)
    assert float(burnt[sign[0]].mean()) == float(burnt[sign[1]].mean()) == 1  # what the curve makes of both
    held = lighting(vis)
    assert float(held[sign[0]].mean() / held[sign[1]].mean()) < 0.8  # 0.56 as it came
    assert float(held[sign[1]].min()) > 0.95  # the sign itself stays as bright as it can be
    assert torch.allclose(held[..., :12, :], burnt[..., :12, :], atol=0.06)  # the dark far around it is, too


def test_a_lifted_veil_is_no_highlight() -> None:
    veiled = 0.5 + 0.5 * torch.rand(1, 1, 16, 16, generator=Generator().manual_seed(0)).repeat_interleave(4, 2)
    veiled = veiled.repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    curves = ToneCurves(torch.full((1, 3, 1, 1), -0.5), torch.full((1, 3, 1, 1), 2.0), torch.ones(1, 3, 1, 1))
    lighting = Lighting(curves, BilateralGrid(torch.zeros(1, 6, 2, 2, 2)))
    assert float(lighting.levels(veiled).max()) > 0.95
    assert torch.allclose(lighting(veiled), lighting.levels(veiled), atol=1e-4)


def test_colour_noise_of_lifted_shadows_goes_and_their_luma_and_the_lamps_colour_stay() -> None:
    generator = Generator().manual_seed(0)
    vis = 0.04 + 0.012 * torch.randn(1, 3, 96, 96, generator=generator)
    vis[..., 40:56, 40:56] = torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1)
    vis = vis.clamp(0, 1)
    lighting = lit_by(1.0, 0.45)
    levels, lit = lighting.levels(vis), lighting(vis)
    shadow = (slice(None), slice(None), slice(4, 30), slice(4, 90))
    noise = [float((image - luma(image))[shadow].std()) for image in (levels, lit)]
    assert noise[1] < 0.35 * noise[0]
    assert torch.allclose(luma(lit)[shadow], luma(levels)[shadow], atol=0.06)  # but for relief
    lamp = (slice(None), slice(None), slice(46, 50), slice(46, 50))
    assert torch.allclose(lit[lamp], levels[lamp], atol=0.06)


def test_blacks_that_are_lifted_come_out_grey() -> None:
    """A camera's black is a level or two of some colour, which lighting would make a green night."""
    black = torch.tensor([3.0, 8.0, 3.0]).view(3, 1, 1) / 255
    night = black.expand(3, 96, 128).clone()
    night[:, 60:, 40:90] = torch.tensor([0.10, 0.16, 0.07]).view(3, 1, 1)  # grass under a lamp
    lit = lit_by(4.0)(night[None])[0]
    before, after = (4 * night - luma(4 * night[None])[0], lit - luma(lit[None])[0])
    assert float(after[:, :40].abs().max()) < 0.3 * float(before[:, :40].abs().max())
    assert float(after[1, 70:90, 50:80].mean()) > 0.6 * float(before[1, 70:90, 50:80].mean())  # and stays green


@pytest.mark.parametrize("area", [(slice(0, 12), slice(0, 128)), (slice(80, 92), slice(90, 126))])
def test_bars_and_boxes_are_no_blacks_of_a_camera(area: tuple[slice, slice]) -> None:
    night = torch.tensor([3.0, 8.0, 3.0]).view(3, 1, 1).expand(3, 96, 128).clone() / 255
    night[:, 60:80, 20:60] = 0.2
    barred = night.clone()
    barred[:, *area] = 0
    lighting = lit_by(4.0)
    places = (slice(None), slice(30, 50))
    torch.testing.assert_close(lighting(barred[None])[0][places], lighting(night[None])[0][places], atol=0.01, rtol=0)


def test_a_black_frame_is_lit_to_no_more_than_its_curve_gives() -> None:
    black = torch.zeros(1, 3, 64, 64)
    assert torch.isfinite(lit_by(4.0)(black)).all()
    assert float(lit_by(4.0)(black).max()) < 0.01


def test_a_grey_frame_is_lit_grey_and_a_pale_one_keeps_its_colour() -> None:
    curves = ToneCurves(torch.zeros(1, 3, 1, 1), torch.tensor([3.0, 3.5, 3.0]).view(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
    lighting = Lighting(curves, BilateralGrid(torch.zeros(1, 6, 2, 2, 2)))
    grey = torch.linspace(0.02, 0.25, 128).expand(1, 3, 96, 128)
    lit = lighting(grey)
    assert float((lighting.levels(grey) - luma(lighting.levels(grey))).abs().max()) > 0.03
    assert float((lit - luma(lit)).abs().max()) < 1e-5
    pale = grey * torch.tensor([1.01, 1.0, 0.99]).view(1, 3, 1, 1)
    assert float((lighting(pale) - luma(lighting(pale))).abs().max()) > 0.02


@pytest.mark.parametrize(("gain", "black"), [(1.0, (3.0, 8.0, 3.0)), (4.0, (8.0, 5.0, 2.0))])
def test_blacks_that_are_not_lifted_or_not_green_keep_their_colour(gain: float, black: tuple[float, ...]) -> None:
    frame = torch.tensor(black).view(3, 1, 1).expand(3, 96, 128).clone() / 255
    frame[:, 48:] = 0.2
    lighting = lit_by(gain)
    lit, levels = lighting(frame[None])[0], lighting.levels(frame[None])[0]
    assert torch.allclose(
        lit[:, :40] - luma(lit[None, :, :40])[0], levels[:, :40] - luma(levels[None, :, :40])[0], atol=0.01
    )


def test_a_coat_in_the_shadow_keeps_its_colour_and_does_not_stain_the_street() -> None:
    vis = 0.04 + 0.004 * torch.randn(1, 3, 96, 96, generator=Generator().manual_seed(0))
    vis[..., 40:64, 44:56] = torch.tensor([0.09, 0.02, 0.02]).view(3, 1, 1)
    vis = vis.clamp(0, 1)
    lighting = lit_by(1.0, 0.45)
    colours = [(image - luma(image))[0, 0] for image in (lighting.levels(vis), lighting(vis))]  # how red it is
    coat, beside = (slice(46, 58), slice(47, 53)), (slice(40, 64), slice(60, 66))
    assert float(colours[1][coat].mean()) > 0.85 * float(colours[0][coat].mean())
    assert abs(float(colours[1][beside].mean() - colours[0][beside].mean())) < 0.02


def kept_colour_of_specks(colour: tuple[float, ...], side: int) -> float:
    """Of nine in noise, all lit, in shares of what the curve makes of them."""
    vis = 0.05 + 0.004 * torch.randn(1, 3, 96, 96, generator=Generator().manual_seed(0))
    specks = [(..., slice(row, row + side), slice(left, left + side)) for row in (8, 40, 72) for left in (8, 40, 72)]
    for speck in specks:
        vis[speck] = torch.tensor(colour).view(3, 1, 1)
    lighting = lit_by(1.0, 0.45)
    colours = [image - luma(image) for image in (lighting.levels(vis), lighting(vis))]
    by_curve, lit = (torch.stack([image[speck] for speck in specks]).abs().mean() for image in colours)
    return float(lit / by_curve)


@pytest.mark.parametrize("side", [4, 8])
def test_specks_of_colour_in_lifted_shadows_go(side: int) -> None:
    assert kept_colour_of_specks((0.054, 0.05, 0.045), side) < 0.15


def test_a_small_thing_that_differs_as_no_noise_does_keeps_its_colour() -> None:
    assert kept_colour_of_specks((0.07, 0.06, 0.02), 4) > 0.6


@pytest.mark.parametrize("radius", [1, 2, 6])
@pytest.mark.parametrize("size", [(8, 9), (30, 21)], ids=str)
def test_surroundings_on_a_gpu_are_those_on_a_processor(size: tuple[int, int], radius: int) -> None:
    blocks = torch.rand(2, 4, *size, generator=Generator().manual_seed(0))
    means = _box(blocks, radius)
    torch.testing.assert_close(_pooled(blocks, radius), means)
    row, column = 3, 7
    square = blocks[..., max(row - radius, 0) : row + radius + 1, max(column - radius, 0) : column + radius + 1]
    torch.testing.assert_close(means[..., row, column], square.mean(dim=(2, 3)))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.integers(32, 70), st.integers(32, 70), st.floats(0.3, 6), st.floats(0.3, 2))
def test_any_curve_keeps_frames_within_range(seed: int, height: int, width: int, gain: float, gamma: float) -> None:
    vis, _ = pairs(1, height, width, seed)
    lit = lit_by(gain, gamma)(vis)
    assert lit.shape == vis.shape
    assert 0 <= float(lit.min()) <= float(lit.max()) <= 1


@pytest.mark.parametrize("values", [{"cells": 20}, {"cells": 0}, {"num_levels": 1}, {"num_quantiles": 1}])
def test_sizes_must_make_sense(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        replace(SMALL, **values)  # type: ignore[arg-type]  # all of them are integers


# --- the model --------------------------------------------------------------------------------------------------------


def test_as_shot_is_what_a_model_without_an_estimator_gives_and_lit_the_default_of_one_with_it() -> None:
    vis, ir = pairs(1, 64, 48)
    with_estimator = lit_model()
    without = tiny_model(GATED)
    without.load_state_dict(
        {name: value for name, value in with_estimator.state_dict().items() if not name.startswith("exposure.")}
    )
    expected = images_of(without.fuse(vis, ir))
    as_shot = with_estimator.fuse(vis, ir, exposure="as_shot")
    assert all(torch.equal(a, b) for a, b in zip(images_of(as_shot), expected, strict=True))
    default, lit = with_estimator.fuse(vis, ir), with_estimator.fuse(vis, ir, exposure="lit")
    assert all(torch.equal(a, b) for a, b in zip(images_of(default), images_of(lit), strict=True))
    assert not torch.equal(images_of(lit)[0], expected[0])


def test_lit_is_the_rest_of_the_model_on_lit_frames() -> None:
    model = lit_model()
    vis, ir = pairs(2, 64, 48)
    lit = model.light(Pair(vis, ir))
    assert torch.equal(lit.ir, ir)
    assert float((lit.vis - vis).abs().max()) > 0.02
    assert (
        largest_difference(model.fuse(vis, ir, exposure="lit"), model.fuse(lit.vis, lit.ir, exposure="as_shot")) < 1e-6
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), gain=st.floats(1.0, 8.0))
def test_a_lit_night_has_more_contrast_and_keeps_black_white_and_order(seed: int, gain: float) -> None:
    levels = torch.rand(60, generator=Generator().manual_seed(seed)).sort().values
    levels = torch.cat([torch.zeros(2), levels, torch.ones(2)]).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    crisp = contrasted(averaged(levels / gain), levels)
    assert torch.equal(crisp[:, :, 0, :2], torch.zeros(1, 3, 2))
    assert torch.equal(crisp[:, :, -1, -2:], torch.ones(1, 3, 2))
    assert bool((crisp.flatten(2).diff(dim=-1) >= -1e-6).all())
    if gain <= 1.3:  # a day
        assert torch.allclose(crisp, levels, atol=1e-5)
    if gain >= 2:
        assert float(crisp.std()) > 1.005 * float(levels.std())


def bricks(level: float, contrast: float = 0.3, side: int = 96) -> torch.Tensor:
    """A coloured wall (1, 3, side, side) whose bricks of three pixels differ by a share of its level."""
    rows, columns = torch.meshgrid(torch.arange(side) // 3, torch.arange(side) // 3, indexing="ij")
    wall = level * (1 + contrast * ((rows + columns) % 2 * 2.0 - 1))
    return wall * torch.tensor([1.2, 1.0, 0.7]).view(1, 3, 1, 1)


def relieved(vis: torch.Tensor, lit: torch.Tensor) -> torch.Tensor:
    return with_relief(vis, averaged(vis), lit)


@settings(deadline=None, max_examples=30)
@given(level=st.floats(0.06, 0.3), stops=st.floats(0.8, 2.5))
def test_what_a_curve_flattens_keeps_most_of_its_relief(level: float, stops: float) -> None:
    vis = bricks(level)
    aim = min(level * 2**stops, 0.5)
    curved = vis.pow(torch.tensor(aim).log() / torch.tensor(level).log())
    lit = relieved(vis, curved)

    def relief(image: torch.Tensor) -> float:
        y = luma(image)
        return float(y.std() / y.mean())

    if aim == level * 2**stops:
        kept = min(RELIEF, (stops - 0.2) / 0.8) * min(1.0, (3.5 - stops) / 2)
        assert relief(lit) == pytest.approx(relief(curved) + kept * (relief(vis) - relief(curved)), abs=0.02)
    assert relief(lit) > 1.02 * relief(curved)
    assert float(luma(lit).mean()) == pytest.approx(float(luma(curved).mean()), abs=0.015)
    assert torch.allclose(lit.mean(dim=(2, 3)), curved.mean(dim=(2, 3)), atol=0.03)  # a little more coloured


def test_frames_of_a_batch_have_shades_of_their_own() -> None:
    vis = torch.cat([bricks(0.05), bricks(0.25)])
    together = relieved(vis, vis.sqrt())
    for index in range(2):
        alone = relieved(vis[index : index + 1], vis[index : index + 1].sqrt())
        assert torch.allclose(together[index : index + 1], alone, atol=1e-6)


def test_the_dark_beside_a_bright_window_is_as_bright_as_the_dark_far_from_it() -> None:
    vis = bricks(0.06)
    vis[..., :48] = 0.9
    lit = relieved(vis, vis.pow(0.5))
    beside, far = lit[..., 51:63], lit[..., 81:93]  # four bricks each
    assert float((beside.mean() - far.mean()).abs()) < 0.01
    assert float((beside.std() - far.std()).abs()) < 0.01
    assert float(lit[..., :45].min()) > 0.94


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), height=st.integers(8, 70), width=st.integers(8, 70), gain=st.floats(0.5, 12))
def test_relief_stays_within_its_bounds(seed: int, height: int, width: int, gain: float) -> None:
    vis = torch.rand(2, 3, height, width, generator=Generator().manual_seed(seed))
    curved = (vis * gain).clamp(0, 1)
    lit = relieved(vis, curved)
    assert 0 <= float(lit.min()) <= float(lit.max()) <= 1
    grey, grey_curved = (image[:, :1].expand(-1, 3, -1, -1) for image in (vis, curved))
    assert bool((relieved(grey, grey_curved) <= grey_curved + CLIMB * (1 - grey_curved) + 1e-6).all())
    alone = relieved(vis[1:], curved[1:])
    assert torch.allclose(lit[1:], alone, atol=1e-6)


@pytest.mark.parametrize("gain", [0.6, 1.0, 1.14])
def test_what_was_not_lit_keeps_its_levels(gain: float) -> None:
    vis = bricks(0.3)
    assert torch.allclose(relieved(vis, gain * vis), gain * vis, atol=1e-6)


def test_what_was_lifted_most_gets_no_more_of_its_noise() -> None:
    vis = bricks(0.01)
    curved = vis.pow(0.35)
    assert torch.allclose(relieved(vis, curved), curved, atol=1e-6)


def test_a_red_lamp_in_a_dark_wall_stays_red() -> None:
    vis = bricks(0.08)
    vis[..., 44:52, 44:52] = torch.tensor([0.9, 0.25, 0.2]).view(3, 1, 1)
    curved = vis.pow(0.5)
    lamp = (0, slice(None), slice(45, 51), slice(45, 51))
    lit = relieved(vis, curved)[lamp]
    assert float(lit[0].min()) > 0.94
    assert float(lit[1:].max()) < float(curved[lamp][1].max()) + 0.03


def test_an_even_frame_has_no_relief() -> None:
    vis = torch.full((1, 3, 64, 48), 0.1)
    lit = relieved(vis, torch.full_like(vis, 0.4))
    assert float(lit.std()) < 1e-6
    assert 0.39 < float(lit.mean()) <= 0.4


def test_tiles_of_a_large_frame_share_its_lighting() -> None:
    model = lit_model()
    model.tone = None
    vis, ir = pairs(1, 128, 160)
    tiled = TilingConfig(tile=64, overlap=16, max_pixels=64 * 64)
    lit = model.light(Pair(vis, ir))
    expected = model.fuse(lit.vis, lit.ir, tiling=tiled, exposure="as_shot")
    assert largest_difference(model.fuse(vis, ir, exposure="lit", tiling=tiled), expected) < 1e-6


@pytest.mark.parametrize("graphs", [False, True])
def test_a_runtime_gives_both_renditions(graphs: bool) -> None:
    model = lit_model()
    vis, ir = pairs(1, 64, 48)
    runtime = Runtime(model, precision="float32", graphs=graphs, recorder=EagerRecorder())
    renditions: tuple[Exposure, ...] = ("lit", "as_shot", "lit")
    for exposure in renditions:  # recorded runs of one shape must not be taken for each other
        if graphs:
            runtime.record([(1, 64, 48)], exposure=exposure)
        output = runtime.fuse(vis, ir, exposure=exposure)
        assert largest_difference(output, model.fuse(vis, ir, exposure=exposure)) < 1e-5


def test_half_precision_leaves_the_estimator_in_float32() -> None:
    runtime = Runtime(lit_model(), precision="bfloat16")
    assert runtime.model.exposure is not None
    assert {parameter.dtype for parameter in runtime.model.exposure.parameters()} == {torch.float32}


def test_weights_without_an_estimator_cannot_light() -> None:
    model = tiny_model(GATED)
    vis, ir = pairs(1, 32, 32)
    for refused in (
        lambda: model.fuse(vis, ir, exposure="lit"),
        lambda: Runtime(model, precision="float32").fuse(vis, ir, exposure="lit"),
        lambda: model.light(Pair(vis, ir)),
    ):
        with pytest.raises(ConfigError, match="tiny 1 have no exposure estimator and cannot give exposure 'lit'"):
            refused()


def test_an_unknown_rendition_names_what_there_is() -> None:
    vis, ir = pairs(1, 32, 32)
    with pytest.raises(ConfigError, match="exposure must be one of as_shot, lit, got 'bright'"):
        lit_model().fuse(vis, ir, exposure="bright")  # type: ignore[arg-type]  # on purpose


def test_a_checkpoint_keeps_the_estimator(tmp_path: Path) -> None:
    model = lit_model()
    path = tmp_path / "lit.safetensors"
    save_checkpoint(path, model.state_dict(), model.config, name="tiny", version="1", dtype=torch.float32)
    again = load_pretrained(path)
    assert again.config == model.config
    vis, ir = pairs(1, 48, 64)
    assert largest_difference(again.fuse(vis, ir, exposure="lit"), model.fuse(vis, ir, exposure="lit")) < 1e-6
