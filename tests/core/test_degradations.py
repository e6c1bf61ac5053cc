"""Each degradation against its own formula, and the drawn recipes against their table."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from recofuse_core import degradations as deg
from recofuse_core.degradations import Degraded, IrKind, Range, Strength, VisKind, degrade_ir, degrade_vis
from recofuse_core.errors import ConfigError, ShapeError

STRENGTHS: tuple[Strength, ...] = ("light", "medium", "strong")


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def smooth_image(channels: int, height: int = 48, width: int = 64) -> Tensor:
    """A structured image in [0.1, 0.9] with distinct channels."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin(x + c) * torch.cos(y * (1 + c)) for c in range(channels)])


def degrade(channels: int, image: Tensor, seed: int, strength: Strength = "medium") -> Degraded:
    function = degrade_vis if channels == 3 else degrade_ir
    return function(image, seeded(seed), strength)


# --- what every degraded image promises -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(16, 40),
    width=st.integers(16, 40),
    channels=st.sampled_from([3, 1]),
    strength=st.sampled_from(STRENGTHS),
)
def test_output_keeps_shape_range_and_8_bit_grid(
    seed: int, height: int, width: int, channels: int, strength: Strength
) -> None:
    clean = torch.rand(channels, height, width, generator=seeded(seed))
    before = clean.clone()
    image = degrade(channels, clean, seed, strength).image
    assert image.shape == clean.shape
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert torch.allclose(image * 255, (image * 255).round(), atol=1e-4)
    assert torch.equal(clean, before)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), channels=st.sampled_from([3, 1]))
def test_result_depends_on_the_generator_alone(seed: int, channels: int) -> None:
    clean = smooth_image(channels)
    torch.manual_seed(1)
    first = degrade(channels, clean, seed)
    torch.manual_seed(2)
    torch.rand(7)
    state = torch.get_rng_state()
    second = degrade(channels, clean, seed)
    assert torch.equal(first.image, second.image)
    assert first.recipe == second.recipe
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("channels", [3, 1])
def test_seeds_differ(channels: int) -> None:
    clean = smooth_image(channels)
    images = [degrade(channels, clean, seed).image for seed in range(6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_clean_probability_one_only_rounds() -> None:
    for function, channels in ((degrade_vis, 3), (degrade_ir, 1)):
        clean = smooth_image(channels)
        result = function(clean, seeded(0), clean_probability=1.0)
        assert result.recipe == ()
        assert (result.image - clean).abs().max() <= 0.5 / 255 + 1e-6


def test_an_empty_choice_of_kinds_is_clean() -> None:
    assert degrade_vis(smooth_image(3), seeded(0), kinds=[]).recipe == ()


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 15, 32), (3, 32), (1, 3, 32, 32)])
def test_vis_rejects_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="expected an image of shape"):
        degrade_vis(torch.zeros(shape), seeded(0))


def test_ir_rejects_colour() -> None:
    with pytest.raises(ShapeError, match=r"\(1, H, W\)"):
        degrade_ir(torch.zeros(3, 32, 32), seeded(0))


def test_unknown_kind_names_what_is_accepted() -> None:
    with pytest.raises(ConfigError, match="low_contrast, stripes"):
        degrade_ir(torch.zeros(1, 32, 32), seeded(0), kinds=["haze"])


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(VisKind))
def test_a_single_vis_kind_changes_the_image(kind: VisKind) -> None:
    clean = smooth_image(3)
    result = degrade_vis(clean, seeded(3), "strong", [kind])
    assert [step.kind for step in result.recipe] == [kind]
    assert (result.image - clean).abs().mean() > (0.3 if kind == "dead_pixels" else 1) / 255


@pytest.mark.parametrize("kind", list(IrKind))
def test_a_single_ir_kind_changes_the_image(kind: IrKind) -> None:
    clean = torch.rand(1, 48, 64, generator=seeded(9))
    result = degrade_ir(clean, seeded(3), "strong", [kind.value])
    assert [step.kind for step in result.recipe] == [kind]
    assert (result.image - clean).abs().mean() > (0.3 if kind == "dead_pixels" else 1) / 255


def test_kinds_are_applied_in_physical_order_whatever_the_order_asked() -> None:
    vis = degrade_vis(smooth_image(3), seeded(0), kinds=["jpeg", "gaussian_noise", "haze", "colour_cast", "blur"])
    assert [str(step.kind) for step in vis.recipe] == ["blur", "haze", "colour_cast", "gaussian_noise", "jpeg"]
    ir = degrade_ir(smooth_image(1), seeded(0), kinds=reversed(list(IrKind)))
    assert [str(step.kind) for step in ir.recipe] == [str(kind) for kind in IrKind]
    assert str(ir.recipe[-1].kind) == "jpeg"


def draw_many(channels: int, strength: Strength, count: int = 1500) -> list[Degraded]:
    generator, clean = seeded(11), torch.full((channels, 16, 16), 0.5)
    function = degrade_vis if channels == 3 else degrade_ir
    return [function(clean, generator, strength) for _ in range(count)]


@pytest.mark.parametrize("channels", [3, 1])
def test_number_and_choice_of_kinds(channels: int) -> None:
    drawn = [{step.kind for step in item.recipe} for item in draw_many(channels, "medium")]
    assert all(1 <= len(kinds) <= 3 for kinds in drawn)
    for rivals in ({VisKind.LOW_LIGHT, VisKind.HAZE}, {VisKind.GAUSSIAN_NOISE, VisKind.POISSON_NOISE}):
        assert channels == 1 or not any(rivals <= kinds for kinds in drawn)
    extras: set[str] = set(deg.VIS_EXTRAS if channels == 3 else deg.IR_EXTRAS)
    num_main = Counter(len(kinds - extras) for kinds in drawn)
    for number, share in ((1, 0.5), (2, 0.35), (3, 0.15)):
        assert num_main[number] / len(drawn) == pytest.approx(share, abs=0.05)
    alone = Counter(str(next(iter(kinds))) for kinds in drawn if len(kinds) == 1)
    table = deg.VIS_WEIGHTS if channels == 3 else deg.IR_WEIGHTS
    weights = {str(kind): weight for kind, weight in table.items()}
    for kind, weight in weights.items():
        assert alone[kind] / alone.total() == pytest.approx(weight / sum(weights.values()), abs=0.07)


@pytest.mark.parametrize("channels", [3, 1])
def test_strong_always_has_two_or_three_kinds(channels: int) -> None:
    assert {len(item.recipe) for item in draw_many(channels, "strong", 300)} == {2, 3}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), mild=st.floats(0.01, 10), harsh=st.floats(0.01, 10), log=st.booleans())
def test_light_and_strong_split_the_range(seed: int, mild: float, harsh: float, log: bool) -> None:
    interval = Range(mild, harsh, log)
    middle = math.sqrt(mild * harsh) if log else (mild + harsh) / 2
    for strength, ends in (("light", (mild, middle)), ("medium", (mild, harsh)), ("strong", (middle, harsh))):
        value = interval.draw(seeded(seed), strength)  # type: ignore[arg-type]  # the literals are in the tuple
        assert min(ends) - 1e-9 <= value <= max(ends) + 1e-9


def test_recipe_parameters_lie_in_the_documented_ranges() -> None:
    bounds = {
        ("low_light", "gain"): (0.35, 0.9),
        ("low_light", "gamma"): (1.2, 2.6),
        ("haze", "airlight"): (0.7, 1.0),
        ("haze", "density"): (0.5, 1.6),
        ("haze", "transmission"): (0.3, 0.7),
        ("gaussian_noise", "sigma"): (4 / 255, 30 / 255),
        ("poisson_noise", "peak"): (20, 300),
        ("blur", "sigma"): (0.6, 2.2),
        ("blur", "length"): (3, 13),
        ("jpeg", "quality"): (25, 90),
        ("colour_cast", "red"): (0.8, 1.2),
        ("low_contrast", "slope"): (0.25, 0.75),
        ("low_contrast", "offset"): (0.0, 0.75),
        ("stripes", "std"): (1.5 / 255, 12 / 255),
    }
    seen: set[tuple[str, str]] = set()
    for item in draw_many(3, "medium", 400) + draw_many(1, "medium", 200):
        for step in item.recipe:
            assert step.kind.value in str(step)
            for name, value in step.parameters:
                if (key := (step.kind.value, name)) in bounds:
                    seen.add(key)
                    low, high = bounds[key]
                    assert low - 1e-9 <= float(value) <= high + 1e-9, step
    assert seen == set(bounds)


def test_recipe_parameters_reproduce_the_image() -> None:
    clean = smooth_image(1)
    result = degrade_ir(clean, seeded(5), kinds=["low_contrast"])
    values = {name: float(value) for name, value in result.recipe[0].parameters}
    expected = (clean.numpy() * values["slope"] + values["offset"]).clip(0, 1)
    assert np.abs(result.image.numpy() - expected).max() <= 0.5 / 255 + 1e-6


# --- the physical models, against independent writings ----------------------------------------------------------------


def test_low_light_formula() -> None:
    image = smooth_image(3)
    assert np.allclose(deg.low_light(image, 0.5, 2.0).numpy(), (0.5 * image.numpy()) ** 2, atol=1e-6)


def test_haze_goes_from_the_image_to_the_airlight() -> None:
    image, airlight = smooth_image(3), torch.tensor([0.8, 0.9, 1.0]).view(3, 1, 1)
    assert torch.equal(deg.haze(image, airlight, 1.0), image)
    assert torch.allclose(deg.haze(image, airlight, 0.0), airlight.expand_as(image))
    assert torch.allclose(deg.haze(image, 0.9, 0.25), 0.25 * image + 0.675, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), height=st.integers(16, 90), width=st.integers(16, 90), clutter=st.floats(0, 1))
def test_depth_surrogate_is_bounded_and_smooth(seed: int, height: int, width: int, clutter: float) -> None:
    depth = deg.depth_surrogate(height, width, clutter, seeded(seed))
    assert depth.shape == (1, height, width)
    assert 0.4 - 1e-5 <= depth.min() <= depth.max() <= 1 + 1e-5
    steepest = 0.6 * 12 / min(height, width)  # a 5x5 grid changes by at most its range within a fifth of the side
    assert depth.diff(dim=1).abs().max() < steepest
    assert depth.diff(dim=2).abs().max() < steepest


def test_depth_surrogate_without_clutter_is_far_at_the_top() -> None:
    depth = deg.depth_surrogate(32, 20, 0.0, seeded(0))
    assert depth[0, 0].allclose(torch.tensor(1.0))
    assert depth[0, -1].allclose(torch.tensor(0.4))


def test_precipitation_goes_from_the_image_to_its_brightness() -> None:
    image, cover = smooth_image(3), torch.zeros(1, 48, 64)
    cover[:, 10:20] = 1
    covered = deg.precipitation(image, cover, 0.9)
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
    rain = deg.rain_cover(96, 96, density, length, angle, opacity, seeded(seed))
    snow = deg.snow_cover(96, 96, density, opacity, seeded(seed))
    for cover, more in (
        (rain, deg.rain_cover(96, 96, 4 * density, length, angle, opacity, seeded(seed))),
        (snow, deg.snow_cover(96, 96, 4 * density, opacity, seeded(seed))),
    ):
        assert cover.shape == (1, 96, 96)
        assert 0 <= float(cover.min()) <= float(cover.max()) <= opacity + 1e-6
        assert more.mean() > cover.mean()


def test_rain_falls_along_its_angle() -> None:
    cover = deg.rain_cover(128, 128, 0.002, 25, math.pi / 2, 0.6, seeded(1))
    along, across = cover.diff(dim=1).abs().mean(), cover.diff(dim=2).abs().mean()
    assert across > 3 * along


def test_fixed_pattern_is_a_gain_and_an_offset_a_pixel() -> None:
    image = smooth_image(1)
    offsets, gains = torch.full_like(image, 0.1), torch.full_like(image, -0.5)
    assert torch.allclose(deg.fixed_pattern(image, offsets, gains), image * 0.5 + 0.1)


@pytest.mark.parametrize("channels", [3, 1])
def test_dead_pixels_are_black_or_white_and_as_many_as_told(channels: int) -> None:
    clean = torch.full((channels, 200, 200), 0.5)
    function = degrade_vis if channels == 3 else degrade_ir
    result = function(clean, seeded(4), kinds=["dead_pixels"])
    share = dict(result.recipe[0].parameters)["share"]
    is_changed = ((result.image - clean).abs() > 0.01).any(dim=0)
    assert float(is_changed.float().mean()) == pytest.approx(float(share), rel=0.4)
    assert set(result.image[:, is_changed].flatten().tolist()) == {0.0, 1.0}


def test_named_kinds_alone_bring_what_has_no_weight() -> None:
    unweighted = {"rain", "snow", "fog", "downpour", "snowfall", "dead_pixels", "fixed_pattern"}
    for channels in (3, 1):
        kinds = {str(step.kind) for item in draw_many(channels, "strong", 300) for step in item.recipe}
        assert not kinds & unweighted


def test_colour_cast_scales_channels() -> None:
    image = smooth_image(3)
    cast = deg.colour_cast(image, torch.tensor([1.2, 1.0, 0.8]))
    assert torch.allclose(cast, torch.stack([image[0] * 1.2, image[1], image[2] * 0.8]))


@pytest.mark.parametrize(("smoothing", "max_run"), [(0.0, 1), (2.5, 1), (0.0, 6)])
def test_stripe_profile_has_the_std_asked_for(smoothing: float, max_run: int) -> None:
    profile = deg.stripe_profile(20_000, 0.03, seeded(1), smoothing=smoothing, max_run=max_run)
    assert profile.shape == (20_000,)
    assert profile.std().item() == pytest.approx(0.03, rel=0.06)
    centred = profile - profile.mean()
    neighbours = ((centred[1:] * centred[:-1]).mean() / centred.var()).item()
    assert (neighbours > 0.5) == (smoothing > 0 or max_run > 1)


def test_stripes_are_constant_along_their_lines() -> None:
    image = smooth_image(1, 20, 30)
    offsets, gains = torch.randn(30, generator=seeded(0)), torch.randn(30, generator=seeded(1)) * 0.1
    expected = image.numpy()[0] * (1 + gains.numpy()[None, :]) + offsets.numpy()[None, :]
    assert np.allclose(deg.stripes(image, offsets, gains)[0].numpy(), expected, atol=1e-6)
    rows = deg.stripes(image, offsets[:20], axis="rows") - image
    assert torch.allclose(rows[0], offsets[:20, None].expand(20, 30), atol=1e-6)
    with pytest.raises(ShapeError, match="for rows"):
        deg.stripes(image, offsets, axis="rows")


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_gaussian_noise_std_and_correlation(correlation: float) -> None:
    noise = deg.gaussian_noise(torch.full((3, 128, 128), 0.5), 0.1, seeded(0), correlation) - 0.5
    assert noise.mean().item() == pytest.approx(0, abs=2e-3)
    measured = torch.corrcoef(noise.reshape(3, -1))
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    assert measured[0, 1].item() == pytest.approx(correlation, abs=0.03)


@pytest.mark.parametrize("level", [0.1, 0.8])
def test_poisson_noise_variance_grows_with_the_signal(level: float) -> None:
    noisy = deg.poisson_noise(torch.full((1, 128, 128), level), 50.0, seeded(0))
    assert noisy.mean().item() == pytest.approx(level, rel=0.02)
    assert noisy.var().item() == pytest.approx(level / 50, rel=0.05)


@settings(deadline=None, max_examples=20)
@given(length=st.floats(3, 13), angle=st.floats(0, math.pi))
def test_motion_blur_spreads_a_point_along_its_path(length: float, angle: float) -> None:
    point = torch.zeros(1, 33, 33)
    point[0, 16, 16] = 1
    spread = deg.motion_blur(point, length, angle)[0]
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
    spread = deg.gaussian_blur(point, 2.0)[0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-4)
    offsets = torch.arange(33.0) - 16
    assert (spread.sum(0) * offsets.square()).sum().item() == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("channels", [3, 1])
def test_jpeg_error_falls_with_quality_and_keeps_the_channel_order(channels: int) -> None:
    image = smooth_image(channels)
    errors = [(deg.jpeg(image, quality) - image).abs().mean().item() for quality in (10, 50, 98)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2 / 255


def test_jpeg_keeps_red_red() -> None:
    red = torch.zeros(3, 16, 16)
    red[0] = 1
    assert (deg.jpeg(red, 80) - red).abs().max() < 0.05


def test_quantise_clips_and_rounds() -> None:
    values = torch.tensor([-0.2, 0.5, 1.7])
    assert torch.allclose(deg.quantise(values), torch.tensor([0.0, 128 / 255, 1.0]))
