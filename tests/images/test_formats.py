"""Every row of the table is read back to the pixel, in every layout; what is not in it is refused by its name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from recofuse_images import formats
from recofuse_images.errors import BadImageError, ImageError, ImageTooLargeError, UnsupportedImageError
from recofuse_images.limits import OWN_FILES
from recofuse_images.picture import upright
from recofuse_images.reader import read_infrared, read_pair, read_picture, read_vis
from tests.fakes import picture
from tests.images.files import IR_FILE, VIS_FILE, chunk, saved, tiff_of

ROOT = Path(__file__).parents[2]
TIFF_ROWS = [row for row in formats.TABLE if row.container == "TIFF" and "JPEG" not in row.storage]
COMPRESSION = {"none": None, "LZW": "lzw", "Deflate": "deflate", "PackBits": "packbits"}


def samples_of(row: formats.Row, bits: int, shape: tuple[int, ...], seed: int) -> NDArray[Any]:
    """Random samples that use the row's whole range."""
    random = np.random.default_rng(seed)
    if row.kind == "floating point":
        return random.normal(20, 9, shape).astype(f"f{bits // 8}")
    if row.kind == "signed":
        low = -(1 << (bits - 1))
        return random.integers(low, -low, shape).astype(f"i{bits // 8}")
    return random.integers(0, 1 << bits, shape).astype("u1" if bits <= 8 else "u2" if bits <= 16 else "u4")


@st.composite
def tiff_cases(draw: st.DrawFn) -> tuple[formats.Row, bytes, NDArray[Any]]:
    """A file of any row and layout, and the pixels that it holds as the reader is to give them, before orientation."""
    row = draw(st.sampled_from(TIFF_ROWS))
    bits, pixels = draw(st.sampled_from(row.bits)), row.pixels[0]
    height, width = draw(st.integers(32, 70)), draw(st.integers(32, 70))
    colours = {"grey": 1, "palette": 1, "RGB": 3, "CMYK": 4}[pixels]
    has_alpha = row.alpha and draw(st.booleans()) and bits in (8, 16, 32, 64)
    values = samples_of(row, bits, (height, width, colours + has_alpha), draw(st.integers(0, 2**31)))
    is_packed = bits not in (8, 16, 32, 64)
    options: dict[str, Any] = {
        "byteorder": draw(st.sampled_from("<>")),
        "bigtiff": draw(st.booleans()),
        "compression": None if is_packed else COMPRESSION[draw(st.sampled_from(row.storage))],
        "photometric": {"grey": "minisblack", "palette": "palette", "RGB": "rgb", "CMYK": "separated"}[pixels],
    }
    if pixels == "grey" and not has_alpha and draw(st.booleans()):
        options["photometric"] = "miniswhite"
    if is_packed:
        options |= {"bitspersample": bits, "byteorder": "<"}  # tifffile packs big endian ones as no reader expects
    elif options["compression"] in ("lzw", "deflate") and row.kind != "floating point":
        options["predictor"] = draw(st.booleans()) and bits <= 32
    match draw(st.sampled_from(["one strip", "strips", "tiles"])):
        case "strips":
            options["rowsperstrip"] = draw(st.integers(1, height))
        case "tiles" if not is_packed:
            options["tile"] = (draw(st.sampled_from([16, 32, 64])), draw(st.sampled_from([16, 48])))
    if has_alpha:
        options["extrasamples"] = [draw(st.sampled_from(["unassalpha", "assocalpha", "unspecified"]))]
    if pixels == "palette":
        colour_map = np.random.default_rng(7).integers(0, 256, (3, 1 << bits)).astype(np.uint16) * 257
        options["colormap"] = colour_map
    orientation = draw(st.integers(1, 8))
    options["extratags"] = [(274, 3, 1, orientation, True)]
    stored = values[..., 0] if values.shape[2] == 1 else values
    if stored.ndim == 3 and draw(st.booleans()):
        stored, options["planarconfig"] = np.ascontiguousarray(stored.transpose(2, 0, 1)), "separate"
    elif stored.ndim == 3:
        options["planarconfig"] = "contig"
    data = palette_of(stored, bits, options) if pixels == "palette" else tiff_of(stored, **options)
    return row, data, upright(expected_of(values[..., :colours], pixels, bits, options), orientation)


def palette_of(values: NDArray[Any], bits: int, options: dict[str, Any]) -> bytes:
    """A file with a palette of any depth; tifffile writes those of eight bits alone, so it writes grey here."""
    colours = options["colormap"].ravel().tolist()
    tags = [*options.get("extratags", ()), (320, 3, 3 << bits, colours, True)]
    plain = {name: value for name, value in options.items() if name != "colormap"}
    return with_tag(tiff_of(values, **{**plain, "photometric": "minisblack", "extratags": tags}), 262, 3)


def with_tag(data: bytes, code: int, value: int) -> bytes:
    """A TIFF file with another number in a tag of its first directory."""
    order, is_big = "<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+")
    head, offset, count, size, value_at = (8, "Q", "Q", 20, 12) if is_big else (4, "I", "H", 12, 8)
    changed = bytearray(data)
    (first,) = struct.unpack_from(order + offset, data, head)
    (num_tags,) = struct.unpack_from(order + count, data, first)
    for index in range(num_tags):
        at = first + struct.calcsize("=" + count) + index * size
        number, kind = struct.unpack_from(order + "HH", data, at)
        if number == code:
            struct.pack_into(order + {3: "H", 4: "I"}[kind], changed, at + value_at, value)
    return bytes(changed)


def expected_of(values: NDArray[Any], pixels: str, bits: int, options: dict[str, Any]) -> NDArray[Any]:
    """An independent writing of what stored samples mean."""
    if pixels == "palette":
        return np.asarray((options["colormap"] >> 8).astype(np.uint8).T[values[..., 0]])
    if pixels == "CMYK":
        light = np.iinfo(values.dtype).max - values.astype(np.float64)
        return np.rint(light[..., :3] * light[..., 3:] / np.iinfo(values.dtype).max).astype(values.dtype)
    if values.dtype.kind == "u" and bits < 8:
        values = (values.astype(int) * 255 // ((1 << bits) - 1)).astype(np.uint8)
    if options["photometric"] == "miniswhite":
        if values.dtype.kind == "u":
            values = (((1 << max(bits, 8)) - 1) - values.astype(np.int64)).astype(values.dtype)
        else:
            values = -values if values.dtype.kind == "f" else (-1 - values.astype(np.int64)).astype(values.dtype)
    return values[..., 0] if values.shape[2] == 1 else values


@settings(deadline=None, max_examples=300)
@given(tiff_cases())
def test_any_tiff_of_the_table_comes_back_to_the_pixel(case: tuple[formats.Row, bytes, NDArray[Any]]) -> None:
    _, data, expected = case
    found = read_picture(data, "vis").values
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 10, 12, 14])
@pytest.mark.parametrize("order", "<>")
def test_packed_samples_have_no_byte_order(bits: int, order: str) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (40, 48))
    digits = ["".join(format(value, f"0{bits}b") for value in row) for row in values]
    packed = [[int(row[at : at + 8], 2) for at in range(0, len(row), 8)] for row in digits]
    data = tiff_of(np.array(packed, np.uint8), byteorder=order)
    for code, value in ((256, 48), (258, bits)):
        data = with_tag(data, code, value)
    expected = values * 255 // ((1 << bits) - 1) if bits < 8 else values
    np.testing.assert_array_equal(read_picture(data, "ir").values, expected)


@pytest.mark.parametrize("row", TIFF_ROWS, ids=lambda row: f"{row.pixels[0]} {row.kind}")
def test_every_row_can_serve_as_either_side(row: formats.Row) -> None:
    for bits in row.bits:
        colours = {"grey": 1, "palette": 1, "RGB": 3, "CMYK": 4}[row.pixels[0]]
        values = samples_of(row, bits, (48, 64, colours), 5)
        options: dict[str, Any] = {"photometric": "rgb"} if colours == 3 else {}
        if row.pixels[0] == "palette":
            options = {"photometric": "palette", "colormap": np.zeros((3, 1 << bits), np.uint16) + 40000}
        if row.pixels[0] == "CMYK":
            options = {"photometric": "separated"}
        if bits not in (8, 16, 32, 64):
            options["bitspersample"] = bits
        plain = values[..., 0] if colours == 1 else values
        data = palette_of(plain, bits, options) if row.pixels[0] == "palette" else tiff_of(plain, **options)
        assert read_pair(data, IR_FILE).vis.shape == (48, 64, 3)
        assert read_pair(VIS_FILE, data).ir.shape == (48, 64)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_within_tiff_is_read(mode: str) -> None:
    shown = Image.fromarray(picture(64, 48)).convert(mode)
    for data in (
        saved(shown, "TIFF", compression="jpeg"),
        tiff_of(np.asarray(shown), compression="jpeg", tile=(32, 32)),
    ):
        found = read_vis(data).astype(int)
        assert np.abs(found - np.asarray(shown.convert("RGB"))).mean() < 6


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("is_interlaced", [False, True])
def test_every_depth_of_png_comes_back_to_the_pixel(bits: int, is_interlaced: bool) -> None:
    """Written by hand: other writers spread few bits over eight."""
    values = np.random.default_rng(2).integers(0, 1 << bits, (40, 48))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = []
    for row, column, down, across in passes if is_interlaced else [(0, 0, 1, 1)]:
        for line in values[row::down, column::across]:
            digits = "".join(format(value, f"0{bits}b") for value in line)
            digits += "0" * (-len(digits) % 8)
            rows.append(b"\0" + bytes(int(digits[at : at + 8], 2) for at in range(0, len(digits), 8)))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 40, bits, 0, 0, 0, is_interlaced))
    body = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    data = b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")
    expected = values * 255 // ((1 << bits) - 1) if bits < 8 else values
    np.testing.assert_array_equal(read_picture(data, "ir").values, expected)


BMP_MODES = ["1", "L", "P", "RGB", "RGBA"]


@pytest.mark.parametrize("mode", BMP_MODES)
def test_bmp_comes_back_to_the_pixel(mode: str) -> None:
    shown = Image.fromarray(picture(67, 49)).convert(mode)
    np.testing.assert_array_equal(read_vis(saved(shown, "BMP")), np.asarray(shown.convert("RGB")))


def test_bmp_from_the_top_down_is_read() -> None:
    data = bytearray(saved(Image.fromarray(picture(64, 48)), "BMP"))
    struct.pack_into("<i", data, 22, -48)
    np.testing.assert_array_equal(read_vis(bytes(data)), picture(64, 48)[::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_read_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    shown = picture(64, 48)
    found = read_vis(saved(Image.fromarray(shown), "AVIF", quality=95, exif=exif)).astype(int)
    assert np.abs(found - upright(shown, orientation)).mean() < 4


def mpf_of(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    """A JPEG with a preview behind the picture."""
    shown = Image.fromarray(pixels)
    return saved(shown, "MPO", save_all=True, append_images=[shown.resize((40, 32))], quality=95, **options)


def test_previews_behind_a_jpeg_are_passed_over() -> None:
    exif = Image.Exif()
    exif[274] = 8
    shown = picture(64, 48)
    assert np.abs(read_vis(mpf_of(shown)).astype(int) - shown).mean() < 5
    assert np.abs(read_vis(mpf_of(shown, exif=exif)).astype(int) - np.rot90(shown)).mean() < 5
    assert read_infrared(mpf_of(shown)).picture.values.shape == (48, 64)


def pages_of(*pages: tuple[NDArray[Any], dict[str, Any]]) -> bytes:
    """A TIFF file of several images."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for pixels, options in pages:
            writer.write(pixels, metadata=None, **options)
    return stream.getvalue()


def test_thumbnails_overviews_and_masks_of_a_tiff_are_passed_over() -> None:
    shown, small = picture(64, 48), picture(32, 24)
    mask = np.ones((48, 64), bool)
    for data in (
        pages_of((small, {"subfiletype": 1}), (shown, {})),
        pages_of((shown, {}), (small, {"subfiletype": 1}), (picture(16, 12), {"subfiletype": 1})),
        pages_of((shown, {}), (small, {})),
        pages_of((shown, {}), (mask, {"subfiletype": 4, "photometric": "mask"})),
        pages_of((small, {"subfiletype": 1, "subifds": 1}), (shown, {})),  # the picture is a part of its thumbnail
        pages_of((shown, {"subifds": 1}), (small, {"subfiletype": 1})),
    ):
        np.testing.assert_array_equal(read_vis(data), shown)
    for other in (255 - shown, picture(40, 40)):
        with pytest.raises(ImageTooLargeError, match="several images"):
            read_vis(pages_of((shown, {}), (other, {})))


JPEG = saved(Image.fromarray(picture()), "JPEG")


def sparse_tiff() -> bytes:
    """As GDAL writes empty tiles: with neither a place nor a length."""
    data = tiff_of(picture(channels=1), rowsperstrip=48)
    return with_tag(with_tag(data, 273, 0), 279, 0)


REFUSED: dict[str, tuple[bytes, str]] = {
    "zstd": (tiff_of(picture(), compression="zstd", photometric="rgb"), "zstd"),
    "LZMA": (tiff_of(picture(), compression="lzma", photometric="rgb"), "LZMA"),
    "WebP in TIFF": (tiff_of(picture(), compression="webp", photometric="rgb"), "WebP"),
    "JPEG 2000 in TIFF": (tiff_of(picture(), compression="jpeg2000", photometric="rgb"), "JPEG 2000"),
    "LERC": (tiff_of(picture(channels=1).astype(np.float32), compression="lerc"), "LERC"),
    "sparse": (sparse_tiff(), "sparse TIFF"),
    "fax": (saved(Image.fromarray(picture()).convert("1"), "TIFF", compression="group4"), "CCITT fax 4"),
    "complex": (tiff_of(np.zeros((48, 64), np.complex64)), "complex"),
    "64-bit integers": (tiff_of(np.zeros((48, 64), np.uint64)), "64-bit unsigned"),
    "Lab": (saved(Image.fromarray(picture()).convert("LAB"), "TIFF"), "CIELab"),
    "DNG": (tiff_of(picture(), photometric="rgb", extratags=[(50706, 1, 4, b"\1\4\0\0", True)]), "DNG"),
    "colour filter array": (tiff_of(picture(channels=1), photometric="cfa"), "camera's raw file"),
    "five bands": (
        tiff_of(np.zeros((48, 64, 5), np.uint8), photometric="minisblack", planarconfig="contig"),
        "5 grey channels",
    ),
    "run-length BMP": (
        b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, 64, 48, 1, 8, 1) + bytes(9999),
        "run lengths",
    ),
    "16-bit BMP": (b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, 64, 48, 1, 16, 0) + bytes(9999), "16 bits a pixel"),
    "GIF": (saved(Image.fromarray(picture()), "GIF"), "a GIF file"),
    "JPEG 2000": (saved(Image.fromarray(picture()), "JPEG2000"), "a JPEG 2000 file"),
    "PPM": (saved(Image.fromarray(picture()), "PPM"), "a PNM file"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "a HEIC file"),
    "MP4": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(99), "an MP4 or QuickTime file"),
    "PDF": (saved(Image.fromarray(picture()), "PDF"), "a PDF file"),
    "NumPy": (b"\x93NUMPY\x01\0" + bytes(99), "a NumPy file"),
    "FITS": (b"SIMPLE  =                    T" + bytes(99), "a FITS file"),
    "12-bit JPEG": (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "12-bit JPEG"),
    "lossless JPEG": (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc3\0\x11\x08"), "lossless JPEG"),
    "text": (b"hello " * 30, "not a readable image file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_in_the_table_is_refused_by_its_name(name: str) -> None:
    data, words = REFUSED[name]
    for refuse in (read_vis, read_infrared):
        with pytest.raises(UnsupportedImageError, match=words):
            refuse(data)


def test_the_readme_shows_the_table() -> None:
    assert formats.markdown() in (ROOT / "README.md").read_text("utf-8")


WHOLE = {
    "TIFF": tiff_of(picture(48, 40), photometric="rgb", compression="lzw", tile=(16, 16), byteorder=">"),
    "TIFF planar": tiff_of(
        np.ascontiguousarray(picture(48, 40).astype(np.uint16).transpose(2, 0, 1)),
        photometric="rgb",
        planarconfig="separate",
        compression="packbits",
    ),
    "TIFF JPEG": saved(Image.fromarray(picture(48, 40)), "TIFF", compression="jpeg"),
    "TIFF float": tiff_of(picture(48, 40, channels=1).astype(np.float64), compression="deflate", rowsperstrip=7),
    "PNG": saved(Image.fromarray(picture(48, 40)).convert("RGBA"), "PNG"),
    "JPEG": saved(Image.fromarray(picture(48, 40)), "JPEG", progressive=True),
    "CMYK JPEG": saved(Image.fromarray(picture(48, 40)).convert("CMYK"), "JPEG"),
    "WebP": saved(Image.fromarray(picture(48, 40)), "WEBP"),
    "AVIF": saved(Image.fromarray(picture(48, 40)), "AVIF"),
    "BMP": saved(Image.fromarray(picture(48, 40)).convert("P"), "BMP"),
}


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_a_changed_file_gives_a_picture_or_an_error_of_ours(name: str, data: st.DataObject) -> None:
    changed = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    for vis, ir in ((bytes(changed), IR_FILE), (VIS_FILE, bytes(changed))):
        try:
            pair = read_pair(vis, ir)
        except ImageError:
            continue
        assert pair.vis.shape[:2] == pair.ir.shape


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 0.999))
def test_no_part_of_a_file_passes_for_the_whole(name: str, share: float) -> None:
    cut = WHOLE[name][: int(len(WHOLE[name]) * share)]
    with pytest.raises((BadImageError, UnsupportedImageError)):
        read_picture(cut, "vis", OWN_FILES)


def test_planes_and_strips_that_are_not_there_are_damage() -> None:
    """A file that names fewer strips than its picture has would leave rows that nobody wrote."""
    whole = tiff_of(picture(64, 48, channels=1), rowsperstrip=4, compression="deflate")
    for code, value in ((278, 3), (278, 9), (257, 60), (257, 43)):  # rows a strip, rows
        with pytest.raises(BadImageError, match="cut short"):
            read_picture(with_tag(whole, code, value), "ir")


@pytest.mark.parametrize("compression", [None, "packbits", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_predictor_counts_for_the_compressions_that_have_one(compression: str | None, deep: bool) -> None:
    """Libtiff writes the tag beside any compression, and takes differences for LZW and Deflate alone."""
    grey = picture(64, 48, channels=1)
    stored = grey.astype(np.uint16) * 200 if deep else grey
    data = saved(Image.fromarray(stored), "TIFF", compression=compression, tiffinfo={317: 2})
    assert struct.pack("<HHIH", 317, 3, 1, 2) in data
    np.testing.assert_array_equal(read_picture(data, "ir").values, stored)
