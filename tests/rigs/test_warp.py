"""Warping: exact where it can be, at the file's own depth, and no seam where infrared ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recofuse_images.picture import Picture
from recofuse_images.writer import png_bytes
from recofuse_rigs.errors import BadRigError
from recofuse_rigs.pairs import read_aligned, warped_picture
from recofuse_rigs.rig import Distortion, Rig
from recofuse_rigs.warp import warp_of

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
    assert np.allclose((warp.columns[40, 5], warp.rows[40, 5]), expected, atol=1e-4)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(BadRigError, match="32x48"):
        warp_of(shifted(0, 0)).apply(np.zeros((48, 32), np.uint8))


def test_no_measurement_stays_none() -> None:
    values = np.full((48, 64), 500, np.uint16)
    values[20, 20] = 0
    warped = warped_picture(Picture(values, nodata=0.0), warp_of(shifted(0.5, 0))).values
    assert np.isnan(warped[20, 20:22]).all()
    assert set(np.unique(warped[~np.isnan(warped)])) == {500}


def test_the_border_of_the_overlap_shows_no_seam() -> None:
    warp = warp_of(shifted(20, 0))
    fused, vis = np.full((48, 64, 3), 200, np.uint8), np.full((48, 64, 3), 60, np.uint8)
    blended = warp.blended(fused, vis)[24, :, 0].astype(int)
    assert (blended[:21] == 60).all()
    assert (blended[30:] == 200).all()
    assert np.abs(np.diff(blended)).max() <= 60  # of 140, at four pixels of feather in this small picture
    large = warp_of(Rig((640, 480), (640, 480), (1.0, 0.0, 200.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)))
    steps = np.diff(large.weights[240])
    assert 0 < steps.max() < 0.05
    assert steps.min() >= 0
    whole = warp_of(shifted(0, 0))
    assert whole.blended(fused, vis) is fused


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
