"""What every degraded image promises, and the drawn recipes against their table."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recofuse_core.degradations import recipes
from recofuse_core.degradations.recipes import Degraded, IrKind, Range, Strength, VisKind, degrade_ir, degrade_vis
from recofuse_core.errors import ConfigError, ShapeError
from tests.core.degradations.pictures import seeded, smooth_image

STRENGTHS: tuple[Strength, ...] = ("light", "medium", "strong")


def degrade(channels: int, image: Tensor, seed: int, strength: Strength = "medium") -> Degraded:
    function = degrade_vis if channels == 3 else degrade_ir
    return function(image, seeded(seed), strength)


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
    extras: set[str] = set(recipes.VIS_EXTRAS if channels == 3 else recipes.IR_EXTRAS)
    num_main = Counter(len(kinds - extras) for kinds in drawn)
    for number, share in ((1, 0.5), (2, 0.35), (3, 0.15)):
        assert num_main[number] / len(drawn) == pytest.approx(share, abs=0.05)
    alone = Counter(str(next(iter(kinds))) for kinds in drawn if len(kinds) == 1)
    table = recipes.VIS_WEIGHTS if channels == 3 else recipes.IR_WEIGHTS
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
