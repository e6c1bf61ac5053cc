"""Overlays: nothing below their range, the palette alone above it, rising in between, in the values of the source."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from recofuse_images import scale
from recofuse_images.colours import OVERLAYS, Overlay, greyed, overlaid
from recofuse_images.palettes import palette_colours
from recofuse_images.picture import Picture, grey_of
from service.terms import jobs
from tests.fakes import picture

VIS = picture(64, 64, seed=3)
LUMA = grey_of(VIS).astype(float)
LEVELS = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 64, axis=0)  # cold on the left, hot on the right
COUNTS = 7000.0, 9550.0  # ten counts a level


def values_of(levels: np.ndarray) -> np.ndarray:
    return COUNTS[0] + levels / 255 * (COUNTS[1] - COUNTS[0])


def palette(overlay: str) -> np.ndarray:
    names = {"iron": "iron", "rainbow": "rainbow (camera)"}
    if overlay in names:
        return palette_colours(names[overlay])
    return np.repeat(np.arange(256)[:, None], 3, axis=1)


def test_the_service_names_the_same_overlays() -> None:
    assert jobs.OVERLAYS == OVERLAYS
    assert set(get_args(jobs.Colour)) == {"natural", "grey", *OVERLAYS}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_rises_with_the_value_between_the_ends_of_its_range(overlay: Overlay) -> None:
    low, high = 8003.0, 9007.0
    shown = overlaid(VIS, LEVELS, overlay, COUNTS, (low, high))
    values = values_of(LEVELS)
    below, above = values <= low, values >= high
    assert below.any()
    assert above.any()
    np.testing.assert_array_equal(shown[below], np.repeat(LUMA[below][:, None], 3, axis=1))
    assert (shown[above] == palette(overlay)[255]).all()
    heat = np.clip((values - low) / (high - low), 0, 1)[..., None]
    colours = palette(overlay)[np.rint(255 * heat[..., 0]).astype(int)]
    expected = (1 - heat) * LUMA[..., None] + heat * colours
    np.testing.assert_allclose(shown, expected, atol=0.51)


def test_without_a_range_the_upper_half_of_the_scale_is_shown() -> None:
    shown = overlaid(VIS, LEVELS, "iron", COUNTS)
    np.testing.assert_array_equal(shown, overlaid(VIS, LEVELS, "iron", COUNTS, (8275.0, 9550.0)))
    np.testing.assert_array_equal(shown[:, :32], np.repeat(LUMA[:, :32, None], 3, axis=2))
    assert (shown[:, 40:] != shown[:, 40:, :1]).any()


@pytest.mark.parametrize("colour_range", [(-1e308, 1e308), (0.0, 5e-324), (9e307, 1e308), (-1e308, -9e307)])
@pytest.mark.parametrize("scaled", [COUNTS, (-1.7e308, 1.7e308), (7.0, 7.0)])
def test_ranges_of_any_finite_numbers_are_drawn(colour_range: tuple[float, float], scaled: tuple[float, float]) -> None:
    shown = overlaid(VIS, LEVELS, "iron", scaled, colour_range)
    low, high = colour_range
    if scaled[1] <= low:
        np.testing.assert_array_equal(shown, greyed(VIS))
    if scaled[0] >= high:
        assert (shown == 255).all()


def test_a_flat_frame_is_as_hot_as_it_is() -> None:
    flat = Picture(np.full((64, 64), 8000, np.uint16))
    levels, found = scale.ir_scaled(flat)
    assert found == (8000.0, 8000.0)
    np.testing.assert_array_equal(overlaid(VIS, levels, "iron", found), greyed(VIS))
    np.testing.assert_array_equal(overlaid(VIS, levels, "iron", found, (8000.0, 9000.0)), greyed(VIS))
    assert (overlaid(VIS, levels, "iron", found, (7000.0, 7999.0)) == 255).all()


def test_where_infrared_was_not_measured_nothing_is_shown() -> None:
    weights = np.tile(np.linspace(0, 1, 64, dtype=np.float32)[:, None], (1, 64))
    shown = overlaid(VIS, LEVELS, "iron", COUNTS, None, weights).astype(float)
    whole = overlaid(VIS, LEVELS, "iron", COUNTS).astype(float)
    np.testing.assert_array_equal(shown[0], np.repeat(LUMA[0][:, None], 3, axis=1))
    np.testing.assert_array_equal(shown[-1], whole[-1])
    np.testing.assert_allclose(
        shown[32], LUMA[32][:, None] + weights[32][:, None] * (whole[32] - LUMA[32][:, None]), atol=0.51
    )


def test_grey_has_three_equal_channels_of_the_luma() -> None:
    shown = greyed(VIS)
    assert shown.shape == VIS.shape
    np.testing.assert_array_equal(shown, np.repeat(grey_of(VIS)[..., None], 3, axis=2))


def test_eight_bits_are_their_own_scale() -> None:
    levels, found = scale.ir_scaled(Picture(LEVELS, bits=8))
    assert found == (0.0, 255.0)
    np.testing.assert_array_equal(levels, LEVELS)


@pytest.mark.parametrize("ir_range", [None, (100.0, 4000.0)])
def test_the_scale_says_which_values_the_levels_were(ir_range: scale.Range | None) -> None:
    counts = np.random.default_rng(1).integers(0, 5000, (64, 64), dtype=np.uint16)
    levels, (black, white) = scale.ir_scaled(Picture(counts), ir_range)
    assert (black, white) == (ir_range or (black, white))
    inside = (counts > black) & (counts < white)
    np.testing.assert_allclose(
        black + levels[inside] / 255.0 * (white - black), counts[inside], atol=(white - black) / 500
    )
