"""What reading costs, what PNG settings cost and bring: `recofuse bench codec`. Processor time, in alternating calls.

Reading: a pair of files by `recofuse_images`, checks and scaling included, beside OpenCV's decoder alone on the same
bytes. Writing: several kinds of pictures, since the answer depends on them: a generated street, also with more sensor
noise, as infrared of 16 bits and in 1920x1080; the smooth noisy picture that `bench service` sends, and a drawing of
flat areas. Every setting is lossless; what is chosen is a point between time and size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from benchmarks.load import picture_pair
from benchmarks.processes import machine
from recofuse_images.png import packed_file
from recofuse_images.reader import read_pair
from recofuse_images.writer import png_bytes

Pixels = NDArray[Any]


def _opencv_png(level: int, strategy: str, png_filter: str) -> Callable[[Pixels], bytes]:
    filters = cv2.IMWRITE_PNG_ALL_FILTERS if png_filter == "ALL" else getattr(cv2, f"IMWRITE_PNG_FILTER_{png_filter}")
    matching = getattr(cv2, f"IMWRITE_PNG_STRATEGY_{strategy}")
    flags = [
        cv2.IMWRITE_PNG_COMPRESSION, level, cv2.IMWRITE_PNG_STRATEGY, matching, cv2.IMWRITE_PNG_FILTER, filters
    ]  # fmt: skip

    def written(pixels: Pixels) -> bytes:
        ordered = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
        return cv2.imencode(".png", ordered, flags)[1].tobytes()

    return written


def _zlib_ng(level: int) -> Callable[[Pixels], bytes]:
    pack: Any = partial(imagecodecs.zlibng_encode, level=level)
    return lambda pixels: packed_file(pixels, pack, checksum=imagecodecs.deflate_crc32)


SETTINGS: dict[str, Callable[[Pixels], bytes]] = {
    "stored": partial(png_bytes, compression=0),
    "libdeflate 1, Up": partial(png_bytes, compression=1),
    "libdeflate 2, Up": partial(png_bytes, compression=2),
    "libdeflate 4, Up": partial(png_bytes, compression=4),
    "libdeflate 6, Up": partial(png_bytes, compression=6),
    "libdeflate 9, Up": partial(png_bytes, compression=9),
    "zlib-ng 1, Up": _zlib_ng(1),
    "zlib-ng 3, Up": _zlib_ng(3),
    "OpenCV 1, run lengths, Up": _opencv_png(1, "RLE", "UP"),
    "OpenCV 1, run lengths, all filters": _opencv_png(1, "RLE", "ALL"),
    "OpenCV 6, matches, all filters": _opencv_png(6, "DEFAULT", "ALL"),
}
CHOSEN = "libdeflate 1, Up"  # what recofuse_images/writer.py does at compression 1, the default


def pictures() -> dict[str, Pixels]:
    """The kinds of pictures, (H, W, 3) uint8 and one of (H, W) uint16."""
    from recofuse_core.scenes.scene import make_scene

    scene = make_scene(3).vis
    street = (np.asarray(scene).squeeze().transpose(1, 2, 0) * 255).round().astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 4, street.shape)
    drawing = np.kron(np.random.default_rng(1).integers(0, 256, (12, 16, 3), np.uint8), np.ones((40, 40, 1), np.uint8))
    sent = cv2.imdecode(np.frombuffer(picture_pair()[0], np.uint8), cv2.IMREAD_COLOR)
    infrared = cv2.cvtColor(street, cv2.COLOR_RGB2GRAY).astype(np.float64) * 20 + 7000
    return {
        "street": street,
        "noisy street": np.clip(street + noise, 0, 255).astype(np.uint8),
        "infrared of 16 bits": (infrared + noise[..., 0]).astype(np.uint16),
        "street, 1920x1080": np.asarray(cv2.resize(street, (1920, 1080), interpolation=cv2.INTER_CUBIC), np.uint8),
        "bench's picture": np.asarray(sent, np.uint8),
        "drawing": np.ascontiguousarray(drawing, np.uint8),
    }


def run(
    *, repeats: int = 20, json_path: Path | None = None, say: Callable[[str], None] = print
) -> list[dict[str, object]]:
    """Measure every setting on every picture; say a Markdown table. json_path: where the figures go as well."""
    cv2.setNumThreads(1)
    where = machine()
    reading = compare_reading(repeats, say)
    say(f"{where['cpu']}; 640x480 unless said, processor ms of one picture, median of {repeats}; * is the default\n")
    say("| Picture | PNG settings | encode ms | decode ms | kB |\n|---|---|--:|--:|--:|")
    rows: list[dict[str, object]] = []
    for name, pixels in pictures().items():
        files = {setting: written(pixels) for setting, written in SETTINGS.items()}
        for setting, data in files.items():
            if not np.array_equal(np.asarray(imagecodecs.png_decode(data)), pixels):
                raise RuntimeError(f"{setting} is not lossless")
        encode_ms = _alternating_ms([partial(written, pixels) for written in SETTINGS.values()], repeats)
        decode_ms = _alternating_ms([partial(imagecodecs.png_decode, data) for data in files.values()], repeats)
        for (setting, data), encoding, decoding in zip(files.items(), encode_ms, decode_ms, strict=True):
            mark = "*" if setting == CHOSEN else ""
            say(f"| {name} | {setting}{mark} | {encoding:.1f} | {decoding:.1f} | {len(data) / 1000:.0f} |")
            row = {"picture": name, "setting": setting, "encode_ms": encoding, "decode_ms": decoding}
            rows.append({**row, "bytes": len(data)})
    if json_path is not None:
        json_path.write_text(
            json.dumps({"machine": where, "rows": rows, "reading": reading}, indent=2) + "\n", encoding="utf-8"
        )
    return rows


def compare_reading(repeats: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Processor ms of a pair by our reader and by OpenCV's decoder alone, and their ratio."""
    vis = pictures()["noisy street"]
    ir = np.asarray(cv2.cvtColor(vis, cv2.COLOR_RGB2GRAY))
    small = [cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_ALL_FILTERS]
    pairs = {
        "PNG": (_file(vis, ".png"), _file(ir, ".png")),
        "PNG, level 6, all filters": (_file(vis, ".png", small), _file(ir, ".png", small)),
        "PNG, infrared of 16 bits": (_file(vis, ".png"), _file(ir.astype(np.uint16) * 20 + 7000, ".png")),
        "JPEG": (_file(vis, ".jpg"), _file(ir, ".jpg")),
        "TIFF": (_file(vis, ".tiff"), _file(ir, ".tiff")),
    }
    say("| Pair read | recofuse_images, ms | OpenCV's decoder alone, ms | ratio |\n|---|--:|--:|--:|")
    found: dict[str, dict[str, float]] = {}
    for name, files in pairs.items():
        ours, alone = _alternating_ms([partial(read_pair, *files), partial(_opencv, files)], repeats)
        found[name] = {"recofuse_images_ms": ours, "opencv_ms": alone, "ratio": ours / alone}
        say(f"| {name} | {ours:.1f} | {alone:.1f} | {ours / alone:.2f} |")
    say("")
    return found


def _file(pixels: NDArray[np.generic], suffix: str, flags: Sequence[int] = ()) -> bytes:
    return cv2.imencode(suffix, np.asarray(pixels), flags)[1].tobytes()


def _opencv(files: tuple[bytes, bytes]) -> None:
    for data, flags in zip(files, (cv2.IMREAD_COLOR_RGB, cv2.IMREAD_GRAYSCALE), strict=True):
        cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_ANYDEPTH)


def _alternating_ms(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Medians of calls that take turns, so that all meet the same neighbours; processor ms."""
    spent: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, spent, strict=True):
            started = time.process_time()
            call()
            times.append(1e3 * (time.process_time() - started))
    return [float(np.median(times)) for times in spent]
