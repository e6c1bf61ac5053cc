"""What files say of themselves: read by Pillow from what was copied, and hostile files do no harm."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from recofuse_images.limits import OWN_FILES
from recofuse_images.metadata import MAX_BYTES, Metadata, metadata_of, with_metadata
from recofuse_images.reader import read_vis
from recofuse_images.writer import jpeg_bytes, npy_bytes, png_bytes, webp_bytes
from tests.fakes import picture

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3" dc:place="K\xc3\xb6ln"/></x:xmpmeta>'
WRITERS = {"png": png_bytes, "jpeg": jpeg_bytes, "webp": webp_bytes}
SHOWN = picture(64, 48, seed=2)


def exif_of(order: str = "<") -> Image.Exif:
    exif = Image.Exif()
    exif.endian = order
    exif[ExifTags.Base.Make] = "Camera & Sons"
    exif[ExifTags.Base.DateTime] = "2026:11:29 05:12:31"
    exif[ExifTags.Base.Orientation] = 3
    exif[ExifTags.Base.ImageWidth] = 4711
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "2026:11:29 05:12:30",
        ExifTags.Base.FNumber: 2.8,
        ExifTags.Base.MakerNote: b"secret of the maker",
        ExifTags.Base.ExifImageWidth: 4711,
    }
    exif[ExifTags.IFD.GPSInfo] = {
        ExifTags.GPS.GPSLatitudeRef: "N",
        ExifTags.GPS.GPSLatitude: (50.0, 56.0, 28.5),
    }
    return exif


def file_with(kind: str, order: str = "<") -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(SHOWN))
    more: dict[str, Any] = {"exif": exif_of(order)}
    if kind == "png":
        more["pnginfo"] = PngImagePlugin.PngInfo()
        more["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    elif kind == "tiff":
        more["exif"] = Image.Exif()
        more["exif"].load(exif_of(order).tobytes())  # of tags that are not from a file, Pillow writes no place
        more["exif"][700] = XMP
        del more["exif"][ExifTags.Base.ImageWidth]  # which is the picture's own here
    else:
        more["xmp"] = XMP
    image.save(stream, kind, **more)
    return stream.getvalue()


@pytest.mark.parametrize("target", WRITERS)
@pytest.mark.parametrize(("kind", "order"), [("jpeg", "<"), ("jpeg", ">"), ("png", "<"), ("webp", "<"), ("tiff", "<")])
def test_camera_time_and_place_are_copied_from_every_kind_into_every_kind(kind: str, order: str, target: str) -> None:
    plain = WRITERS[target](SHOWN)
    written = with_metadata(plain, metadata_of(file_with(kind, order)))
    np.testing.assert_array_equal(read_vis(written, OWN_FILES), read_vis(plain, OWN_FILES))
    with Image.open(io.BytesIO(written)) as image:
        image.load()
        exif = image.getexif()
        assert exif[ExifTags.Base.Make] == "Camera & Sons"
        assert exif[ExifTags.Base.DateTime] == "2026:11:29 05:12:31"
        inner, place = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
        assert inner[ExifTags.Base.DateTimeOriginal] == "2026:11:29 05:12:30"
        assert float(inner[ExifTags.Base.FNumber]) == pytest.approx(2.8)
        assert [float(value) for value in place[ExifTags.GPS.GPSLatitude]] == [50.0, 56.0, 28.5]
        assert place[ExifTags.GPS.GPSLatitudeRef] == "N"
        # what is no longer true of the pixels, or cannot be moved
        assert ExifTags.Base.ImageWidth not in exif
        assert exif.get(ExifTags.Base.Orientation, 1) == 1  # which Pillow takes from XMP
        assert not {ExifTags.Base.MakerNote, ExifTags.Base.ExifImageWidth} & set(inner)
        xmp = image.info["xmp"]
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    assert xmp == XMP.replace(b'Orientation="3"', b'Orientation="1"')


def test_files_that_say_nothing_are_left_as_they_are() -> None:
    for write in WRITERS.values():
        plain = write(SHOWN)
        assert metadata_of(plain) == Metadata()
        assert with_metadata(plain, Metadata()) is plain
    pixels = npy_bytes(SHOWN)
    assert with_metadata(pixels, metadata_of(file_with("jpeg"))) == pixels
    assert metadata_of(b"") == metadata_of(b"BM" + bytes(60)) == Metadata()


def test_a_small_file_whose_tags_share_one_place_stays_small() -> None:
    num = 40_000
    rows = b"".join(struct.pack("<HHII", 271 if index % 2 else 36867, 2, 50_000, 8) for index in range(num))
    hostile = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", num) + rows + bytes(4)
    found = metadata_of(b"\xff\xd8" + b"\xff\xe1" + struct.pack(">H", 65000) + b"Exif\0\0" + hostile[:64992])
    assert len(found.exif) <= MAX_BYTES
    assert len(metadata_of(hostile).exif) <= MAX_BYTES


@pytest.mark.parametrize("xmp", [b"\xff\xfe<x", b"no markup", b"<" + b"a" * 65536, b"<a\0b>"])
def test_what_is_no_packet_is_left_behind(xmp: bytes) -> None:
    body = b"http://ns.adobe.com/xap/1.0/\0" + xmp[:65000]
    data = b"\xff\xd8\xff\xe1" + struct.pack(">H", 2 + len(body)) + body + jpeg_bytes(SHOWN)[2:]
    assert metadata_of(data).xmp == b""


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["jpeg", "png", "webp", "tiff"]), st.data())
def test_damaged_files_raise_nothing_and_what_is_written_can_be_read(kind: str, data: st.DataObject) -> None:
    raw = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, min(len(raw), 900) - 1))] = data.draw(st.integers(0, 255))
    found = metadata_of(bytes(raw[: data.draw(st.integers(20, len(raw)))]))
    assert max(len(found.exif), len(found.xmp)) <= MAX_BYTES
    for write in WRITERS.values():
        plain = write(SHOWN)
        np.testing.assert_array_equal(read_vis(with_metadata(plain, found)), read_vis(plain))


FILES = {kind: file_with(kind) for kind in ("jpeg", "png", "webp", "tiff")}
