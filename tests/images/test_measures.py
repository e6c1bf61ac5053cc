"""Values on the way back from the restored picture, and the regions above an alarm."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from recofuse_core.scenes.scene import make_scene
from recofuse_images import scale
from recofuse_images.measures import MAX_REGIONS, Measured, fitted_scale, outlined, regions_above, restored_values
from recofuse_images.picture import Picture
from recofuse_images.reader import Infrared, read_infrared
from recofuse_images.writer import tiff_bytes
from service.terms.jobs import FusionOptions, Output, Part
from service.work.engine import PassOptions
from tests.fakes import file_of, picture
from tests.service.faces.real import RealEngine

SMOOTH = picture(96, 64, channels=1, seed=4).astype(np.float64)


def measured(counts: np.ndarray, ir_range: scale.Range | None = None) -> tuple[Measured, np.ndarray]:
    given = Picture(counts)
    levels, found = scale.ir_scaled(given, ir_range)
    return Infrared(given).measured(counts.shape[::-1], found), levels


def restored(source: Measured, ir: np.ndarray) -> np.ndarray:
    return restored_values(source, ir, fitted_scale(source, ir)[0])


@pytest.mark.parametrize("tone", [(1.0, 0), (3.1, -230), (0.4, 90)])
def test_whatever_the_model_does_to_the_tone_is_undone(tone: tuple[float, float]) -> None:
    clean = np.rint(8000 + 4 * SMOOTH)
    rng = np.random.default_rng(0)
    noisy = clean + rng.normal(0, 30, clean.shape)
    noisy[rng.random(clean.shape) < 0.05] += 900  # what no line should follow
    source, _ = measured(noisy.astype(np.uint16), (7500.0, 10000.0))
    gain, offset = tone
    shown = np.clip(np.rint(gain * (clean - 7500) / 2500 * 255 + offset), 0, 255).astype(np.uint8)
    inside = (shown > 0) & (shown < 255)
    assert inside.mean() > 0.5
    found = restored(source, shown)
    step = 2500 / 255 / gain
    error = np.abs(found - clean)[inside]
    assert np.median(error) < 0.35 * step + 3
    assert np.median(np.abs(noisy - clean)) > 20


def test_the_model_gives_back_the_counts_of_a_clean_scene() -> None:
    """Also of a dull frame, whose tone it widens: there the inverse of the scale alone is far off."""
    scene, engine = make_scene(2, 192, 256), RealEngine("compact")
    engine.load()
    vis = np.ascontiguousarray((scene.vis.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    clean = 8000 + 1500 * scene.ir[0].numpy().astype(np.float64)
    noisy = np.rint(clean + np.random.default_rng(2).normal(0, 100, clean.shape)).astype(np.uint16)
    options = PassOptions.of(FusionOptions(output=Output.IR), engine.info)
    for ir_range in (None, (5000.0, 14000.0)):
        source, levels = measured(noisy, ir_range)
        ir = engine.fuse(vis[None], levels[None], options, [0])[Part.IR][0]
        found, is_doubtful = fitted_scale(source, ir)
        error = np.median(np.abs(restored_values(source, ir, found) - clean))
        assert error < 25 < 60 < np.median(np.abs(noisy - clean))
        assert not is_doubtful
    low, high = source.scale
    assert np.median(np.abs(low + ir / 255 * (high - low) - clean)) > 300


def test_what_the_scale_cut_off_is_as_it_was_measured() -> None:
    counts = np.rint(8000 + 4 * SMOOTH).astype(np.uint16)
    counts[10:14, 20:24] = 30000
    counts[40, 40] = 10
    source, levels = measured(counts, (8000.0, 9000.0))
    found = restored(source, levels)
    assert (found[10:14, 20:24] == 30000).all()
    assert found[40, 40] == 10
    assert abs(found - counts)[(counts > 8000) & (counts < 9000)].max() < 4


def test_what_the_model_made_white_is_no_colder_than_it_was_measured() -> None:
    counts = np.rint(8000 + 4 * SMOOTH).astype(np.uint16)
    source, levels = measured(counts, (7000.0, 10000.0))
    widened = np.clip(6.0 * (levels.astype(float) - 110), 0, 255).astype(np.uint8)
    assert (widened == 255).any()
    found = restored(source, widened)
    assert (found >= counts - 8)[widened == 255].all()
    assert (found <= counts + 8)[widened == 0].all()
    assert np.abs(found - counts)[(widened > 0) & (widened < 255)].max() < 10


def test_a_flat_frame_has_its_values() -> None:
    source, levels = measured(np.full((64, 96), 812, np.uint16))
    assert (restored(source, levels) == 812).all()


def test_a_picture_that_shows_something_else_is_in_doubt() -> None:
    counts = np.rint(8000 + 4 * SMOOTH).astype(np.uint16)
    source, levels = measured(counts)
    assert not fitted_scale(source, levels)[1]
    for other in (picture(96, 64, channels=1, seed=77), 255 - levels, np.full_like(levels, 9)):
        found, is_doubtful = fitted_scale(source, other)
        assert is_doubtful
        assert np.isfinite(found).all()


def test_what_is_no_measurement_is_nan_and_stays_so() -> None:
    values = (20 + SMOOTH / 10).astype(np.float32)
    values[:, :10] = -9999
    values[5, 50] = np.nan
    source, levels = measured(values)
    found = restored(source, levels)
    assert np.isnan(found[:, :10]).all()
    assert np.isnan(found[5, 50])
    assert np.isfinite(found[6:, 10:]).all()
    assert not source.is_whole


def test_values_of_another_size_lie_on_the_visible_grid_and_between_those_measured() -> None:
    counts = np.rint(8000 + 4 * SMOOTH).astype(np.uint16)
    infrared = read_infrared(tiff_bytes(counts))
    for size in ((192, 128), (48, 32)):
        source = infrared.measured(size, (8000.0, 9000.0))
        assert source.values.shape == size[::-1]
        assert counts.min() <= source.values.min()
        assert source.values.max() <= counts.max()
        expected = cv2.resize(counts.astype(np.float32), size, interpolation=cv2.INTER_AREA)
        assert np.abs(source.values - expected).max() < 60
    assert source.is_whole


def test_regions_are_those_that_are_at_least_so_hot() -> None:
    values = np.full((60, 80), 20.0, np.float32)
    values[10:14, 20:30] = 60.0
    values[14, 30] = 65.5  # a corner touches
    values[40:50, 5:9] = 90.0
    values[0, 0:3] = 99.0  # three pixels
    values[30:33, 60:63] = np.nan
    found = regions_above(values, 60.0)
    assert (found.num_regions, found.area, found.hottest) == (2, 81, 90.0)
    first, second = found.regions
    assert first[:6] == (20, 10, 11, 5, 41, 65.5)
    assert second[:6] == (5, 40, 4, 10, 40, 90.0)
    assert second.centroid == (6.5, 44.5)
    assert first.centroid == (24.63, 11.56)
    np.testing.assert_array_equal(np.argwhere(found.mask), np.argwhere((values >= 60) & (values < 99)))
    cold = regions_above(values, 100.0)
    assert (cold.num_regions, cold.area, cold.hottest, cold.regions) == (0, 0, None, ())


def test_few_of_many_regions_are_told_the_largest_first() -> None:
    values = np.zeros((400, 400), np.float32)
    for index in range(100):
        top, left = divmod(index, 10)
        values[40 * top : 40 * top + 2 + index // 5, 40 * left : 40 * left + 4] = 1
    found = regions_above(values, 0.5)
    areas = [region.area for region in found.regions]
    assert (found.num_regions, len(areas), found.area) == (100, MAX_REGIONS, int(values.sum()))
    assert areas == sorted(areas, reverse=True)
    assert areas[0] == 4 * 21


def test_an_outline_leaves_the_region_and_what_is_far_from_it() -> None:
    shown = picture(96, 64, seed=1)
    mask = np.zeros((64, 96), bool)
    mask[20:30, 40:60] = True
    drawn = outlined(shown, mask)
    np.testing.assert_array_equal(drawn[mask], shown[mask])
    assert (drawn[19, 40:60] == (0, 255, 255)).all()
    assert (drawn[18, 40:60] == 0).all()
    np.testing.assert_array_equal(drawn[:18], shown[:18])
    np.testing.assert_array_equal(outlined(shown, np.zeros_like(mask)), shown)


def test_eight_bits_and_colours_are_whole_levels() -> None:
    infrared = read_infrared(file_of(SMOOTH.astype(np.uint8)))
    source = infrared.measured((96, 64), (0.0, 255.0))
    assert source.is_whole
    assert not source.is_celsius
    np.testing.assert_array_equal(source.values, SMOOTH)
