"""Every pixel that a decoder returns was written by it: what lies in fresh memory may be another caller's picture.

Files, whole and damaged, are decoded in two processes whose heaps are filled with different bytes (glibc's
MALLOC_PERTURB_); whatever comes back different was never written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from recofuse_images.errors import ImageError
from recofuse_images.reader import read_pair
from tests.fakes import file_of, picture
from tests.images.files import chunk, saved, tiff_of

VIS, IR = picture(96, 64), picture(96, 64, channels=1)
DEEP_VIS, DEEP_IR = VIS.astype(np.uint16) * 257, IR.astype(np.uint16) * 20 + 7000
ALPHA = np.full(IR.shape, 255, np.uint8)
MUTANTS = 4  # damaged copies of each file

PIXELS: dict[str, tuple[NDArray[Any], dict[str, Any]]] = {
    "rgb8": (VIS, {"photometric": "rgb"}),
    "rgb16": (DEEP_VIS, {"photometric": "rgb"}),
    "rgb8 planar": (VIS.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
    "rgb16 planar": (DEEP_VIS.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
    "rgba8": (np.dstack([VIS, ALPHA]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "rgba16": (np.dstack([DEEP_VIS, DEEP_IR]), {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
    "grey8": (IR, {}),
    "grey16": (DEEP_IR, {}),
    "white is zero": (DEEP_IR, {"photometric": "miniswhite"}),
    "signed": (DEEP_IR.astype(np.int16) - 9000, {}),
    "float32": (IR.astype(np.float32), {}),
    "palette": (IR, {"photometric": "palette", "colormap": np.stack([np.arange(256) * 257] * 3).astype(np.uint16)}),
}
LAYOUTS: tuple[dict[str, Any], ...] = ({}, {"tile": (32, 32)}, {"rowsperstrip": 7})
OTHERS: dict[str, tuple[str, ...]] = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB",),
    "BMP": ("1", "L", "P", "RGB"),
}


def whole_files() -> Iterator[tuple[str, bytes]]:
    """The kinds of files, by name."""
    for (name, (pixels, tags)), layout, compression, order in itertools.product(
        PIXELS.items(), LAYOUTS, (None, "deflate", "lzw"), "<>"
    ):
        data = tiff_of(pixels, **layout, **tags, byteorder=order, compression=compression)
        yield f"TIFF {name} {layout} {compression} {order}", data
    yield "TIFF JPEG", saved(Image.fromarray(VIS), "TIFF", compression="jpeg")
    yield "PNG of 16 bits", file_of(DEEP_VIS)
    for container, modes in OTHERS.items():
        for mode in modes:
            yield f"{container} {mode}", saved(Image.fromarray(VIS).convert(mode), container)
    yield "progressive JPEG", saved(Image.fromarray(VIS), "JPEG", progressive=True)


def damaged(data: bytes, random_: random.Random) -> bytes:
    """A few bytes changed behind the header, checksums made good where the container has them; PNG loses rows, too."""
    if data.startswith(b"\x89PNG"):
        parts = chunks_of(data)
        rows = zlib.decompress(b"".join(body for kind, body in parts if kind == b"IDAT"))
        fewer = zlib.compress(rows[: random_.randrange(1, len(rows))])
        before = b"".join(chunk(kind, body) for kind, body in parts if kind not in (b"IDAT", b"IEND"))
        return data[:8] + before + chunk(b"IDAT", fewer) + chunk(b"IEND", b"")
    changed = bytearray(data)
    for _ in range(random_.randrange(1, 9)):
        changed[random_.randrange(len(data) // 8, len(data))] = random_.randrange(256)
    return bytes(changed)


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and body of each chunk."""
    at, found = 8, []
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def digests() -> dict[str, str]:
    """What each file decodes to, as either side of a pair: a digest, or why it was refused."""
    found = {}
    vis_file, ir_file = file_of(VIS), file_of(IR)
    for name, data in whole_files():
        random_ = random.Random(name)
        copies = [damaged(data, random_) for _ in range(MUTANTS)]
        for number, copy in enumerate([data, *copies]):
            for role, vis, ir in (("vis", copy, ir_file), ("ir", vis_file, copy)):
                try:
                    pair = read_pair(vis, ir)
                    shown = hashlib.sha256(pair.vis.tobytes() + pair.ir.tobytes()).hexdigest()
                except ImageError as error:
                    shown = f"refused: {error}"
                found[f"{name} as {role}, copy {number}"] = shown
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc fills memory when asked")
def test_no_pixel_comes_from_memory_that_nobody_wrote() -> None:
    command = [sys.executable, "-m", __name__]
    environments = [{**os.environ, "MALLOC_PERTURB_": filling} for filling in ("85", "170")]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for environment in environments]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    first, second = map(json.loads, said)
    assert [name for name in first if first[name] != second[name]] == []
    refused = {name for name, shown in first.items() if shown.startswith("refused")}
    assert [name for name in sorted(refused) if name.endswith("copy 0")] == []
    assert 0.1 < len(refused) / len(first) < 0.9  # the damage is such that some of it is read


if __name__ == "__main__":
    print(json.dumps(digests()))  # noqa: T201
