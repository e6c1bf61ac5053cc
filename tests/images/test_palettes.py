"""False colour back to intensity: every palette and what cameras do to it; photographs are left alone."""

import time
from functools import cache

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recofuse_core.scenes.scene import make_scene
from recofuse_images.palettes import (
    PALETTES,
    FalseColour,
    chroma_of,
    grey_of_false_colour,
    is_coloured,
    palette_colours,
)

Bytes = NDArray[np.uint8]
# They begin and end in one colour, and each is the other read from its middle: told apart, or left alone.
RINGS = {"twilight", "twilight shifted"}


@cache
def infrared(seed: int = 3, height: int = 240, width: int = 320) -> Bytes:
    """The infrared side of a street, over the whole range, softened as a thermal sensor's lens does."""
    plane = make_scene(seed, height, width).ir[0].numpy()
    low, high = np.percentile(plane, (0.5, 99.5))
    stretched = np.clip((plane - low) / (high - low), 0, 1) * 255
    return np.asarray(np.rint(cv2.GaussianBlur(stretched, (0, 0), 1.0)), np.uint8)


def visible(seed: int, height: int = 240, width: int = 320) -> Bytes:
    return np.asarray(np.rint(make_scene(seed, height, width).vis.permute(1, 2, 0).numpy() * 255), np.uint8)


def shown(places: Bytes, palette: str) -> Bytes:
    return np.ascontiguousarray(palette_colours(palette)[places])


def jpeg(rgb: Bytes, quality: int) -> Bytes:
    """Through JPEG with halved colour resolution."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    data = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]), options)[1]
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert picture is not None
    return np.asarray(np.ascontiguousarray(picture[..., ::-1]), np.uint8)


def correlation(a: Bytes, b: Bytes) -> float:
    return float(np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1])


def found(rgb: Bytes) -> FalseColour:
    result = grey_of_false_colour(rgb)
    assert result is not None
    assert result.grey.dtype == np.uint8
    assert result.grey.shape == rgb.shape[:2]
    return result


# --- palettes come back -----------------------------------------------------------------------------------------------


def test_all_of_opencv_is_known() -> None:
    opencv = {name.removeprefix("COLORMAP_").replace("_", " ").lower() for name in dir(cv2) if "COLORMAP_" in name}
    assert len(opencv) >= 22
    assert opencv <= set(PALETTES)


@pytest.mark.parametrize("palette", sorted(set(PALETTES) - RINGS))
def test_a_lossless_picture_comes_back(palette: str) -> None:
    places = infrared()
    result = found(shown(places, palette))
    assert result.palette == palette
    error = np.abs(result.grey.astype(int) - places)
    assert error.mean() < 0.5
    assert correlation(result.grey, places) > 0.999


@pytest.mark.parametrize("palette", sorted(RINGS))
def test_the_twilights_are_told_apart_or_left_alone(palette: str) -> None:
    num_found = 0
    for seed in range(20):
        small = np.random.default_rng(seed).random((7, 9)).astype(np.float32)
        field = cv2.resize(small, (200, 150), interpolation=cv2.INTER_CUBIC)
        places = np.asarray(np.clip(field, 0.05, 0.95) * 255, np.uint8)
        result = grey_of_false_colour(shown(places, palette))
        if result is not None:
            num_found += 1
            assert result.palette == palette
            assert correlation(result.grey, places) > 0.97
    assert num_found >= 15


@pytest.mark.parametrize("quality", [80, 90, 97])
@pytest.mark.parametrize("palette", sorted(set(PALETTES) - RINGS))
def test_jpeg_comes_back(palette: str, quality: int) -> None:
    places = infrared()
    result = found(jpeg(shown(places, palette), quality))
    assert result.palette == palette
    floor = {"rainbow high contrast": 0.85, "hsv": 0.93}.get(palette, 0.98)  # at edges two colours mix into a third's
    assert correlation(result.grey, places) > floor


@pytest.mark.parametrize("palette", sorted(set(PALETTES) - RINGS))
def test_part_of_the_range_resized_with_noise_comes_back(palette: str) -> None:
    """Shared pieces of palettes may go by either's name, as long as hot stays hot."""
    places = np.asarray(60 + infrared() * (120 / 255), np.uint8)
    large = cv2.resize(shown(places, palette), None, fx=1.6, fy=1.6, interpolation=cv2.INTER_LINEAR)
    noise = np.random.default_rng(0).normal(0, 2, large.shape)
    picture = jpeg(np.asarray(np.clip(large + noise, 0, 255), np.uint8), 92)
    want = cv2.resize(places, (large.shape[1], large.shape[0]), interpolation=cv2.INTER_LINEAR)
    floor = 0.9 if palette == "rainbow high contrast" else 0.96
    assert correlation(found(picture).grey, np.asarray(want, np.uint8)) > floor


@pytest.mark.parametrize("palette", ["jet", "rainbow", "turbo", "inferno", "viridis", "plasma"])
def test_text_logo_and_bar_are_filled_in(palette: str) -> None:
    places = infrared(height=480, width=640)
    rgb, marks = shown(places, palette), np.zeros(places.shape, np.uint8)
    for canvas, white in ((rgb, (255, 255, 255)), (marks, (1,))):
        cv2.putText(canvas, "68.2 C", (12, 60), cv2.FONT_HERSHEY_SIMPLEX, 1.6, white, 3)
        cv2.putText(canvas, "FLIR", (480, 450), cv2.FONT_HERSHEY_SIMPLEX, 1.6, white, 3)
        cv2.rectangle(canvas, (600, 100), (612, 360), white, 2)
    result = found(jpeg(rgb, 92))
    assert result.palette == palette
    assert 0.01 < result.filled_share < 0.1
    error = np.abs(result.grey.astype(int) - places)
    assert error[marks > 0].mean() < 16  # a place of white would be off by a hundred
    assert correlation(result.grey, places) > 0.98


@pytest.mark.parametrize("palette", ["jet", "iron", "viridis", "hsv"])
def test_a_letterbox_stays_cold_and_does_not_hide_the_palette(palette: str) -> None:
    places = infrared()
    picture = cv2.copyMakeBorder(shown(places, palette), 60, 50, 30, 0, cv2.BORDER_CONSTANT)
    result = found(jpeg(np.asarray(picture, np.uint8), 92))
    assert result.palette == palette
    assert result.grey[:50].max() <= 8
    assert correlation(result.grey[60:-50, 30:], places) > 0.97


@pytest.mark.parametrize("palette", ["jet", "rainbow", "turbo", "hsv"])
def test_the_hottest_pixel_stays_the_hottest(palette: str) -> None:
    """What luma gets wrong."""
    places = infrared()
    grey = found(shown(places, palette)).grey
    assert grey[places > 240].mean() > 235
    assert 100 < grey[(places > 110) & (places < 140)].mean() < 150


@settings(deadline=None, max_examples=40)
@example(palette="hsv", seed=0, height=100, width=340)
@given(
    palette=st.sampled_from(sorted(set(PALETTES) - RINGS - {"bone", "pink"})),  # the two hardly have colour
    seed=st.integers(0, 50),
    height=st.integers(100, 260),
    width=st.integers(100, 340),
)
def test_any_field_of_any_size_comes_back(palette: str, seed: int, height: int, width: int) -> None:
    small = np.random.default_rng(seed).random((5, 6)).astype(np.float32)
    field = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    places = np.asarray(np.clip(field, 0, 1) * 255, np.uint8)
    result = found(shown(places, palette))
    # Both ends of hsv have one colour: of 1600 fields, some hot places far from any others go to the cold end, or back.
    assert correlation(result.grey, places) > (0.95 if palette == "hsv" else 0.99)


# --- everything else does not -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_a_photograph_is_no_palette_picture(seed: int) -> None:
    picture = visible(seed)
    assert grey_of_false_colour(picture) is None
    assert grey_of_false_colour(jpeg(picture, 85)) is None


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), cells=st.integers(3, 12))
def test_random_colour_fields_are_no_palette_pictures(seed: int, cells: int) -> None:
    small = np.random.default_rng(seed).random((cells, cells, 3)).astype(np.float32)
    picture = np.asarray(cv2.resize(small, (160, 120), interpolation=cv2.INTER_LINEAR) * 255, np.uint8)
    assert grey_of_false_colour(picture) is None
    assert is_coloured(picture)


@settings(deadline=None, max_examples=60)
@example(seed=1887)
@example(seed=8007)
@example(seed=8348)
@example(seed=8483)
@given(seed=st.integers(0, 10_000))
def test_saturated_cartoons_are_no_palette_pictures(seed: int) -> None:
    """Nor coded as JPEG or softened. All colours of the examples lie beside one palette."""
    rng = np.random.default_rng(seed)
    picture = np.full((120, 160, 3), rng.integers(0, 256, 3), np.uint8)
    for _ in range(12):
        centre = (int(rng.integers(160)), int(rng.integers(120)))
        cv2.circle(picture, centre, int(rng.integers(15, 45)), rng.integers(0, 256, 3).tolist(), -1)
    soft = np.asarray(cv2.GaussianBlur(picture, (0, 0), 1.0), np.uint8)
    assert all(grey_of_false_colour(seen) is None for seen in (picture, jpeg(picture, 85), soft))


@pytest.mark.parametrize("tint", [(255, 120, 40), (90, 140, 255), (255, 214, 160), (150, 190, 255), (120, 255, 140)])
def test_a_scene_in_one_tint_is_no_palette_picture(tint: tuple[int, int, int]) -> None:
    """Sunset, night and sepia: all pixels near one line through black, and a little colour of their own."""
    light = visible(5).mean(axis=2, keepdims=True) / 255
    own = (visible(5) / 255.0 - light) * 0.3
    picture = np.asarray(np.clip((light + own) * np.array(tint), 0, 255), np.uint8)
    assert grey_of_false_colour(picture) is None


@pytest.mark.parametrize("quality", [70, 80, 97])
def test_grey_stored_as_colour_is_not_coloured(quality: int) -> None:
    grey = np.repeat(infrared()[..., None], 3, axis=2)
    noisy = np.asarray(np.clip(grey + np.random.default_rng(0).normal(0, 2, grey.shape), 0, 255), np.uint8)
    tinted = np.asarray(grey * np.array([1.0, 0.97, 0.94]), np.uint8)
    for picture in (grey, noisy, tinted, jpeg(grey, quality), jpeg(noisy, quality), jpeg(tinted, quality)):
        assert not is_coloured(picture)
        assert grey_of_false_colour(picture) is None
    assert chroma_of(grey) == 0


def test_text_in_colour_makes_no_grey_picture_coloured() -> None:
    picture = np.repeat(infrared()[..., None], 3, axis=2)
    cv2.putText(picture, "21.4 C", (10, 40), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (255, 220, 0), 2)
    assert not is_coloured(jpeg(picture, 90))


@pytest.mark.parametrize("seed", range(6))
def test_colour_is_seen(seed: int) -> None:
    assert is_coloured(jpeg(visible(seed), 85))
    assert is_coloured(shown(infrared(), "jet"))


@pytest.mark.parametrize("value", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 128), (90, 200, 40)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 40), (15, 15), (16, 16), (17, 300), (120, 160)])
def test_one_colour_of_any_size_is_no_palette_picture(value: tuple[int, int, int], shape: tuple[int, int]) -> None:
    picture = np.full((*shape, 3), value, np.uint8)
    assert grey_of_false_colour(picture) is None
    assert chroma_of(picture) == max(value) - min(value)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), height=st.integers(1, 40), width=st.integers(1, 40))
def test_noise_of_any_size_is_survived(seed: int, height: int, width: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    assert grey_of_false_colour(noise) is None
    assert chroma_of(noise) >= 0


def test_the_picture_given_is_left_as_it_is() -> None:
    picture = jpeg(shown(infrared(), "jet"), 90)
    before = picture.copy()
    view = picture[:, ::-1]  # not contiguous, as cameras' mirrored frames
    assert correlation(found(view).grey, found(picture).grey[:, ::-1]) > 0.999
    assert np.array_equal(picture, before)


def test_grey_is_told_fast() -> None:
    """Some 2 ms of one core's time for a camera frame; the bound leaves room for a busy machine."""
    grey = np.repeat(infrared(height=480, width=640)[..., None], 3, axis=2)
    grey_of_false_colour(grey)
    begin = time.process_time()
    for _ in range(10):
        grey_of_false_colour(grey)
    assert (time.process_time() - begin) / 10 < 0.03
