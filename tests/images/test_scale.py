"""What becomes of deep values: the scene sets the scale, and what is no measurement does not."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recofuse_images.picture import Picture
from recofuse_images.reader import read_ir, read_pair, read_vis
from recofuse_images.scale import ir_levels, vis_levels
from tests.fakes import file_of, picture
from tests.images.files import IR_FILE, VIS_FILE, chunk, tiff_of

SCENE = picture(160, 120, channels=1)
COUNTS = SCENE.astype(np.uint16) * 8 + 7000


def stretched(values: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = np.percentile(values.astype(float), (0.5, 99.5))
    return np.asarray(np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255), np.uint8)


def test_a_flat_deep_image_is_black() -> None:
    assert not ir_levels(Picture(np.full((40, 40), 900, np.uint16))).any()
    assert not ir_levels(Picture(np.full((40, 40), 20.5))).any()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(40, 60000))
def test_counting_finds_the_percentiles_that_sorting_finds(seed: int, spread: int) -> None:
    values = np.random.default_rng(seed).integers(0, spread + 1, (40, 50)).astype(np.uint16)
    low, high = np.percentile(values, (0.5, 99.5), method="lower").astype(float)
    expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    np.testing.assert_array_equal(ir_levels(Picture(values)), expected)


@pytest.mark.parametrize("nothing", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_black_and_take_no_part(nothing: float) -> None:
    values = COUNTS.astype(np.float32)
    expected = ir_levels(Picture(values))
    values[:3, :7] = nothing
    levels = read_ir(tiff_of(values))
    assert not levels[:3, :7].any()
    assert np.abs(levels[10:].astype(int) - expected[10:]).max() <= 2


def test_infrared_without_any_measurement_is_black() -> None:
    assert not read_ir(tiff_of(np.full((48, 64), np.nan, np.float32))).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_gdals_nodata_tag_is_read(dtype: type[np.generic]) -> None:
    values = SCENE.astype(dtype)
    values[30:60, 50:90] = 77  # within the scene's values, away from the border
    levels = read_ir(tiff_of(values, extratags=[(42113, 2, 3, "77", True)]))
    assert not levels[30:60, 50:90].any()
    assert levels.std() > 30


BORDERS: dict[str, tuple[type[np.generic], float]] = {
    "zeros": (np.uint16, 0),
    "highest": (np.uint16, 65535),
    "GDAL's": (np.float32, -9999),
    "ESRI's": (np.float32, -3.4028235e38),
    "degrees": (np.float64, -273.15),
    "signed": (np.int16, -32768),
}


@pytest.mark.parametrize("name", BORDERS)
@pytest.mark.parametrize("side", ["left", "corner", "frame"])
def test_a_border_that_warping_left_does_not_set_the_scale(name: str, side: str) -> None:
    dtype, fill = BORDERS[name]
    values = (SCENE.astype(np.float64) / 8 if "f" in np.dtype(dtype).kind else COUNTS).astype(dtype)
    rows, columns = np.mgrid[:120, :160]
    is_border = {
        "left": columns < 24,
        "corner": columns + 160 - 160 * (rows / 119) < 170 if name == "highest" else columns + rows < 40,
        "frame": (rows < 9) | (rows > 110) | (columns < 9) | (columns > 150),
    }[side]
    values[is_border] = fill
    levels = read_ir(tiff_of(values))
    assert not levels[is_border].any()
    inner = levels[~is_border]
    assert int(inner.max()) - int(inner.min()) > 250
    assert np.corrcoef(inner, SCENE[~is_border])[0, 1] > 0.98


def test_zeros_beside_a_scene_of_few_counts_are_a_border() -> None:
    values = SCENE.astype(np.uint16) * 5 + 400  # a cooled camera's, of 12 bits
    values[:, :30] = 0
    levels = read_ir(file_of(values))
    assert not levels[:, :30].any()
    assert levels[:, 30:].min() == 0
    assert levels[:, 30:].max() == 255


def test_the_smooth_edge_of_a_warped_border_takes_no_part_either() -> None:
    turned = cv2.warpAffine(COUNTS, cv2.getRotationMatrix2D((80, 60), 8, 1.0), (160, 120), flags=cv2.INTER_LINEAR)
    inside = cv2.erode((turned > 6999).astype(np.uint8), np.ones((5, 5))) > 0
    levels = ir_levels(Picture(np.asarray(turned)))
    assert int(levels[inside].max()) - int(levels[inside].min()) > 245


def test_two_borders_within_each_other_are_both_passed_over() -> None:
    values = SCENE.astype(np.float32) / 8
    values[:, :20] = 0 - 1000
    values[:, :10] = -9999
    levels = read_ir(tiff_of(values))
    assert int(levels[:, 20:].max()) - int(levels[:, 20:].min()) > 250
    assert not levels[:, :20].any()


def test_dark_scenes_keep_their_black() -> None:
    """Zeros that lie near the scene's other values are the scene's."""
    values = np.clip(SCENE.astype(np.int32) - 60, 0, None).astype(np.uint16) * 8
    np.testing.assert_allclose(read_ir(file_of(values)).astype(int), stretched(values).astype(int), atol=2)


def test_a_hot_area_at_the_sensors_end_stays_hot() -> None:
    values = COUNTS.copy()
    values[40:70, 100:130] = 65535
    assert (read_ir(file_of(values))[42:68, 102:128] == 255).all()


@pytest.mark.parametrize("noise", [0.0, 2.0])
@pytest.mark.parametrize("side", [2, 4])
def test_a_flat_frame_keeps_its_hot_spot(noise: float, side: int) -> None:
    values = 7000 + np.random.default_rng(3).normal(0, 1, (240, 320)) * noise
    values[100 : 100 + side, 200 : 200 + side] = 9000
    for dtype in (np.uint16, np.float32):
        levels = ir_levels(Picture(values.astype(dtype)))
        assert levels[100, 200] > 250
        levels[100 : 100 + side, 200 : 200 + side] = 0
        assert levels.max() < 8  # and its noise is not stretched over the display


@pytest.mark.parametrize("hot", [14_000, 65_535])
def test_a_few_hot_pixels_do_not_take_a_scenes_contrast(hot: int) -> None:
    """Of a fire, a person in the snow or a cluster of dead pixels: they are white either way."""
    values = picture(640, 480, channels=1).astype(np.uint16) * 5 + 7000
    expected = ir_levels(Picture(values.copy()))
    values[100:104, 200:203] = hot
    for dtype in (np.uint16, np.float32):
        levels = ir_levels(Picture(values.astype(dtype)))
        assert (levels[100:104, 200:203] == 255).all()
        assert np.abs(levels[200:].astype(int) - expected[200:]).max() <= 2


def test_a_frame_that_drifts_by_a_few_counts_keeps_its_hot_spot() -> None:
    values = np.repeat(np.linspace(7000, 7004, 320)[None], 240, axis=0).astype(np.uint16)
    values[100:103, 300:303] = 9000
    levels = ir_levels(Picture(values))
    assert levels[101, 301] > 250
    levels[100:103, 300:303] = 0
    assert levels.max() < 8


@pytest.mark.parametrize("fill", [0.0, -9999.0])
def test_a_border_beside_which_cubic_interpolation_overshoots_does_not_set_the_scale(fill: float) -> None:
    degrees = SCENE.astype(np.float32) / 16 + 12
    matrix = cv2.getRotationMatrix2D((80, 60), 10, 1.0)
    turned = cv2.warpAffine(degrees, matrix, (160, 120), flags=cv2.INTER_CUBIC, borderValue=fill)
    assert turned.min() < fill
    inside = cv2.erode((turned > 11.9).astype(np.uint8), np.ones((7, 7))) > 0
    levels = ir_levels(Picture(np.asarray(turned)))
    assert not levels[turned == fill].any()
    middle = levels[40:80, 50:110].astype(float)  # far from the border
    low, high = np.percentile(turned[inside], (0.5, 99.5))
    expected = np.clip((turned[40:80, 50:110] - low) / (high - low), 0, 1) * 255
    assert np.abs(middle - expected).max() <= 6


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int32])
@pytest.mark.parametrize("is_colour", [False, True])
def test_borders_nodata_and_what_is_not_finite_take_no_part_in_vis_either(
    dtype: type[np.generic], is_colour: bool
) -> None:
    colours = picture(160, 120) if is_colour else SCENE
    values = (colours.astype(np.float64) * 4 + 100).astype(dtype)
    expected = vis_levels(Picture(values.copy()))
    values[:, :20] = -9999
    values[50:70, 60:90] = 333
    if np.dtype(dtype).kind == "f":
        values[5, 50] = np.inf
    levels = vis_levels(Picture(values, nodata=333))
    assert not levels[:, :20].any()
    assert not levels[50:70, 60:90].any()
    assert np.abs(levels[80:, 24:].astype(int) - expected[80:, 24:]).max() <= 12
    ranged = vis_levels(Picture(values, nodata=333), (100, 1120))
    assert dtype in (np.int16, np.int32) or not ranged[5, 50].any()
    assert np.abs(ranged[80:, 24:].astype(int) - (colours[80:, 24:] if is_colour else SCENE[80:, 24:, None])).max() <= 1


def test_nodata_does_not_tell_the_depth_of_a_visible_picture() -> None:
    colours = picture(160, 120)
    twelve = (colours.astype(np.uint32) * 4095 // 255).astype(np.uint16)
    twelve[:, :20] = 65535
    levels = read_vis(tiff_of(twelve, photometric="rgb", extratags=[(42113, 2, 6, "65535", True)]))
    assert not levels[:, :20].any()
    assert np.abs(levels[:, 20:].astype(int) - colours[:, 20:]).max() <= 1


def test_a_glowing_pixel_or_line_sets_no_scale() -> None:
    values = picture(640, 480, channels=1).astype(np.uint16) * 8 + 7000
    expected = ir_levels(Picture(values.copy()))
    values[:, 77] = 65535
    values[5, 5] = 65535
    others = np.delete(np.arange(640), 77)
    assert np.abs(ir_levels(Picture(values))[6:, others].astype(int) - expected[6:, others]).max() <= 8


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_few_bits_at_the_low_end_of_sixteen_are_spread(bits: int, suffix: str) -> None:
    colours = picture(160, 120)
    deep = (colours.astype(np.uint32) * ((1 << bits) - 1) // 255).astype(np.uint16)
    assert np.abs(read_vis(file_of(deep, suffix)).astype(int) - colours).max() <= 1


@pytest.mark.parametrize("factor", [256, 257])
def test_a_dark_picture_over_all_sixteen_bits_stays_dark(factor: int) -> None:
    dark = picture(160, 120) // 8
    np.testing.assert_array_equal(read_vis(file_of(dark.astype(np.uint16) * factor)), dark)


def png_with_sbit(pixels: NDArray[Any], bits: int) -> bytes:
    """A PNG file that says how many bits of a colour count."""
    data = file_of(pixels)
    return data[:33] + chunk(b"sBIT", bytes([bits] * (3 if pixels.ndim == 3 else 1))) + data[33:]


def test_sbit_tells_a_dark_picture_of_few_bits() -> None:
    dark = picture(160, 120) // 8
    twelve = (dark.astype(np.uint32) * 4095 // 255).astype(np.uint16)  # alone, it would pass for ten bits
    assert np.abs(read_vis(png_with_sbit(twelve, 12)).astype(int) - dark).max() <= 1
    assert np.abs(read_vis(png_with_sbit(twelve << 4, 12)).astype(int) - dark).max() <= 1  # as the format asks for


def test_floating_point_of_unit_range_is_taken_as_it_is() -> None:
    colours = picture(160, 120)
    for dtype in (np.float16, np.float32, np.float64):
        data = tiff_of((colours / 255).astype(dtype), photometric="rgb")
        assert np.abs(read_vis(data).astype(int) - colours).max() <= 1


def test_ranges_replace_every_rule() -> None:
    colours = picture(64, 48)
    deep = colours.astype(np.uint16) * 16
    by_range = read_pair(file_of(deep), IR_FILE, vis_range=(0, 4080)).vis
    assert np.abs(by_range.astype(int) - colours).max() <= 1
    brighter = read_pair(VIS_FILE, IR_FILE, vis_range=(0, 127.5)).vis
    assert np.abs(brighter.astype(float) - np.clip(read_vis(VIS_FILE) * 2.0, 0, 255)).max() <= 1
    degrees = (SCENE / 8 - 5).astype(np.float32)
    degrees[0, 0] = np.nan
    warm = read_ir(tiff_of(degrees), ir_range=(-5, 26.875))
    assert warm[0, 0] == 0
    assert np.abs(warm[1:].astype(int) - SCENE[1:]).max() <= 1


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["u1", "u2", "u4", "i2", "i4", "f2", "f4", "f8"]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
)
def test_any_values_become_levels_without_a_warning(kind: str, seed: int, is_colour: bool, is_odd: bool) -> None:
    random = np.random.default_rng(seed)
    shape = (33, 40, 3) if is_colour else (33, 40)
    dtype = np.dtype(kind)
    if dtype.kind == "f":
        values = np.frombuffer(random.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    else:
        values = random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    shown = Picture(values, nodata=float(values.flat[0]) if is_odd else None)
    levels = vis_levels(shown) if is_colour else ir_levels(shown)
    assert levels.dtype == np.uint8
    assert levels.shape == shape
