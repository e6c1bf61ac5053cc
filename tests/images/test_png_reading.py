"""PNG rows are unpacked here where that is sound, and what is not is refused as libpng refuses it."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from recofuse_images import png
from recofuse_images.errors import ImageError
from recofuse_images.limits import Limits
from recofuse_images.writer import png_bytes
from tests.images.files import chunk

HEIGHT, WIDTH = 35, 41
GENERATOR = np.random.default_rng(0)
GREY, RGB = (GENERATOR.integers(0, 256, shape, np.uint8) for shape in ((HEIGHT, WIDTH), (HEIGHT, WIDTH, 3)))
PICTURES: dict[str, NDArray[Any]] = {
    "grey": GREY,
    "grey16": GREY.astype(np.uint16) * 257 + 3,
    "rgb": RGB,
    "rgb16": RGB.astype(np.uint16) * 257 + 3,
}
ROWS = np.concatenate([np.zeros((HEIGHT, 1), np.uint8), RGB.reshape(HEIGHT, -1)], axis=1).tobytes()
PACKED = zlib.compress(ROWS, 6)


def file_of(*parts: bytes, bits: int = 8, colour_type: int = 2, interlacing: int = 0) -> bytes:
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour_type, 0, 0, interlacing)
    return png.MAGIC + chunk(b"IHDR", head) + b"".join(parts) + chunk(b"IEND", b"")


def pixels_of(data: bytes) -> NDArray[Any]:
    return png.read_pixels(data, png.read_header(data, Limits())).values


def verdict(data: bytes) -> object:
    try:
        return pixels_of(data).tobytes()
    except ImageError as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", list(PICTURES))
@pytest.mark.parametrize("level", [0, 1, 9])
def test_sound_files_are_unpacked_here(name: str, level: int) -> None:
    picture = PICTURES[name]
    for data in (png_bytes(picture, level), bytes(imagecodecs.png_encode(picture, level=level))):
        assert png._unpacked(png._bare(data)) is not None
        np.testing.assert_array_equal(pixels_of(data), picture)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_samples_of_few_bits_fill_whole_bytes(bits: int) -> None:
    row = np.arange(-(-WIDTH * bits // 8), dtype=np.uint8)
    rows = b"".join(b"\0" + np.roll(row, at).tobytes() for at in range(HEIGHT))
    data = file_of(chunk(b"IDAT", zlib.compress(rows)), bits=bits, colour_type=0)
    assert png._unpacked(png._bare(data)) is not None
    unpacked = np.unpackbits(np.frombuffer(rows, np.uint8).reshape(HEIGHT, -1)[:, 1:], axis=1)
    samples = unpacked[:, : WIDTH * bits].reshape(HEIGHT, WIDTH, bits) @ (1 << np.arange(bits)[::-1])
    np.testing.assert_array_equal(pixels_of(data), samples * 255 // (2**bits - 1))


def test_rows_may_come_in_many_chunks() -> None:
    parts = [chunk(b"IDAT", PACKED[at : at + 100]) for at in range(0, len(PACKED), 100)]
    data = file_of(chunk(b"gAMA", struct.pack(">I", 45455)), *parts, chunk(b"tEXt", b"a\0b"))
    assert png._unpacked(png._bare(data)) is not None
    np.testing.assert_array_equal(pixels_of(data), RGB)


DAMAGED = {
    "checksum of a chunk": file_of(chunk(b"IDAT", PACKED)[:-4] + bytes(4)),
    "checksum of the stream": file_of(chunk(b"IDAT", PACKED[:-4] + bytes(4))),
    "too few rows": file_of(chunk(b"IDAT", zlib.compress(ROWS[: len(ROWS) // 2]))),
    "a byte too few": file_of(chunk(b"IDAT", zlib.compress(ROWS[:-1]))),
    "a byte too many": file_of(chunk(b"IDAT", zlib.compress(ROWS + b"\0"))),
    "a bomb": file_of(chunk(b"IDAT", zlib.compress(bytes(10_000_000)))),
    "something behind the stream": file_of(chunk(b"IDAT", PACKED + b"more")),
    "an unknown filter": file_of(chunk(b"IDAT", zlib.compress(b"\x07" + ROWS[1:]))),
    "cut short": file_of(chunk(b"IDAT", PACKED[: len(PACKED) // 2])),
    "no rows": file_of(),
    "empty rows": file_of(chunk(b"IDAT", b"")),
    "a palette in between": file_of(chunk(b"IDAT", PACKED[:50]), chunk(b"PLTE", bytes(3)), chunk(b"IDAT", PACKED[50:])),
    "a foreign critical chunk": file_of(chunk(b"ABCD", b"x"), chunk(b"IDAT", PACKED)),
    "interlaced": file_of(chunk(b"IDAT", PACKED), interlacing=1),
    "a palette that is missing": file_of(chunk(b"IDAT", PACKED), colour_type=3),
}


@pytest.mark.parametrize("name", list(DAMAGED))
def test_the_verdict_on_damaged_files_is_libpngs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdict(DAMAGED[name])
    monkeypatch.setattr(png, "_unpacked", lambda bare: None)
    assert found == verdict(DAMAGED[name])


@given(data=st.data())
def test_so_it_is_wherever_a_byte_is_another(data: st.DataObject) -> None:
    sound = file_of(chunk(b"IDAT", PACKED[:700]), chunk(b"IDAT", PACKED[700:]))
    at = data.draw(st.integers(8, len(sound) - 1))
    changed = sound[:at] + bytes([sound[at] ^ data.draw(st.integers(1, 255))]) + sound[at + 1 :]
    found = verdict(changed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(png, "_unpacked", lambda bare: None)
        assert found == verdict(changed)


def test_large_pictures_are_left_to_libpng(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png_bytes(RGB)
    monkeypatch.setattr(png, "_MAX_UNPACKED_BYTES", len(ROWS) - 1)
    assert png._unpacked(png._bare(data)) is None
    np.testing.assert_array_equal(pixels_of(data), RGB)
