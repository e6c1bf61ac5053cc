"""Fog, rain and snow: what each cover promises, and that all of it comes from the generator."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from recofuse_core.degradations.recipes import degrade_vis
from recofuse_core.degradations.weather import downpour_cover, scene_depth, snowfall_cover


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def grey(height: int = 96, width: int = 128, level: float = 0.4) -> Tensor:
    return torch.full((3, height, width), level)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), height=st.integers(16, 120), width=st.integers(16, 120))
def test_depth_is_bounded(seed: int, height: int, width: int) -> None:
    image = torch.rand(3, height, width, generator=seeded(seed))
    depth = scene_depth(image, seeded(seed))
    assert depth.shape == (1, height, width)
    assert 0 <= float(depth.min()) <= float(depth.max()) <= 1


def test_depth_grows_from_the_feet_to_the_horizon() -> None:
    depth = torch.cat([scene_depth(grey(), seeded(seed)) for seed in range(20)])
    feet, middle, top = (depth[:, rows].mean(dim=(1, 2)) for rows in (slice(-6, None), slice(48, 60), slice(6)))
    assert (feet < 0.3).all()
    assert (middle > feet).all()
    assert top.mean() > middle.mean()


def test_depth_takes_its_edges_from_the_image() -> None:
    image = grey(128, 128)
    image[:, :, 64:] = 0.8
    seeds = range(8)
    with_edge = sum(float(scene_depth(image, seeded(seed))[0, :, 62:66].diff(dim=1).abs().mean()) for seed in seeds)
    without = sum(
        float(scene_depth(grey(128, 128), seeded(seed))[0, :, 62:66].diff(dim=1).abs().mean()) for seed in seeds
    )
    assert with_edge > 2 * without


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), intensity=st.floats(0.4, 1.5), size=st.floats(0.7, 1.4), fall=st.floats(0, 2))
def test_covers_are_bounded_and_grow_with_their_intensity(
    seed: int, intensity: float, size: float, fall: float
) -> None:
    for cover, more in (
        (
            downpour_cover(96, 96, intensity, size, 1.5, seeded(seed)),
            downpour_cover(96, 96, 4 * intensity, size, 1.5, seeded(seed)),
        ),
        (
            snowfall_cover(96, 96, intensity, size, fall, 1.5, seeded(seed)),
            snowfall_cover(96, 96, 4 * intensity, size, fall, 1.5, seeded(seed)),
        ),
    ):
        assert cover.shape == (1, 96, 96)
        assert 0 <= float(cover.min()) <= float(cover.max()) <= 1
        assert more.mean() > cover.mean() > 0


@pytest.mark.parametrize("angle", [math.pi / 2 - 0.3, math.pi / 2 + 0.3])
def test_streaks_fall_along_their_angle(angle: float) -> None:
    cover = downpour_cover(192, 192, 1.0, 1.0, angle, seeded(2))[0]
    shift = 12  # rows down; a streak's column moves with it
    along = round(shift / math.tan(angle))
    a = cover[: 192 - shift, 24:168]

    def agreement(columns: int) -> float:
        b = cover[shift:, 24 + columns : 168 + columns]
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    assert agreement(along) > agreement(-along) + 0.1


def test_flakes_are_of_many_sizes() -> None:
    cover = snowfall_cover(256, 256, 1.0, 1.0, 0.0, 1.5, seeded(0))[None]
    coarse = [float((cover - torch.nn.functional.avg_pool2d(cover, side, 1, side // 2)).std()) for side in (3, 9, 27)]
    assert coarse[0] > 0.02
    assert coarse[1] > coarse[0] * 1.2
    assert coarse[2] > coarse[1] * 1.05


@pytest.mark.parametrize("kind", ["fog", "downpour", "snowfall"])
def test_weather_is_the_generators_and_grows_with_strength(kind: str) -> None:
    clean = grey(64, 96, 0.3) + 0.2 * torch.rand(3, 64, 96, generator=seeded(0))
    first, second = (degrade_vis(clean, seeded(5), kinds=[kind]) for _ in range(2))
    assert torch.equal(first.image, second.image)
    assert not torch.equal(first.image, degrade_vis(clean, seeded(6), kinds=[kind]).image)
    light, strong = (
        sum(float((degrade_vis(clean, seeded(s), strength, kinds=[kind]).image - clean).abs().mean()) for s in range(8))
        for strength in ("light", "strong")
    )
    assert strong > 1.15 * light


@pytest.mark.parametrize("kind", ["fog", "downpour", "snowfall"])
def test_weather_shines_less_at_night(kind: str) -> None:
    by_day, by_night = grey(level=0.3), grey(level=0.1)
    tones = []
    for image in (by_day, by_night):
        steps = [degrade_vis(image, seeded(seed), kinds=[kind]).recipe[0] for seed in range(12)]
        name = "airlight" if kind == "fog" else "brightness"
        tones.append(sum(float(dict(step.parameters)[name]) for step in steps) / len(steps))
    assert tones[1] < 0.9 * tones[0]


def test_fog_leaves_the_feet_and_hides_the_distance() -> None:
    clean = grey(120, 160, 0.3)
    kept = torch.stack([degrade_vis(clean, seeded(s), "strong", kinds=["fog"]).image for s in range(8)]).mean((0, 1))
    assert (kept[-6:] - 0.3).mean() < 0.25
    assert (kept[:30] - 0.3).mean() > 0.35
