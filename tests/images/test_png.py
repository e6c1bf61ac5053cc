"""PNG files that are written without a codec, read back by the letter of the standard."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from recofuse_images.errors import BadImageError
from recofuse_images.limits import Limits
from recofuse_images.png import read_header, write_pixels

sides = st.tuples(st.integers(1, 40), st.integers(1, 40))
shapes = sides | sides.map(lambda side: (*side, 3))
views = st.sampled_from([np.s_[:], np.s_[::-1], np.s_[:, ::-1], np.s_[::2]])


def chunks_of(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kinds and contents, their checksums checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body, at = data[at + 4 : at + 8 + length], at + 12 + length
        assert data[at - 4 : at] == struct.pack(">I", zlib.crc32(body))
        found.append((body[:4], body[4:]))
    return found


def pixels_of(data: bytes) -> NDArray[Any]:
    """The picture of a file whose rows are all filtered by Up, undone byte by byte (PNG 9.2)."""
    (ihdr, header), (idat, packed), (iend, rest) = chunks_of(data)
    assert (ihdr, idat, iend, rest) == (b"IHDR", b"IDAT", b"IEND", b"")
    width, height, bits, colour_type, *ways = struct.unpack(">IIBBBBB", header)
    assert ways == [0, 0, 0]
    channels = {0: 1, 2: 3}[colour_type]
    row_bytes, stored = width * channels * bits // 8, zlib.decompress(packed)
    above, rows = bytes(row_bytes), b""
    for at in range(0, len(stored), row_bytes + 1):
        assert stored[at] == 2
        above = bytes((now + up) % 256 for now, up in zip(stored[at + 1 : at + 1 + row_bytes], above, strict=True))
        rows += above
    values = np.frombuffer(rows, ">u2" if bits == 16 else np.uint8)
    return values.reshape((height, width, 3) if channels == 3 else (height, width))


WRITERS: list[Callable[[NDArray[Any]], bytes]] = [write_pixels]
if importlib.util.find_spec("cv2") is not None:  # else a light installation: tests/packaging
    from recofuse_images.writer import png_bytes

    WRITERS += [png_bytes, partial(png_bytes, compression=9)]


@given(
    shapes.flatmap(lambda shape: hnp.arrays(st.sampled_from([np.uint8, np.uint16]), shape)),
    views,
    st.sampled_from(WRITERS),
)
def test_what_is_written_is_read_back(
    pixels: NDArray[Any], view: Any, written: Callable[[NDArray[Any]], bytes]
) -> None:
    shown = pixels[view]
    data = written(shown)
    np.testing.assert_array_equal(pixels_of(data), shown)
    header = read_header(data, Limits(min_side=1))
    assert (header.height, header.width) == shown.shape[:2]
    assert header.bits == shown.dtype.itemsize * 8


@pytest.mark.parametrize("written", WRITERS)
def test_even_pictures_become_small(written: Callable[[NDArray[Any]], bytes]) -> None:
    assert len(written(np.full((480, 640, 3), 77, np.uint8))) < 12_000


def test_a_picture_beyond_a_chunk_is_refused() -> None:
    with pytest.raises(BadImageError, match="2147483648x1 is too large"):
        write_pixels(np.broadcast_to(np.uint8(0), (1, 1 << 31)))
