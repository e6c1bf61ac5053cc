"""Every accepted kind of file decodes to the right pixels; everything else is refused with a reason, and cheaply."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import time
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from recofuse_images.errors import BadImageError, ImageError, ImageTooLargeError, UnsupportedImageError
from recofuse_images.limits import (
    MAX_CHUNKS,
    MAX_EXIF_BYTES,
    MAX_PAGES,
    MAX_SCANS,
    MAX_SEGMENTS,
    MAX_TAG_VALUES,
    MAX_TAGS,
    Limits,
)
from recofuse_images.reader import inspect, read_pair
from service.terms.jobs import PixelFormat, RawLayout
from tests.fakes import file_of, picture
from tests.images.files import BAD_FILES, IR, IR_FILE, VIS, VIS_FILE, chunk, saved

LIMITS = Limits()


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_lossless_files_come_back_exactly(suffix: str) -> None:
    pair = read_pair(file_of(VIS, suffix), file_of(IR, suffix), LIMITS)
    np.testing.assert_array_equal(pair.vis, VIS)
    np.testing.assert_array_equal(pair.ir, IR)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_files_come_back_nearly(suffix: str) -> None:
    pair = read_pair(file_of(VIS, suffix), file_of(IR, suffix), LIMITS)
    assert np.abs(pair.vis.astype(int) - VIS).mean() < 6
    assert np.abs(pair.ir.astype(int) - IR).mean() < 6


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_colour_is_understood(mode: str, image_format: str) -> None:
    image = Image.fromarray(VIS).convert(mode)
    data = saved(image, image_format)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_pair(data, IR_FILE, LIMITS).vis, expected)
    grey = np.asarray(image.convert("RGB").convert("L"))
    assert np.abs(read_pair(VIS_FILE, data, LIMITS).ir.astype(int) - grey).max() <= 2


def test_cmyk_jpeg_is_understood() -> None:
    pair = read_pair(saved(Image.fromarray(VIS).convert("CMYK"), "JPEG", quality=95), IR_FILE, LIMITS)
    assert np.abs(pair.vis.astype(int) - VIS).mean() < 8


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deep_infrared_is_stretched_between_robust_percentiles(image_format: str, dtype: type[np.generic]) -> None:
    if image_format == "PNG" and dtype is np.float32:
        return  # there is no such file
    counts = (7000 + IR.astype(np.float64) * 4).astype(dtype)
    counts[0, 0], counts[0, 1] = 65000, 1  # a glowing and a dead pixel
    pair = read_pair(VIS_FILE, file_of(counts, f".{image_format.lower()}"), LIMITS)
    low, high = np.percentile(counts.astype(float), (0.5, 99.5))
    expected = np.clip((counts.astype(float) - low) / (high - low), 0, 1) * 255
    assert np.abs(pair.ir - expected).max() <= 1.5
    assert pair.ir.std() > 40


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_vis_range_replaces_the_upper_eight_bits(dtype: type, suffix: str) -> None:
    values: NDArray[Any] = VIS.astype(dtype) * (16 if dtype is np.uint16 else 1)
    for low, high in ((0.0, 4080.0), (30.5, 200.0), (-40.0, 20.0), (60.0, 1e9)):
        expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
        pair = read_pair(file_of(values, suffix), IR_FILE, LIMITS, vis_range=(low, high))
        np.testing.assert_array_equal(pair.vis, expected)
        np.testing.assert_array_equal(pair.ir, IR)  # nobody asked for another one of that


@pytest.mark.parametrize("pixel_format", [PixelFormat.MONO8, PixelFormat.MONO16, PixelFormat.RGB8, PixelFormat.BGR8])
def test_vis_range_holds_for_raw_frames(pixel_format: PixelFormat) -> None:
    colour = np.repeat(IR[..., None], 3, axis=2) if "mono" in pixel_format else VIS
    sent = colour if pixel_format is not PixelFormat.BGR8 else colour[..., ::-1]
    if "mono" in pixel_format:
        sent = IR if pixel_format is PixelFormat.MONO8 else IR.astype("<u2") * 4
    layout = RawLayout(pixel_format=pixel_format, width=64, height=48, stride=64 * pixel_format.bytes_per_pixel)
    scale = 4 if pixel_format is PixelFormat.MONO16 else 1
    pair = read_pair(sent.tobytes(), IR_FILE, LIMITS, vis_layout=layout, vis_range=(10 * scale, 130 * scale))
    np.testing.assert_array_equal(pair.vis, np.rint(np.clip((colour - 10.0) / 120, 0, 1) * 255))


def test_a_pair_is_grey_and_in_order_unless_a_decoder_says_otherwise() -> None:
    pair = read_pair(VIS_FILE, IR_FILE, LIMITS)
    assert (pair.ir_source, pair.warnings) == ("grey", ())


def test_ir_range_overrides_the_rule() -> None:
    counts = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    pair = read_pair(VIS_FILE, file_of(counts), LIMITS, ir_range=(0, 65535))
    assert np.abs(pair.ir.astype(float) - counts / 257).max() <= 0.51
    eight = read_pair(VIS_FILE, IR_FILE, LIMITS, ir_range=(0, 127.5))
    assert np.abs(eight.ir.astype(float) - np.clip(IR * 2.0, 0, 255)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    lossless = {"lossless": True} if image_format == "WEBP" else {}
    data = saved(Image.fromarray(VIS), image_format, exif=exif, **lossless)
    upright = np.asarray(Image.fromarray(VIS).transpose(TRANSPOSE[orientation]) if orientation > 1 else VIS)
    header = inspect(data, "vis", LIMITS)
    width, height = header.upright_size
    assert (height, width) == upright.shape[:2]
    ir = file_of(picture(width, height, channels=1))
    decoded = read_pair(data, ir, LIMITS).vis
    assert np.abs(decoded.astype(int) - upright).mean() < 6


TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("size", [(32, 32), (128, 96), (65, 49), (200, 152)])
def test_infrared_of_the_same_aspect_is_resampled(size: tuple[int, int]) -> None:
    pair = read_pair(file_of(picture(256, 256 * size[1] // size[0])), file_of(picture(*size, channels=1)), LIMITS)
    assert pair.ir.shape == pair.vis.shape[:2]


def test_other_aspects_are_refused_with_both_sizes() -> None:
    with pytest.raises(BadImageError, match=r"vis is 64x48 and ir is 64x64; accepted"):
        read_pair(VIS_FILE, file_of(picture(64, 64, channels=1)), LIMITS)


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_a_reason(name: str) -> None:
    data, kind, words = BAD_FILES[name]
    with pytest.raises(kind, match=words):
        read_pair(data, IR_FILE, LIMITS)


def test_a_file_of_too_many_bytes_is_refused() -> None:
    with pytest.raises(ImageTooLargeError, match="at most 100"):
        inspect(VIS_FILE, "vis", Limits(max_image_bytes=100))


def test_a_webp_bomb_costs_nothing() -> None:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") + (16382).to_bytes(3, "little")
    bomb = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    started = time.perf_counter()
    with pytest.raises(ImageTooLargeError, match="16383x16383"):
        inspect(bomb, "vis", LIMITS)
    assert time.perf_counter() - started < 1  # decoding 268 million pixels takes longer


def png_with(chunks: bytes) -> bytes:
    """A small PNG file with more chunks behind its header."""
    return VIS_FILE[:33] + chunks + VIS_FILE[33:]


def jpeg_with(segments: bytes, *, scans: bytes = b"", tail: bytes = b"") -> bytes:
    """A small progressive JPEG file with more segments after its begin, scans before its end, bytes behind that."""
    whole = saved(Image.fromarray(VIS), "JPEG", progressive=True)
    return whole[:2] + segments + whole[2:-2] + scans + whole[-2:] + tail


def tiff_with(tags: list[tuple[int, int, int, int]], *, following: int = 0, order: str = "<") -> bytes:
    """A TIFF file of 64x48 grey pixels, with more tags: number, type, how many values, where they are."""
    own = [(256, 64), (257, 48), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 48), (279, 64 * 48)]
    named = sorted([*((tag, 4, 1, value) for tag, value in own), *tags])
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}I", 8 + 64 * 48) + IR.tobytes() + struct.pack(f"{order}H", len(named))
    directory = b"".join(struct.pack(f"{order}HHII", *tag) for tag in named)
    return head + directory + struct.pack(f"{order}I", following) + bytes(4 * MAX_TAG_VALUES + 2)


def tiff_chain(num_directories: int) -> bytes:
    """A TIFF file of empty directories, each of which names the next."""
    empty = struct.pack("<H", 0)
    offsets = [8 + 6 * index for index in range(1, num_directories)] + [0]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(empty + struct.pack("<I", offset) for offset in offsets)


EMPTY_SCAN = b"\xff\xda\0\x08\x01\x01\0\x01\x3f\0\xff\0"
EXIF_SEGMENT = b"\xff\xe1" + struct.pack(">H", 65000) + b"Exif\0\0" + bytes(65000 - 8)
EXIF = b"Exif\0\0II*\0" + bytes(MAX_EXIF_BYTES)
CROWDED = {
    "png chunks": (png_with(chunk(b"teSt", b"") * MAX_CHUNKS), "chunks"),
    "png exif": (png_with(chunk(b"eXIf", bytes(MAX_EXIF_BYTES + 1))), "EXIF"),
    "webp exif": (saved(Image.fromarray(VIS), "WEBP", exif=EXIF), "EXIF"),
    "jpeg segments": (jpeg_with(b"\xff\xe1\0\2" * MAX_SEGMENTS), "segments"),
    "jpeg fill bytes": (jpeg_with(b"\xff" * MAX_SEGMENTS), "segments"),
    "jpeg exif": (jpeg_with(EXIF_SEGMENT * (MAX_EXIF_BYTES // 65000 + 1)), "EXIF"),
    "jpeg scans": (jpeg_with(b"", scans=EMPTY_SCAN * MAX_SCANS), "scans"),
    "jpeg hidden end": (jpeg_with(b"", scans=b"\xff\xfe\0\4\xff\xd9" + EMPTY_SCAN * MAX_SCANS), "scans"),
    "tiff values": (tiff_with([(338, 3, MAX_TAG_VALUES + 1, 8)]), "numbers in one tag"),
    "tiff values, big endian": (tiff_with([(338, 3, MAX_TAG_VALUES + 1, 8)], order=">"), "numbers in one tag"),
    "tiff tags": (tiff_with([(1000 + number, 3, 1, 0) for number in range(MAX_TAGS)]), "tags"),
    "tiff tiles": (tiff_with([(322, 4, 1, 8192), (323, 4, 1, 8192)]), "tiles"),
    "tiff directories": (tiff_chain(MAX_PAGES + 1), "directories"),
}


@pytest.mark.parametrize("name", CROWDED)
def test_a_file_of_too_many_parts_is_refused_before_a_library_makes_objects_of_them(name: str) -> None:
    data, words = CROWDED[name]
    with pytest.raises(ImageTooLargeError, match=words):
        inspect(data, "ir", LIMITS)


def test_many_parts_are_accepted() -> None:
    many = {
        "png": png_with(chunk(b"teSt", b"") * 1000),
        "jpeg": jpeg_with(b"\xff\xe1\0\2" * 1000, tail=b"\xff\xda" * 1000),  # phones put films behind their pictures
        "tiff": tiff_with([(65001, 3, MAX_TAG_VALUES, 8), (65002, 7, 2 * MAX_TAG_VALUES, 8)], following=8 + 64 * 48),
    }
    for name, data in many.items():
        pair = read_pair(VIS_FILE, data, LIMITS)
        assert pair.ir.shape == IR.shape, name


def test_odd_files_leave_no_lines_on_standard_error() -> None:
    """Whatever Pillow has to say about somebody's upload; pytest's own filters would hide what it says here."""
    tags = b"".join(struct.pack("<HHII", tag, 7, 900, 8) for tag in range(50))  # more than the file has, together
    odd = png_with(chunk(b"eXIf", b"II*\0" + struct.pack("<IH", 8, 50) + tags + bytes(900)))
    program = f"from recofuse_images import reader; reader.inspect({odd!r}, 'vis')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert ended.stderr == b""


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([".png", ".jpg", ".webp", ".tiff"]), st.floats(0, 0.999))
def test_no_part_of_a_file_passes_for_the_whole(suffix: str, share: float) -> None:
    whole = file_of(VIS, suffix)
    cut = whole[: int(len(whole) * share)]
    with pytest.raises(ImageError):
        read_pair(cut, IR_FILE, LIMITS)


@settings(deadline=None, max_examples=60)
@given(st.integers(8, len(VIS_FILE) - 13), st.integers(0, 7))
def test_no_flipped_bit_of_a_png_goes_unnoticed(at: int, bit: int) -> None:
    """`inspect` leaves the checksums of pixels to the decoder, which must see to them; chunks behind it are checked."""
    flipped = bytearray(VIS_FILE)
    flipped[at] ^= 1 << bit
    with pytest.raises(ImageError):
        read_pair(bytes(flipped), IR_FILE, LIMITS)


def test_a_png_with_another_checksum_is_refused_at_once_but_for_its_pixels() -> None:
    for kind, is_refused in ((b"IHDR", True), (b"IDAT", False), (b"IEND", True)):
        changed = bytearray(VIS_FILE)
        at = VIS_FILE.index(kind)
        changed[at + 4 + int.from_bytes(VIS_FILE[at - 4 : at], "big")] ^= 1
        if is_refused:
            with pytest.raises(BadImageError, match="damaged"):
                inspect(bytes(changed), "vis", LIMITS)
        else:
            inspect(bytes(changed), "vis", LIMITS)
        with pytest.raises(BadImageError, match="damaged"):
            read_pair(bytes(changed), IR_FILE, LIMITS)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([".png", ".jpg", ".webp", ".tiff"]), st.data())
def test_damaged_files_are_decoded_or_refused_but_never_worse(suffix: str, data: st.DataObject) -> None:
    damaged = bytearray(file_of(VIS, suffix))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for vis, ir in ((bytes(damaged), IR_FILE), (VIS_FILE, bytes(damaged))):
        with contextlib.suppress(BadImageError, UnsupportedImageError, ImageTooLargeError):
            decoded = read_pair(vis, ir, LIMITS)
            assert decoded.vis.shape[:2] == decoded.ir.shape


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0\x08\0\0\0", b"RIFF\xff\0\0\0WEBPVP8 "]),
    st.binary(max_size=200),
)
def test_garbage_is_refused(magic: bytes, rest: bytes) -> None:
    with pytest.raises(ImageError):
        inspect(magic + rest, "ir", LIMITS)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(PixelFormat), st.integers(0, 20), st.booleans())
def test_raw_frames_are_read_with_their_stride(pixel_format: PixelFormat, padding: int, is_last_padded: bool) -> None:
    grey16 = IR.astype(np.uint16) * 257
    rows = {
        PixelFormat.MONO8: IR,
        PixelFormat.MONO16: grey16.astype("<u2").view(np.uint8).reshape(48, 128),
        PixelFormat.RGB8: VIS.reshape(48, 192),
        PixelFormat.BGR8: np.ascontiguousarray(VIS[..., ::-1]).reshape(48, 192),
        PixelFormat.NV12: np.concatenate([IR, np.full((24, 64), 128, np.uint8)]),
    }[pixel_format]
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    data = padded.tobytes() if is_last_padded else padded.tobytes()[: padded.size - padding]
    layout = RawLayout(pixel_format=pixel_format, width=64, height=48, stride=padded.shape[1])
    as_vis = read_pair(data, IR_FILE, LIMITS, vis_layout=layout).vis
    as_ir = read_pair(VIS_FILE, data, LIMITS, ir_layout=layout, ir_range=None).ir
    if pixel_format in (PixelFormat.RGB8, PixelFormat.BGR8):
        np.testing.assert_array_equal(as_vis, VIS)
        assert np.abs(as_ir.astype(int) - cv2.cvtColor(VIS, cv2.COLOR_RGB2GRAY)).max() <= 1
    elif pixel_format is PixelFormat.NV12:
        assert np.abs(as_vis.astype(int) - as_vis[..., :1]).max() <= 2  # grey stays grey
        expanded = np.rint(np.clip((IR.astype(float) - 16) * 255 / 219, 0, 255))  # from video range
        np.testing.assert_array_equal(as_ir, expanded)
    else:
        np.testing.assert_array_equal(as_vis[..., 0], IR)
    for wrong in (data[:-21], data + bytes(30)):
        with pytest.raises(BadImageError, match="bytes"):
            read_pair(wrong, IR_FILE, LIMITS, vis_layout=layout)
