"""Fusing files on disk without a server: pairs found by name, one by one through an engine; and picture sheets.

It uses the server's codec (`service/terms/images.py`) and engine, so the same pair, options and seed give the same
pixels as `POST /v1/fuse`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from recofuse_images.names import PairingError
from recofuse_images.pairs import FoundPair, PassedOver, pair_paths
from recofuse_images.reader import Pair
from service.terms import images
from service.terms.errors import InvalidInputError
from service.terms.jobs import FusionOptions, ImageFormat, Part, Stage
from service.terms.measures import Alarm, Alignment
from service.terms.settings import CodecSettings, LimitSettings
from service.work.engine import Engine, PassOptions

if TYPE_CHECKING:
    from recofuse_rigs.rig import Rig
    from recofuse_rigs.warp import Warps

Pixels = NDArray[np.uint8]

FORMAT_OF_SUFFIX = {
    ".png": ImageFormat.PNG,
    ".jpg": ImageFormat.JPEG,
    ".jpeg": ImageFormat.JPEG,
    ".webp": ImageFormat.WEBP,
    ".npy": ImageFormat.NPY,
}

_MARGIN, _LABEL_HEIGHT = 8, 28  # pixels of a sheet
_BACKGROUND, _INK = (24, 24, 27), (228, 228, 231)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage took: seconds on the clock, and seconds of processor time over all threads."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Fusion:
    """One fused pair: what went in (8 bits, on the vis grid), what came out, and what each stage cost."""

    inputs: Pair
    pictures: Mapping[Part, Pixels]
    costs: Mapping[Stage, Cost]
    alarm: Alarm | None = None
    alignment: Alignment | None = None
    warnings: tuple[str, ...] = ()  # of the answer, beside those of the inputs


def match_pairs(vis: Path, ir: Path, leave_out: Path | None = None) -> tuple[list[FoundPair], list[PassedOver]]:
    """The pairs of two files, of two folders or of one folder for both sides, and the files in no pair.

    recofuse_images/names.py says which names are a pair. `leave_out` is a folder that is not searched, the output's.
    Raises InvalidInputError for what it refuses: a missing path, a file beside a folder, one file as both sides, names
    that are ambiguous, and paths without any pair.
    """
    try:
        return pair_paths(vis, ir, leave_out=leave_out)
    except PairingError as error:
        raise InvalidInputError(str(error)) from error


def paths_of_parts(output: Path, parts: Sequence[Part]) -> dict[Part, Path]:
    """Where each picture goes: a single or the fused one to `output`, the others beside it with `_vis` or `_ir`.

    Raises InvalidInputError if the suffix names no format that can be written.
    """
    if output.suffix.lower() not in FORMAT_OF_SUFFIX:
        raise InvalidInputError(
            f"output: {output.name} does not end in one of {', '.join(FORMAT_OF_SUFFIX)}; two folders need a folder"
        )
    if len(parts) == 1:
        return {parts[0]: output}
    return {
        part: output if part is Part.FUSED else output.with_name(f"{output.stem}_{part.value}{output.suffix}")
        for part in parts
    }


def beside_of(outputs: Mapping[Part, Path], asked: FusionOptions) -> dict[str, Path]:
    """Where the values and the alarm go, if they are asked for: beside the first picture."""
    main = next(iter(outputs.values()))
    wanted = {"values": asked.values and f"_values.{asked.values}", "alarm": asked.alarm and "_alarm.json"}
    return {name: main.with_name(f"{main.stem}{end}") for name, end in wanted.items() if end}


def told_alarm(alarm: Alarm) -> str:
    """An alarm in words."""
    unit = " °C" if alarm.unit == "celsius" else ""
    regions = "one region" if alarm.num_regions == 1 else f"{alarm.num_regions} regions"
    return f"{regions} of {alarm.area} px at {alarm.threshold:g}{unit} or more, the hottest {alarm.hottest:.1f}{unit}"


def fuse_files(
    engine: Engine,
    pair: FoundPair,
    outputs: Mapping[Part, Path],
    options: PassOptions,
    asked: FusionOptions,
    limits: LimitSettings,
    codec: CodecSettings,
    rig: Rig | None = None,
    warps: Warps | None = None,
) -> Fusion:
    """Read a pair, fuse it, and write the asked pictures. Raises ServiceError for bad input, OSError for bad paths.

    outputs: where each picture of asked.output goes; values and alarms are written beside the first. options:
    what `asked` comes to with this engine.
    rig: how infrared lies in the visible frame; None for registered pairs. warps: where what follows from it is kept.
    """
    costs: dict[Stage, Cost] = {}
    with _measured(costs, Stage.DECODE):
        vis, ir = pair.vis.read_bytes(), pair.ir.read_bytes()
        if rig is None and asked.align == "refine":
            _, rig = images.check_refined_request(vis, ir, None, None, limits)
        rigged = None if rig is None or warps is None else (rig, warps)
        read = images.decode_asked(vis, ir, asked, limits, rigged)
    inputs = read.pair
    with _measured(costs, Stage.MODEL):
        blends = engine.info.blends
        needed = replace(options, parts=images.needed_parts(asked, read.warp, blends=blends))
        told = read.warp if blends and images.is_partial(asked, read.warp) else None
        overlap = None if told is None else told.overlap[None]
        batch = engine.fuse(inputs.vis[None], inputs.ir[None], needed, [asked.seed], overlap)
    with _measured(costs, Stage.ENCODE):
        made = {part: batch[part][0] for part in needed.parts}
        answer = images.finished(made, asked, read.warp, inputs.ir_scale, inputs.measured, blends=blends)
        for part, path in outputs.items():
            write_picture(path, answer.pictures[part], codec)
            if asked.metadata == "keep":
                source = ir if part is Part.IR else vis
                path.write_bytes(images.with_metadata(path.read_bytes(), source, asked))
        beside = beside_of(outputs, asked)
        if "values" in beside:
            beside["values"].write_bytes(answer.values_file)
        if answer.alarm is not None:
            beside["alarm"].write_text(answer.alarm.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return Fusion(inputs, answer.pictures, costs, answer.alarm, read.alignment, answer.warnings)


def write_picture(path: Path, pixels: Pixels, codec: CodecSettings) -> None:
    """Write a picture in the format that the path's suffix names, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(images.encode(pixels, FORMAT_OF_SUFFIX[path.suffix.lower()], codec))


@contextmanager
def _measured(costs: dict[Stage, Cost], stage: Stage) -> Iterator[None]:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    yield
    costs[stage] = Cost(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def contact_sheet(rows: Sequence[Sequence[tuple[str, Pixels]]]) -> Pixels:
    """Rows of labelled pictures, (H, W, 3) RGB or (H, W) grey, side by side at full size: (H', W', 3)."""
    width = max(sum(picture.shape[1] + _MARGIN for _, picture in row) for row in rows) + _MARGIN
    heights = [max(picture.shape[0] for _, picture in row) + _LABEL_HEIGHT + _MARGIN for row in rows]
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=16)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = _MARGIN
        for label, picture in row:
            draw.text((left + 2, top + 2), label, fill=_INK, font=font)
            sheet.paste(Image.fromarray(picture).convert("RGB"), (left, top + _LABEL_HEIGHT))
            left += picture.shape[1] + _MARGIN
        top += height
    return np.asarray(sheet)
