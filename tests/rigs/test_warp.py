"""Warping: exact where it can be, at the file's own depth, and no seam where infrared ends."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from recofuse_images.errors import BadImageError
from recofuse_images.picture import Picture
from recofuse_images.scale import ir_levels
from recofuse_images.writer import png_bytes
from recofuse_rigs import warp as warp_module
from recofuse_rigs.camera import seen_by
from recofuse_rigs.errors import BadRigError
from recofuse_rigs.pairs import read_aligned, warped_picture
from recofuse_rigs.rig import Distortion, Rig
from recofuse_rigs.warp import FADE, FEATHER, Warps, warp_of
from service.terms.jobs import PixelFormat, RawLayout

SIZE = (64, 48)


def shifted(x: float, y: float, **values: Any) -> Rig:
    return Rig(SIZE, SIZE, (1.0, 0.0, x, 0.0, 1.0, y, 0.0, 0.0, 1.0), **values)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
def test_whole_pixels_move_unchanged_at_any_depth(kind: type) -> None:
    values = np.random.default_rng(1).integers(0, 250, (48, 64)).astype(kind) * kind(100 if kind is not np.uint8 else 1)
    assert np.array_equal(warp_of(shifted(0, 0)).apply(values), values)
    warp = warp_of(shifted(10, -5))
    warped = warp.apply(values)
    assert warped.dtype == kind
    assert np.array_equal(warped[:43, 10:], values[5:, :54])
    assert warp.coverage[:43, 10:].all()
    assert warp.coverage.sum() == 43 * 54


def test_between_two_values_lies_no_third() -> None:
    values = np.where(np.arange(64) < 32, 7000, 9500).astype(np.uint16)[None].repeat(48, axis=0)
    warped = warp_of(shifted(0.5, 0)).apply(values)
    assert set(np.unique(warped)) == {7000, 8250, 9500}
    assert warp_of(shifted(0.3, 0.4)).apply(values).max() == 9500


def test_finer_infrared_is_averaged() -> None:
    values = np.random.default_rng(2).integers(0, 60000, (192, 256)).astype(np.uint16)
    rig = Rig(SIZE, (256, 192), (0.25, 0.0, -0.375, 0.0, 0.25, -0.375, 0.0, 0.0, 1.0))
    means = values.reshape(48, 4, 64, 4).mean(axis=(1, 3))
    assert np.abs(warp_of(rig).apply(values) - means).max() < 1


def test_a_lens_is_undone() -> None:
    lens = Distortion((60.0, 60.0), (31.5, 23.5), (-0.2, 0.0, 0.0, 0.0, 0.0))
    warp = warp_of(shifted(0, 0, distortion=lens))
    expected = lens.apply(np.array([[5.0, 40.0]]))[0]
    assert warp.maps is not None
    assert np.allclose(warp.maps[:, 40, 5], expected, atol=1e-4)


@pytest.mark.parametrize(
    "rig",
    [
        Rig((320, 240), (320, 240), (0.9, 0.05, 20.0, -0.05, 0.9, 10.0, 1e-5, 0.0, 1.0)),
        Rig((320, 240), (100, 80), (2.8, 0.1, 12.0, 0.0, 2.7, 14.0, 0.0, 0.0, 1.0)),
        Rig(
            (320, 240),
            (320, 240),
            (0.8, 0.0, 30.0, 0.0, 0.8, 25.0, 0.0, 0.0, 1.0),
            distortion=Distortion((300.0, 300.0), (160.0, 120.0), (-0.2, 0.02, 0.001, 0.0, 0.0)),
        ),
    ],
    ids=["fine", "coarse", "bent"],
)
def test_what_a_rigs_camera_sees_is_laid_where_it_was(rig: Rig) -> None:
    columns, rows = np.meshgrid(np.arange(320), np.arange(240))
    scene = (30000 + 9000 * np.sin(columns / 15) + 9000 * np.cos(rows / 12)).astype(np.uint16)
    seen = seen_by(rig, scene)
    assert seen.shape == rig.ir_size[::-1]
    assert seen.dtype == np.uint16
    warp = warp_of(rig)
    inside = cv2.erode(warp.coverage.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    assert inside.mean() > 0.4
    off = np.abs(warp.apply(seen).astype(float) - scene)[inside]
    assert off.max() < 600  # a pixel aside is 600 and more: 9000 / 15
    with pytest.raises(BadRigError, match="240x320"):
        seen_by(rig, scene.T)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(BadRigError, match="32x48"):
        warp_of(shifted(0, 0)).apply(np.zeros((48, 32), np.uint8))


def test_no_measurement_stays_none() -> None:
    values = np.full((48, 64), 500, np.uint16)
    values[20, 20] = 0
    warped = warped_picture(Picture(values, nodata=0.0), warp_of(shifted(0.5, 0))).values
    assert np.isnan(warped[20, 20:22]).all()
    assert set(np.unique(warped[~np.isnan(warped)])) == {500}


def test_the_fused_picture_counts_where_infrared_does_and_the_visible_one_far_from_it() -> None:
    rng = np.random.default_rng(4)
    fused, vis = rng.integers(0, 256, (2, 480, 640, 3)).astype(np.uint8)
    warp = warp_of(Rig((640, 480), (640, 480), (1.0, 0.0, 300.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)))
    blended = warp.blended(fused, vis)
    assert np.array_equal(blended[:, 300 + 26 :], fused[:, 300 + 26 :])
    assert np.array_equal(blended[:, : 300 - 146], vis[:, : 300 - 146])
    whole = warp_of(shifted(0, 0))
    assert whole.is_whole
    assert whole.blended(fused, vis) is fused


def steps_across(picture: NDArray[np.uint8], column: int) -> float:
    """Mean size of the steps of the columns' means around a column: what the eye takes for a line."""
    profile = picture[..., 1].astype(float).mean(axis=0)
    return float(np.abs(np.diff(profile))[column - 4 : column + 4].mean())


@pytest.mark.parametrize("tone", [-40, 15, 60])
def test_the_border_of_the_overlap_shows_no_seam(tone: int) -> None:
    """Along the border the picture changes as little as inside, but for a fade that is too slow to be seen."""
    rng = np.random.default_rng(5)
    texture = cv2.GaussianBlur(rng.normal(0, 60, (480, 640, 3)).astype(np.float32), (0, 0), 4)
    scene = 110 + 20 * np.sin(np.arange(640) / 60)[None, :, None] + texture
    vis = np.clip(scene, 0, 255).astype(np.uint8)
    fused = np.clip(scene + tone + 0.5 * texture, 0, 255).astype(np.uint8)
    border = 250
    warp = warp_of(Rig((640, 480), (640, 480), (1.0, 0.0, float(border), 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)))
    inside = max(steps_across(fused, column) for column in range(300, 600, 10))
    fused[:, :border] = 255 - fused[:, :border]  # what the model makes up where it saw no infrared
    blended = warp.blended(fused, vis)
    most = inside + 1.6 * abs(tone) / (FADE * 480)
    assert max(steps_across(blended, column) for column in range(100, 300, 4)) <= most
    share = np.clip((np.arange(640) - border) / (FEATHER * 480), 0, 1)[None, :, None]
    narrow = (fused * share + vis * (1 - share)).astype(np.uint8)  # one feather for detail and tone
    assert (max(steps_across(narrow, column) for column in range(100, 300, 4)) > most) == (abs(tone) > 20)


def test_warps_are_kept_while_there_is_room() -> None:
    one, other = shifted(3, 0), shifted(0, 3)
    size = warp_of(one).size_bytes
    warps = Warps(max_bytes=size)
    first = warps.of(one)
    assert warps.of(shifted(3, 0)) is first
    warps.of(other)
    assert warps.of(one) is not first
    assert Warps(max_bytes=size - 1).of(one).rig == one
    both = Warps(max_bytes=2 * size)
    first = both.of(one)
    both.of(other)
    assert both.of(one) is first


def test_maps_made_in_bands_have_no_seam_of_their_own() -> None:
    rig = Rig((4096, 150), (4096, 150), (1.0, 0.0, 0.25, 0.0, 1.0, 0.5, 0.0, 0.0, 1.0))
    warp = warp_of(rig)
    assert warp.maps is not None
    np.testing.assert_allclose(warp.maps[1, 1:], np.arange(1, 150)[:, None].repeat(4096, 1) - 0.5)
    np.testing.assert_allclose(warp.maps[0, :, 1:], np.arange(1, 4096)[None].repeat(150, 0) - 0.25)


def test_a_large_frame_keeps_little_and_is_warped_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    rig = Rig((640, 480), (320, 256), (1.7, 0.1, 30.0, -0.1, 1.6, 20.0, 1e-5, 0.0, 1.0))
    infrared = rng.integers(0, 60000, (256, 320)).astype(np.uint16)
    fused, vis = rng.integers(0, 256, (2, 480, 640, 3)).astype(np.uint8)
    kept = warp_of(rig)
    monkeypatch.setattr(warp_module, "MAX_KEPT_PIXELS", 640 * 480 - 1)
    made = warp_of(rig)
    assert made.maps is None
    assert made.size_bytes == 640 * 480
    assert not kept.is_whole
    np.testing.assert_array_equal(made.apply(infrared), kept.apply(infrared))
    np.testing.assert_array_equal(made.blended(fused, vis), kept.blended(fused, vis))
    assert "_kept_weights" not in vars(made)


def test_what_no_camera_saw_does_not_set_the_scale() -> None:
    """One hot column at the edge of infrared goes on over a third of the frame, and counts as the one that it is."""
    rng = np.random.default_rng(6)
    vis = png_bytes(rng.integers(0, 255, (48, 640, 3)).astype(np.uint8))
    counts = rng.integers(7000, 7200, (48, 640)).astype(np.uint16)
    counts[:, 0] = 9000
    size = (640, 48)
    rig = Rig(size, size, (1.0, 0.0, 200.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    moved = read_aligned(vis, png_bytes(counts), rig).pair.ir
    assert (moved[:, :201] == 255).all()
    np.testing.assert_allclose(moved[:, 200:], ir_levels(Picture(counts[:, :440])).astype(int), atol=3)
    assert moved[:, 201:].std() > 50  # and not a tenth of it, as from 7000 to 9000


def test_an_unsure_rig_is_told() -> None:
    vis, ir = (png_bytes(np.full((48, 64), level, np.uint8)) for level in (50, 90))
    assert read_aligned(vis, ir, shifted(1, 0)).pair.warnings == ()
    (warning,) = read_aligned(vis, ir, shifted(1, 0, is_sure=False)).pair.warnings
    assert "unsure" in warning


def test_raw_frames_are_aligned_like_files() -> None:
    rng = np.random.default_rng(7)
    vis, counts = rng.integers(0, 255, (48, 64, 3)).astype(np.uint8), rng.integers(7000, 9000, (36, 40)).astype("<u2")
    rig = Rig(SIZE, (40, 36), (1.2, 0.1, 5.0, 0.0, 1.3, -4.0, 0.0, 0.0, 1.0))
    files = read_aligned(png_bytes(vis), png_bytes(counts.astype(np.uint16)), rig).pair
    frames = read_aligned(
        vis.tobytes(),
        counts.tobytes(),
        rig,
        vis_layout=RawLayout(pixel_format=PixelFormat.RGB8, width=64, height=48, stride=192),
        ir_layout=RawLayout(pixel_format=PixelFormat.MONO16, width=40, height=36, stride=80),
    ).pair
    np.testing.assert_array_equal(frames.vis, files.vis)
    np.testing.assert_array_equal(frames.ir, files.ir)


def test_one_file_as_both_sides_needs_no_rig() -> None:
    both = png_bytes(np.full((48, 64), 90, np.uint8))
    with pytest.raises(BadImageError, match="needs no rig"):
        read_aligned(both, both, shifted(1, 0))


def test_files_are_aligned_at_their_depth_before_they_are_scaled() -> None:
    rng = np.random.default_rng(3)
    vis = png_bytes(rng.integers(0, 255, (48, 64, 3)).astype(np.uint8))
    counts = rng.integers(7000, 9000, (48, 64)).astype(np.uint16)
    aligned = read_aligned(vis, png_bytes(counts), shifted(10, 0))
    assert np.array_equal(aligned.infrared.picture.values[:, 10:], counts[:, :54])
    assert aligned.pair.ir.shape == aligned.pair.vis.shape[:2]
    assert aligned.pair.ir.max() == 255
    other_size = read_aligned(vis, png_bytes(rng.integers(7000, 9000, (96, 128)).astype(np.uint16)), shifted(0, 0))
    assert other_size.pair.ir.shape == (48, 64)
