"""The procedural streets: registered, textured, reproducible, and what each modality must show."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recofuse_core.errors import ShapeError
from recofuse_core.scenes.scene import make_scene, moving_scene, two_views


def gradient(image: Tensor) -> Tensor:
    """Gradient magnitude of a single plane, (H - 1, W - 1)."""
    return image.diff(dim=0)[:, :-1].abs() + image.diff(dim=1)[:-1].abs()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), height=st.integers(32, 150), width=st.integers(32, 150))
def test_any_size_gives_a_pair_in_range(seed: int, height: int, width: int) -> None:
    scene = make_scene(seed, height, width)
    assert scene.vis.shape == (3, height, width)
    assert scene.ir.shape == (1, height, width)
    for image in (scene.vis, scene.ir):
        assert image.dtype == torch.float32
        assert image.isfinite().all()
        assert image.min() >= 0
        assert image.max() <= 1
        assert image.std() > 0.03


def test_the_default_size_is_a_camera_frame() -> None:
    assert make_scene(4).vis.shape == (3, 480, 640)


def test_the_seed_alone_decides() -> None:
    first = make_scene(7, 96, 128)
    torch.manual_seed(5)
    torch.rand(3)
    state = torch.get_rng_state()
    second = make_scene(7, 96, 128)
    other = make_scene(8, 96, 128)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.vis, second.vis)
    assert torch.equal(first.ir, second.ir)
    assert (first.vis - other.vis).abs().mean() > 0.03
    assert (first.ir - other.ir).abs().mean() > 0.02


@pytest.mark.parametrize("size", [(31, 64), (64, 16), (0, 0)])
def test_tiny_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match="at least 32"):
        make_scene(0, *size)


@pytest.mark.parametrize("seed", range(4))
def test_the_modalities_are_registered(seed: int) -> None:
    scene = make_scene(seed, 240, 320)
    vis_edges, ir_edges = gradient(scene.vis.mean(0)), gradient(scene.ir[0])
    aligned = correlation(vis_edges, ir_edges)
    for shift in ((5, 0), (0, 5), (-5, 0), (0, -5)):
        assert aligned > 1.15 * correlation(vis_edges, ir_edges.roll(shift, (0, 1)))


@pytest.mark.parametrize("seed", range(4))
def test_the_modalities_disagree_as_real_ones_do(seed: int) -> None:
    scene = make_scene(seed, 240, 320)
    luma = scene.vis.mean(0)
    assert correlation(luma, scene.ir[0]) < 0.8
    assert 0.15 < luma.mean() < 0.6
    assert luma.max() > 0.95  # lamps and headlights
    hot = scene.ir[0] > 0.75  # people, exhausts, lamps: a small part of the frame
    assert 1e-4 < hot.float().mean() < 0.08
    assert luma[hot].min() < 0.35  # something hot is dark to the eye
    assert scene.ir[0].quantile(0.02) < 0.15  # the clear sky is cold
    saturation = scene.vis.amax(0) - scene.vis.amin(0)
    assert saturation.quantile(0.95) > 0.1


def test_surfaces_have_fine_texture() -> None:
    scene = make_scene(1, 240, 320)
    for plane in (scene.vis.mean(0), scene.ir[0]):
        flat = gradient(plane) < 0.2 / 255
        assert flat.float().mean() < 0.2


def test_the_same_street_at_another_size() -> None:
    large, small = make_scene(3, 240, 320), make_scene(3, 120, 160)
    for a, b in ((large.vis, small.vis), (large.ir, small.ir)):
        shrunk = torch.nn.functional.interpolate(a[None], size=(120, 160), mode="area")[0]
        assert correlation(shrunk, b) > 0.9


def test_motion_is_smooth_and_starts_at_the_still_scene() -> None:
    still = make_scene(2, 120, 160)
    frames = list(moving_scene(2, 6, 120, 160))
    assert len(frames) == 6
    assert torch.equal(frames[0].vis, still.vis)
    assert torch.equal(frames[0].ir, still.ir)
    for before, after in pairwise(frames):
        change = (after.ir - before.ir).abs()
        assert 0 < change.mean() < 0.02
        assert (change == 0).float().mean() > 0.5  # the camera stands still
        assert 0 < (after.vis - before.vis).abs().mean() < 0.02
    drift = [(frame.ir - frames[0].ir).abs().mean().item() for frame in frames]
    assert drift[5] > drift[1]


def test_cars_pass_the_camera_without_a_jump() -> None:
    """In five seconds the first oncoming cars cross the camera's plane, where their polygons are clipped."""
    frames = moving_scene(5, 125, 48, 64)
    means = np.array([frame.vis.mean().item() for frame in frames])
    assert np.isfinite(means).all()
    assert np.abs(np.diff(means)).max() < 0.06


def test_two_views_from_one_place_are_the_scene_and_from_two_all_but_the_sky_lies_off() -> None:
    scene = make_scene(3, 96, 128)
    same = two_views(3, across_m=0, up_m=0, height=96, width=128)
    assert torch.equal(same.vis, scene.vis)
    assert torch.equal(same.ir, scene.ir)
    beside = two_views(3, across_m=0.2, up_m=0, height=96, width=128)
    assert torch.equal(beside.vis, scene.vis)
    changed = (beside.ir - same.ir).abs()[0]
    is_sky = same.depth_m >= 200
    assert float(changed[~is_sky].mean()) > 5 * float(changed[is_sky].mean())
