"""Which picture of an infrared file is read, and what the answer says of it: from bytes to the faces of the service."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from recofuse_client import AsyncClient
from recofuse_images.errors import BadImageError
from recofuse_images.reader import read_infrared, read_ir, read_pair
from service.terms.jobs import PixelFormat, RawLayout
from tests.fakes import FakeEngine, file_of, picture
from tests.images.files import VIS_FILE, saved, tiff_of
from tests.images.test_radiometric import CONSTANTS, EXIF, Flir, jpeg_of, parts_of, scene, segment
from tests.service.conftest import Serving, serving

__all__ = ["serving"]

SHOWN = picture(80, 60)
VIS = file_of(SHOWN)
COUNTS = scene()
FLIR = Flir().jpeg(COUNTS)


def in_palette(grey: NDArray[np.uint8], palette: int = cv2.COLORMAP_JET) -> bytes:
    return file_of(np.asarray(cv2.applyColorMap(grey, palette))[..., ::-1])


def correlation(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.corrcoef(one.ravel().astype(float), other.ravel().astype(float))[0, 1])


def test_the_counts_behind_a_radiometric_picture_are_read() -> None:
    infrared = read_infrared(FLIR)
    assert (infrared.source, infrared.warnings) == ("raw", ())
    np.testing.assert_array_equal(infrared.picture.values, COUNTS)
    np.testing.assert_array_equal(read_ir(FLIR), read_ir(file_of(COUNTS)))


def test_orientation_turns_the_counts_too() -> None:
    turned = jpeg_of(Flir().parts(COUNTS), [EXIF])  # 6: the camera on its side
    np.testing.assert_array_equal(read_infrared(turned).picture.values, np.rot90(COUNTS, -1))


def test_a_range_of_degrees_applies_to_degrees() -> None:
    data = Flir(constants=CONSTANTS).jpeg(COUNTS)
    degrees = read_infrared(data).picture.values
    assert degrees.dtype == np.float32
    low, high = float(degrees.min()), float(degrees.max())
    levels = read_ir(data, ir_range=(low, high))
    assert np.abs(levels - (degrees - low) / (high - low) * 255).max() <= 0.51


def test_a_lost_part_of_the_counts_leaves_the_picture_with_a_word_about_it() -> None:
    parts = parts_of(Flir(payload="plain").fff(scene(240, 320)))
    data = jpeg_of(parts[:1])
    pair = read_pair(VIS, data)
    assert pair.ir_source in ("palette", "grey")
    assert "thermal block" in pair.warnings[0]
    dji = jpeg_of([]).replace(b"\xff\xd8", b"\xff\xd8" + segment(0xE4, b"\xaa\x55\x12\x06" + bytes(60)), 1)
    assert "DJI" in read_pair(VIS, dji).warnings[0]


@pytest.mark.parametrize("palette", [cv2.COLORMAP_JET, cv2.COLORMAP_INFERNO, cv2.COLORMAP_RAINBOW, cv2.COLORMAP_HOT])
def test_false_colour_becomes_intensity(palette: int) -> None:
    grey = picture(160, 120, channels=1, seed=4)
    infrared = read_infrared(in_palette(grey, palette))
    assert (infrared.source, infrared.warnings) == ("palette", ())
    assert correlation(infrared.picture.values, grey) > 0.98


def test_a_photograph_in_place_of_the_infrared_image_gets_a_warning() -> None:
    pair = read_pair(VIS, file_of(picture(80, 60, seed=9)))
    assert pair.ir_source == "grey"
    assert "in colour" in pair.warnings[0]
    assert read_pair(VIS, saved(Image.fromarray(COUNTS.astype(np.uint8)).convert("RGB"), "JPEG")).warnings == ()


def test_one_file_is_not_both_sides() -> None:
    with pytest.raises(BadImageError, match="the same file"):
        read_pair(VIS, VIS)


def test_four_channels_are_both_sides() -> None:
    thermal = picture(80, 60, channels=1, seed=2)
    packed = saved(Image.fromarray(np.dstack([SHOWN, thermal])), "PNG")
    pair = read_pair(packed, packed)
    np.testing.assert_array_equal(pair.vis, SHOWN)
    np.testing.assert_array_equal(pair.ir, thermal)
    opaque = saved(Image.fromarray(np.dstack([SHOWN, np.full_like(thermal, 255)])), "PNG")
    with pytest.raises(BadImageError, match="fourth channel"):
        read_pair(opaque, opaque)


def test_a_raw_frame_is_no_file_even_if_its_bytes_are_those_of_one() -> None:
    packed = saved(Image.fromarray(np.dstack([SHOWN, picture(80, 60, channels=1, seed=2)])), "PNG")
    layout = RawLayout(pixel_format=PixelFormat.MONO8, width=80, height=60, stride=-(-len(packed) // 60))
    pair = read_pair(packed, packed, ir_layout=layout)
    np.testing.assert_array_equal(pair.ir[0], np.frombuffer(packed, np.uint8)[:80])


FILES = {
    "raw": (FLIR, "raw", 0),
    "palette": (in_palette(picture(80, 60, channels=1, seed=4)), "palette", 0),
    "photograph": (file_of(picture(80, 60, seed=9)), "grey", 1),
    "degrees with a border": (tiff_of(np.pad(np.linspace(2, 40, 4200).reshape(60, 70), ((0, 0), (10, 0)))), "grey", 0),
}


@pytest.mark.parametrize("name", FILES)
async def test_every_face_says_what_was_read(serving: Serving, name: str) -> None:
    data, source, num_warnings = FILES[name]
    expected = read_pair(VIS, data).ir
    async with serving(engine=FakeEngine(), grpc={"port": 0}) as server:
        answer = await server.client.post(
            "/v1/fuse", files={"vis": VIS, "ir": data}, data={"output": "all", "format": "npy"}
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-infrared-source"] == source
        assert len(answer.headers.get_list("x-warning")) == num_warnings
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            np.testing.assert_array_equal(np.load(io.BytesIO(archive.read("ir.npy"))), expected)
        async with AsyncClient(f"grpc://{server.grpc_address}") as client:
            fusion = await client.fuse(VIS, data, output="ir")
    assert (fusion.ir_source, len(fusion.warnings)) == (source, num_warnings)
    np.testing.assert_array_equal(fusion.ir, expected)


async def test_one_file_for_both_sides_is_refused_before_the_queue(serving: Serving) -> None:
    async with serving() as server:
        answer = await server.client.post("/v1/fuse", files={"vis": VIS_FILE, "ir": VIS_FILE})
    assert answer.status_code == 422
    assert "the same file" in answer.json()["detail"]
