"""Arrays make the journey unchanged, whatever their shape and type, by every format that loses nothing."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from recofuse_client import BadAnswerError, Part, Picture
from recofuse_client.pictures import checked_array, decoded, file_of, npy_pixels, png_of
from recofuse_client.rpc import fusion_of, image_message
from recofuse_images.frames import read_frame
from recofuse_images.limits import Limits
from recofuse_images.reader import read_vis
from recofuse_images.scale import vis_levels
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from service.faces.grpc.messages import content_of
from tests.fakes import file_of as encoded

LIMITS = Limits(min_side=1)

sides = st.tuples(st.integers(1, 40), st.integers(1, 40))
grey8 = sides.flatmap(lambda side: hnp.arrays(np.uint8, side))
grey16 = sides.flatmap(lambda side: hnp.arrays(np.uint16, side))
colour8 = sides.flatmap(lambda side: hnp.arrays(np.uint8, (*side, 3)))
colour16 = sides.flatmap(lambda side: hnp.arrays(np.uint16, (*side, 3)))
views = st.sampled_from([np.s_[:], np.s_[::-1], np.s_[:, ::-1], np.s_[::2]])


def seen_by_server(image: pb.Image, highest: int) -> NDArray[np.uint8]:
    """What the server makes of a visible image, as 8 bits."""
    payload, layout = content_of(image, "vis")
    if layout is None:
        return read_vis(payload, LIMITS, (0, highest))
    return vis_levels(read_frame(payload, layout, LIMITS), (0, highest))


@given(colour8 | grey8 | colour16 | grey16, views, st.booleans())
def test_what_the_server_sees_is_what_was_given(array: NDArray[Any], view: Any, bgr: bool) -> None:
    shown = array[view]
    highest = np.iinfo(shown.dtype).max
    eight = np.rint(shown / (highest / 255)).astype(np.uint8)
    expected = np.repeat(eight[..., None], 3, axis=2) if eight.ndim == 2 else eight[..., ::-1] if bgr else eight
    np.testing.assert_array_equal(seen_by_server(image_message(shown, "vis", bgr=bgr), highest), expected)
    file = pb.Image(encoded=file_of(shown, "vis", bgr=bgr))
    np.testing.assert_array_equal(seen_by_server(file, highest), expected)


@given(colour8 | grey8)
def test_pictures_of_an_answer_are_what_the_server_sent(array: NDArray[np.uint8]) -> None:
    part = Part.IR if array.ndim == 2 else Part.FUSED
    buffer = io.BytesIO()
    np.save(buffer, array)
    np.testing.assert_array_equal(npy_pixels(buffer.getvalue()), array)
    np.testing.assert_array_equal(Picture(part, "image/png", png_of(array, "vis")).pixels, array)
    height, width = array.shape[:2]
    pixel_format = pb.PIXEL_FORMAT_MONO8 if array.ndim == 2 else pb.PIXEL_FORMAT_RGB8
    padded = np.pad(array.reshape(height, -1), ((0, 0), (0, 5)))
    for stride, rows in ((0, array), (array[0].size + 5, padded)):
        raw = pb.RawImage(pixel_format=pixel_format, width=width, height=height, stride=stride, data=rows.tobytes())
        picture = pb.Picture(part=pb.Part.Value(f"PART_{part.name}"), image=pb.Image(raw=raw))
        fusion = fusion_of(pb.Fusion(pictures=[picture]), "")
        np.testing.assert_array_equal(fusion[part].pixels, array)
        assert fusion[part].pixels.flags.writeable


@given(st.binary(max_size=200))
def test_garbage_is_a_bad_answer(data: bytes) -> None:
    for read in (npy_pixels, lambda data: decoded(data, "image/png")):
        with pytest.raises(BadAnswerError):
            read(data)
    raw = pb.RawImage(pixel_format=pb.PIXEL_FORMAT_RGB8, width=100, height=100, data=data)
    with pytest.raises(BadAnswerError):
        fusion_of(pb.Fusion(pictures=[pb.Picture(part=pb.PART_FUSED, image=pb.Image(raw=raw))]), "")


def test_arrays_that_are_no_pictures() -> None:
    for wrong in (np.zeros((4, 4), np.float32), np.zeros((4, 4), np.int16), np.zeros((4, 4), bool)):
        with pytest.raises(TypeError, match="uint8 or uint16"):
            checked_array(wrong, "vis")
    for shape in ((4,), (4, 4, 2), (4, 4, 4), (0, 4), (1, 4, 4, 3)):
        with pytest.raises(ValueError, match="accepted are"):
            checked_array(np.zeros(shape, np.uint8), "ir")


def test_an_infrared_picture_is_grey_in_formats_that_know_none() -> None:
    grey = np.full((48, 64), 77, np.uint8)
    assert Picture(Part.IR, "image/webp", encoded(grey, ".webp")).pixels.shape == (48, 64)
