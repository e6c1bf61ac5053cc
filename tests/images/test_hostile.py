"""Files made to crash a reader or to keep it busy: each is read or refused, at once and in little memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from recofuse_images.errors import BadImageError, ImageError
from recofuse_images.picture import Picture, rgb_of_cmyk
from recofuse_images.reader import inspect, read_ir, read_picture, read_vis
from recofuse_images.scale import vis_levels
from tests.fakes import file_of
from tests.images.files import IR, IR_FILE, VIS, chunk, saved, tiff_of

NOWHERE = 2**63 + 8  # BigTIFF can name it; no machine can


def first_of(tiff: bytes) -> tuple[int, list[bytes]]:
    """Where the first directory of a little-endian TIFF file lies, and its entries."""
    is_big = tiff[2] == 43
    (at,) = struct.unpack_from("<Q" if is_big else "<I", tiff, 8 if is_big else 4)
    (count,) = struct.unpack_from("<Q" if is_big else "<H", tiff, at)
    size, start = (20, at + 8) if is_big else (12, at + 2)
    return at, [tiff[start + size * index : start + size * (index + 1)] for index in range(count)]


def big_with_first_directory_nowhere() -> bytes:
    data = bytearray(tiff_of(IR, bigtiff=True))
    data[8:16] = struct.pack("<Q", NOWHERE)
    return bytes(data)


def big_with_next_directory_nowhere() -> bytes:
    data = bytearray(tiff_of(IR, bigtiff=True))
    at, entries = first_of(bytes(data))
    struct.pack_into("<Q", data, at + 8 + 20 * len(entries), NOWHERE)
    return bytes(data)


def big_with_a_tag_nowhere() -> bytes:
    data = bytearray(tiff_of(IR, bigtiff=True))
    at, entries = first_of(bytes(data))
    index = [struct.unpack_from("<H", entry)[0] for entry in entries].index(258)
    struct.pack_into("<QQ", data, at + 8 + 20 * index + 4, 100, NOWHERE)
    return bytes(data)


def palette_of_wide_numbers() -> bytes:
    colours = np.stack([np.arange(256) * 257] * 3).astype(np.uint16)
    data = bytearray(tiff_of(IR, photometric="palette", colormap=colours))
    at, entries = first_of(bytes(data))
    index = [struct.unpack_from("<H", entry)[0] for entry in entries].index(320)
    struct.pack_into("<HII", data, at + 2 + 12 * index + 2, 4, 768, len(data))
    return bytes(data) + struct.pack("<768I", *[1 << 20] * 768)


@pytest.mark.parametrize(
    "made",
    [
        big_with_first_directory_nowhere,
        big_with_next_directory_nowhere,
        big_with_a_tag_nowhere,
        palette_of_wide_numbers,
    ],
)
def test_numbers_that_do_not_fit_are_damage(made: Callable[[], bytes]) -> None:
    with pytest.raises(BadImageError, match="cut short"):
        read_ir(made())


@pytest.mark.parametrize("said", [17, 200, 255])
def test_more_significant_bits_than_are_stored_say_nothing(said: int) -> None:
    data = file_of(VIS.astype(np.uint16) * 16)
    absurd = data[:33] + chunk(b"sBIT", bytes([said] * 3)) + data[33:]
    np.testing.assert_array_equal(read_vis(absurd), read_vis(data))


def test_a_run_of_fill_bytes_is_searched_once() -> None:
    whole = saved(Image.fromarray(IR), "JPEG")
    data = whole[:-2] + b"\xff" * 60_000 + b"\0" + b"\xff\xda" * 200 + b"\xff\xd9"
    started = time.process_time()
    inspect(data, "ir")
    assert time.process_time() - started < 3  # was half a minute, and four times that for every doubling


@pytest.mark.parametrize("code", [254, 256])
def test_a_tag_of_millions_of_bytes_makes_no_numbers(code: int) -> None:
    """Directories may share one, and each number of it would be an object."""
    data = tiff_of(IR)
    _, entries = first_of(data)
    tags = [entry for entry in entries if struct.unpack_from("<H", entry)[0] != code]
    tags = sorted(
        [*tags, struct.pack("<HHII", code, 1, 16 << 20, 8)], key=lambda entry: struct.unpack_from("<H", entry)
    )
    body = bytearray(data.ljust((16 << 20) + 8, b"\1"))
    struct.pack_into("<I", body, 4, len(body))
    for page in range(32):
        following = len(body) + 2 + 12 * len(tags) + 4 if page < 31 else 0
        body += struct.pack("<H", len(tags)) + b"".join(tags) + struct.pack("<I", following)
    started = time.process_time()
    with pytest.raises(ImageError):
        read_ir(bytes(body))
    assert time.process_time() - started < 3  # was a minute


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_packed_texts_in_a_png_are_not_unpacked(kind: bytes) -> None:
    head = {b"zTXt": b"key\0\0", b"iTXt": b"key\0\1\0\0\0", b"iCCP": b"key\0\0"}[kind]
    texts = chunk(kind, head + zlib.compress(bytes(7_900_000), 9)) * 60
    started = time.process_time()
    np.testing.assert_array_equal(read_picture(IR_FILE[:33] + texts + IR_FILE[33:], "ir").values, IR)
    assert time.process_time() - started < 2  # was five seconds, for half a megabyte


def test_a_chunk_that_no_decoder_may_pass_over_is_not_passed_over() -> None:
    with pytest.raises(BadImageError, match="cut short"):
        read_ir(IR_FILE[:33] + chunk(b"ABCD", b"1234") + IR_FILE[33:])


def test_the_hostile_files_are_built_upon_sound_ones() -> None:
    assert read_ir(tiff_of(IR, bigtiff=True)).shape == IR.shape
    assert read_ir(IR_FILE).shape == IR.shape


@pytest.mark.parametrize("values", [np.float64, np.int8])
@pytest.mark.parametrize("is_colour", [False, True])
def test_scaling_takes_no_multiple_of_a_picture(values: type[np.generic], is_colour: bool) -> None:
    """A whole picture in double precision is eight times its levels; several of them are more than a worker has."""
    shape = (1600, 1600, 3) if is_colour else (1600, 1600)
    shown = Picture(np.random.default_rng(0).integers(-50, 50, shape, np.int8).astype(values))
    tracemalloc.start()
    levels = vis_levels(shown)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert levels.shape == (1600, 1600, 3)
    assert most < 100 << 20  # was up to 270 MB


def test_inks_take_no_multiple_of_a_picture() -> None:
    inks = np.random.default_rng(0).integers(0, 256, (1000, 1000, 4)).astype(np.uint8)
    tracemalloc.start()
    rgb_of_cmyk(inks)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20
