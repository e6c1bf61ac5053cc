"""Every pixel that a decoder returns was written by it: what lies in fresh memory may be another caller's picture.

Files are decoded in two processes whose heaps are filled with different bytes (glibc's MALLOC_PERTURB_); whatever comes
back different was never written.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from service.errors import ServiceError
from service.images import decode_pair
from service.settings import LimitSettings
from tests.fakes import file_of, picture

VIS, IR = picture(96, 64), picture(96, 64, channels=1)
DEEP_VIS, DEEP_IR = VIS.astype(np.uint16) * 257, IR.astype(np.uint16) * 20 + 7000
ALPHA = np.full(IR.shape, 255, np.uint8)

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
    "float32": (IR.astype(np.float32), {}),
    "palette": (IR, {"photometric": "palette", "colormap": np.stack([np.arange(256) * 257] * 3).astype(np.uint16)}),
}
LAYOUTS: tuple[dict[str, Any], ...] = ({}, {"tile": (32, 32)}, {"rowsperstrip": 7})


def files() -> Iterator[tuple[str, bytes]]:
    """The kinds of files, by name."""
    for (name, (pixels, tags)), layout, compression, order in itertools.product(
        PIXELS.items(), LAYOUTS, (None, "deflate"), "<>"
    ):
        stream = io.BytesIO()
        options = {**layout, **tags, "byteorder": order, "compression": compression}
        tifffile.imwrite(stream, pixels, metadata=None, **options)
        yield f"TIFF {name} {layout} {compression} {order}", stream.getvalue()
    for mode, suffix in itertools.product(("L", "RGB", "RGBA", "P", "CMYK"), ("PNG", "JPEG", "WEBP")):
        stream = io.BytesIO()
        try:
            Image.fromarray(VIS).convert(mode).save(stream, suffix)
        except (OSError, ValueError):
            continue  # there is no such file
        yield f"{suffix} {mode}", stream.getvalue()


def digests() -> dict[str, str]:
    """What each file decodes to, as either side of a pair: a digest, or why it was refused."""
    found = {}
    for name, data in files():
        for role, vis, ir in (("vis", data, file_of(IR)), ("ir", file_of(VIS), data)):
            try:
                pair = decode_pair(vis, ir, LimitSettings())
                found[f"{name} as {role}"] = hashlib.sha256(pair.vis.tobytes() + pair.ir.tobytes()).hexdigest()
            except ServiceError as error:
                found[f"{name} as {role}"] = f"refused: {error}"
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc fills memory when asked")
def test_no_pixel_comes_from_memory_that_nobody_wrote() -> None:
    runs = []
    for filling in ("85", "170"):
        environment = {**os.environ, "MALLOC_PERTURB_": filling}
        ended = subprocess.run([sys.executable, "-m", __name__], env=environment, capture_output=True, check=True)
        runs.append(json.loads(ended.stdout))
    first, second = runs
    assert len(first) > 250
    assert [name for name in first if first[name] != second[name]] == []


if __name__ == "__main__":
    print(json.dumps(digests()))  # noqa: T201
