"""The physical models, against independent writings."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recofuse_core.degradations import physics
from recofuse_core.errors import ShapeError
from tests.core.degradations.pictures import seeded, smooth_image


def test_low_light_formula() -> None:
    image = smooth_image(3)
    assert np.allclose(physics.low_light(image, 0.5, 2.0).numpy(), (0.5 * image.numpy()) ** 2, atol=1e-6)


def test_haze_goes_from_the_image_to_the_airlight() -> None:
    image, airlight = smooth_image(3), torch.tensor([0.8, 0.9, 1.0]).view(3, 1, 1)
    assert torch.equal(physics.haze(image, airlight, 1.0), image)
    assert torch.allclose(physics.haze(image, airlight, 0.0), airlight.expand_as(image))
    assert torch.allclose(physics.haze(image, 0.9, 0.25), 0.25 * image + 0.675, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), height=st.integers(16, 90), width=st.integers(16, 90), clutter=st.floats(0, 1))
def test_depth_surrogate_is_bounded_and_smooth(seed: int, height: int, width: int, clutter: float) -> None:
    depth = physics.depth_surrogate(height, width, clutter, seeded(seed))
    assert depth.shape == (1, height, width)
    assert 0.4 - 1e-5 <= depth.min() <= depth.max() <= 1 + 1e-5
    steepest = 0.6 * 12 / min(height, width)  # a 5x5 grid changes by at most its range within a fifth of the side
    assert depth.diff(dim=1).abs().max() < steepest
    assert depth.diff(dim=2).abs().max() < steepest


def test_depth_surrogate_without_clutter_is_far_at_the_top() -> None:
    depth = physics.depth_surrogate(32, 20, 0.0, seeded(0))
    assert depth[0, 0].allclose(torch.tensor(1.0))
    assert depth[0, -1].allclose(torch.tensor(0.4))


def test_precipitation_goes_from_the_image_to_its_brightness() -> None:
    image, cover = smooth_image(3), torch.zeros(1, 48, 64)
    cover[:, 10:20] = 1
    covered = physics.precipitation(image, cover, 0.9)
    assert torch.equal(covered[:, :10], image[:, :10])
    assert torch.allclose(covered[:, 10:20], torch.tensor(0.9))


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    density=st.floats(0.001, 0.006),
    length=st.floats(9, 27),
    angle=st.floats(1.2, 1.9),
    opacity=st.floats(0.35, 0.7),
)
def test_covers_are_bounded_and_grow_with_their_density(
    seed: int, density: float, length: float, angle: float, opacity: float
) -> None:
    rain = physics.rain_cover(96, 96, density, length, angle, opacity, seeded(seed))
    snow = physics.snow_cover(96, 96, density, opacity, seeded(seed))
    for cover, more in (
        (rain, physics.rain_cover(96, 96, 4 * density, length, angle, opacity, seeded(seed))),
        (snow, physics.snow_cover(96, 96, 4 * density, opacity, seeded(seed))),
    ):
        assert cover.shape == (1, 96, 96)
        assert 0 <= float(cover.min()) <= float(cover.max()) <= opacity + 1e-6
        assert more.mean() > cover.mean()


def test_rain_falls_along_its_angle() -> None:
    cover = physics.rain_cover(128, 128, 0.002, 25, math.pi / 2, 0.6, seeded(1))
    along, across = cover.diff(dim=1).abs().mean(), cover.diff(dim=2).abs().mean()
    assert across > 3 * along


def test_fixed_pattern_is_a_gain_and_an_offset_a_pixel() -> None:
    image = smooth_image(1)
    offsets, gains = torch.full_like(image, 0.1), torch.full_like(image, -0.5)
    assert torch.allclose(physics.fixed_pattern(image, offsets, gains), image * 0.5 + 0.1)


def test_colour_cast_scales_channels() -> None:
    image = smooth_image(3)
    cast = physics.colour_cast(image, torch.tensor([1.2, 1.0, 0.8]))
    assert torch.allclose(cast, torch.stack([image[0] * 1.2, image[1], image[2] * 0.8]))


@pytest.mark.parametrize(("smoothing", "max_run"), [(0.0, 1), (2.5, 1), (0.0, 6)])
def test_stripe_profile_has_the_std_asked_for(smoothing: float, max_run: int) -> None:
    profile = physics.stripe_profile(20_000, 0.03, seeded(1), smoothing=smoothing, max_run=max_run)
    assert profile.shape == (20_000,)
    assert profile.std().item() == pytest.approx(0.03, rel=0.06)
    centred = profile - profile.mean()
    neighbours = ((centred[1:] * centred[:-1]).mean() / centred.var()).item()
    assert (neighbours > 0.5) == (smoothing > 0 or max_run > 1)


def test_stripes_are_constant_along_their_lines() -> None:
    image = smooth_image(1, 20, 30)
    offsets, gains = torch.randn(30, generator=seeded(0)), torch.randn(30, generator=seeded(1)) * 0.1
    expected = image.numpy()[0] * (1 + gains.numpy()[None, :]) + offsets.numpy()[None, :]
    assert np.allclose(physics.stripes(image, offsets, gains)[0].numpy(), expected, atol=1e-6)
    rows = physics.stripes(image, offsets[:20], axis="rows") - image
    assert torch.allclose(rows[0], offsets[:20, None].expand(20, 30), atol=1e-6)
    with pytest.raises(ShapeError, match="for rows"):
        physics.stripes(image, offsets, axis="rows")


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_gaussian_noise_std_and_correlation(correlation: float) -> None:
    noise = physics.gaussian_noise(torch.full((3, 128, 128), 0.5), 0.1, seeded(0), correlation) - 0.5
    assert noise.mean().item() == pytest.approx(0, abs=2e-3)
    measured = torch.corrcoef(noise.reshape(3, -1))
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    assert measured[0, 1].item() == pytest.approx(correlation, abs=0.03)


@pytest.mark.parametrize("level", [0.1, 0.8])
def test_poisson_noise_variance_grows_with_the_signal(level: float) -> None:
    noisy = physics.poisson_noise(torch.full((1, 128, 128), level), 50.0, seeded(0))
    assert noisy.mean().item() == pytest.approx(level, rel=0.02)
    assert noisy.var().item() == pytest.approx(level / 50, rel=0.05)


@settings(deadline=None, max_examples=20)
@given(length=st.floats(3, 13), angle=st.floats(0, math.pi))
def test_motion_blur_spreads_a_point_along_its_path(length: float, angle: float) -> None:
    point = torch.zeros(1, 33, 33)
    point[0, 16, 16] = 1
    spread = physics.motion_blur(point, length, angle)[0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-4)
    y, x = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(33.0) - 16, indexing="ij")
    across = (-math.sin(angle) * x + math.cos(angle) * y).abs()
    along = (math.cos(angle) * x + math.sin(angle) * y).abs()
    assert spread[across > 1.5].abs().max() < 1e-6
    assert spread[along > length / 2 + 1.5].abs().max() < 1e-6
    variance = (spread * along.square()).sum().item()
    assert variance == pytest.approx(length**2 / 12, rel=0.45, abs=0.3)


def test_gaussian_blur_has_the_width_asked_for() -> None:
    point = torch.zeros(1, 33, 33)
    point[0, 16, 16] = 1
    spread = physics.gaussian_blur(point, 2.0)[0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-4)
    offsets = torch.arange(33.0) - 16
    assert (spread.sum(0) * offsets.square()).sum().item() == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("channels", [3, 1])
def test_jpeg_error_falls_with_quality_and_keeps_the_channel_order(channels: int) -> None:
    image = smooth_image(channels)
    errors = [(physics.jpeg(image, quality) - image).abs().mean().item() for quality in (10, 50, 98)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2 / 255


def test_jpeg_keeps_red_red() -> None:
    red = torch.zeros(3, 16, 16)
    red[0] = 1
    assert (physics.jpeg(red, 80) - red).abs().max() < 0.05


def test_quantise_clips_and_rounds() -> None:
    values = torch.tensor([-0.2, 0.5, 1.7])
    assert torch.allclose(physics.quantise(values), torch.tensor([0.0, 128 / 255, 1.0]))
