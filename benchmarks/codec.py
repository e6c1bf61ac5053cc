"""What reading costs, what PNG settings cost and bring: `recofuse bench codec`. Processor time, in alternating calls.

Reading: a pair of files by `recofuse_images`, checks and scaling included, beside OpenCV's decoder alone on the same
bytes. Writing: four kinds of 640x480 pictures, since the answer depends on them: a generated street, the same with more
sensor noise, the smooth noisy picture that `bench service` sends, and a drawing of flat areas. Every setting is
lossless; what is chosen is a point between time and size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.load import picture_pair
from benchmarks.processes import machine
from recofuse_images.reader import read_pair

Pixels = NDArray[np.uint8]


def _flags(level: int, strategy: str, png_filter: str) -> list[int]:
    filters = cv2.IMWRITE_PNG_ALL_FILTERS if png_filter == "ALL" else getattr(cv2, f"IMWRITE_PNG_FILTER_{png_filter}")
    matching = getattr(cv2, f"IMWRITE_PNG_STRATEGY_{strategy}")
    return [
        cv2.IMWRITE_PNG_COMPRESSION, level, cv2.IMWRITE_PNG_STRATEGY, matching, cv2.IMWRITE_PNG_FILTER, filters
    ]  # fmt: skip


SETTINGS: dict[str, list[int]] = {
    "stored": _flags(0, "DEFAULT", "NONE"),
    "level 1, run lengths, Up": _flags(1, "RLE", "UP"),
    "level 1, run lengths, Sub": _flags(1, "RLE", "SUB"),
    "level 1, run lengths, all filters": _flags(1, "RLE", "ALL"),
    "level 1, Huffman only, Up": _flags(1, "HUFFMAN_ONLY", "UP"),
    "level 1, matches, Up": _flags(1, "DEFAULT", "UP"),
    "level 3, matches, Up": _flags(3, "DEFAULT", "UP"),
    "level 6, matches, all filters": _flags(6, "DEFAULT", "ALL"),
}
CHOSEN = "level 1, run lengths, Up"  # what recofuse_images/writer.py does at compression 1, the default


def pictures() -> dict[str, Pixels]:
    """The kinds of pictures, (480, 640, 3) uint8."""
    from recofuse_core.scenes.scene import make_scene

    scene = make_scene(3).vis
    street = (np.asarray(scene).squeeze().transpose(1, 2, 0) * 255).round().astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 4, street.shape)
    drawing = np.kron(np.random.default_rng(1).integers(0, 256, (12, 16, 3), np.uint8), np.ones((40, 40, 1), np.uint8))
    sent = cv2.imdecode(np.frombuffer(picture_pair()[0], np.uint8), cv2.IMREAD_COLOR)
    return {
        "street": street,
        "noisy street": np.clip(street + noise, 0, 255).astype(np.uint8),
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
    say(f"{where['cpu']}; 640x480, processor ms of one picture, median of {repeats}; * is the default\n")
    say("| Picture | PNG settings | encode ms | decode ms | kB |\n|---|---|--:|--:|--:|")
    rows: list[dict[str, object]] = []
    for name, pixels in pictures().items():
        for setting, flags in SETTINGS.items():
            encoded = cv2.imencode(".png", pixels, flags)[1]
            encode_ms = _median_ms(lambda pixels=pixels, flags=flags: cv2.imencode(".png", pixels, flags), repeats)  # type: ignore[misc]
            decode_ms = _median_ms(lambda encoded=encoded: cv2.imdecode(encoded, cv2.IMREAD_COLOR), repeats)  # type: ignore[misc]
            if not np.array_equal(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)), pixels):
                raise RuntimeError(f"{setting} is not lossless")
            mark = "*" if setting == CHOSEN else ""
            say(f"| {name} | {setting}{mark} | {encode_ms:.1f} | {decode_ms:.1f} | {encoded.size / 1000:.0f} |")
            row = {"picture": name, "setting": setting, "encode_ms": encode_ms, "decode_ms": decode_ms}
            rows.append({**row, "bytes": int(encoded.size)})
    if json_path is not None:
        json_path.write_text(
            json.dumps({"machine": where, "rows": rows, "reading": reading}, indent=2) + "\n", encoding="utf-8"
        )
    return rows


def compare_reading(repeats: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Processor ms of a pair by our reader and by OpenCV's decoder alone, and their ratio."""
    vis = pictures()["noisy street"]
    ir = np.asarray(cv2.cvtColor(vis, cv2.COLOR_RGB2GRAY))
    pairs = {
        "PNG": (_file(vis, ".png"), _file(ir, ".png")),
        "PNG, infrared of 16 bits": (_file(vis, ".png"), _file(ir.astype(np.uint16) * 20 + 7000, ".png")),
        "JPEG": (_file(vis, ".jpg"), _file(ir, ".jpg")),
        "TIFF": (_file(vis, ".tiff"), _file(ir, ".tiff")),
    }
    say("| Pair read | recofuse_images, ms | OpenCV's decoder alone, ms | ratio |\n|---|--:|--:|--:|")
    found: dict[str, dict[str, float]] = {}
    for name, files in pairs.items():
        ours, alone = _alternating_ms(partial(read_pair, *files), partial(_opencv, files), repeats)
        found[name] = {"recofuse_images_ms": ours, "opencv_ms": alone, "ratio": ours / alone}
        say(f"| {name} | {ours:.1f} | {alone:.1f} | {ours / alone:.2f} |")
    say("")
    return found


def _file(pixels: NDArray[np.generic], suffix: str) -> bytes:
    return cv2.imencode(suffix, np.asarray(pixels))[1].tobytes()


def _opencv(files: tuple[bytes, bytes]) -> None:
    for data, flags in zip(files, (cv2.IMREAD_COLOR_RGB, cv2.IMREAD_GRAYSCALE), strict=True):
        cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_ANYDEPTH)


def _alternating_ms(ours: Callable[[], object], baseline: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians of two calls that take turns, so that both meet the same neighbours."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for call, times in zip((ours, baseline), spent, strict=True):
            times.append(_median_ms(call, 1))
    return _median(spent[0]), _median(spent[1])


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    spent: list[float] = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        spent.append(1e3 * (time.process_time() - started))
    return _median(spent)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
