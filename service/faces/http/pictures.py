"""A result as an answer: one picture, or a zip of all that was asked for, and headers that tell how it was made."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from typing import Any, get_args
from urllib.parse import quote

from fastapi import Response

from service.terms.jobs import MAX_WARNINGS, FusionResult, ImageFormat, IrSource, Part
from service.terms.measures import MEDIA_TYPES

MAX_WARNING_BYTES = 400  # of a header line, percent-encoded

PICTURES: dict[str, Any] = {
    **{image_format.media_type: {"schema": {"type": "string", "format": "binary"}} for image_format in ImageFormat},
    "application/zip": {"schema": {"type": "string", "format": "binary"}},
}

_SUFFIXES = {media_type: name for name, media_type in MEDIA_TYPES.items()}  # of files of values

_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")  # what a header may carry as it is
_LISTED = _PLAIN.replace(",", "")  # or one of several lines of a header, which whoever reads them may join with commas
_NAME = {"schema": {"type": "string"}, "description": "percent-encoded where it is not printable ASCII"}
HEADERS = {
    "Server-Timing": {"schema": {"type": "string"}, "description": "decode, queue, batch, model, encode, in ms"},
    "X-Model-Name": _NAME,
    "X-Picture": {"schema": {"type": "string", "enum": list(Part)}, "description": "which picture this is"},
    "X-Model-Version": _NAME,
    "X-Infrared-Source": {
        "schema": {"type": "string", "enum": list(get_args(IrSource))},
        "description": "what was read of ir: the values that a thermal camera's JPEG carries, a false-colour picture "
        "turned back into intensity, or grey values; absent if the worker did not say",
    },
    "X-Alignment": {
        "schema": {"type": "string", "examples": ["residual 0.8 px, moved 3.1 px"]},
        "description": "with align=refine: how far off infrared still seems (or `unknown`, with nothing to see), and "
        "how far it was moved beyond its rig, in visible pixels",
    },
    "X-Warning": {
        "schema": {"type": "array", "items": {"type": "string"}, "maxItems": MAX_WARNINGS},
        "description": "one line for each sentence about what looks wrong with the pair; percent-encoded where it is "
        "not printable ASCII or a comma",
    },
}


async def answer_of(result: FusionResult) -> Response:
    """The answer with a finished job's pictures, as `PICTURES` and `HEADERS` describe it."""
    timing = ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in result.timings_s.items())
    headers = {
        "Server-Timing": timing,
        "X-Model-Name": quote(result.model_name, safe=_PLAIN),
        "X-Model-Version": quote(result.model_version, safe=_PLAIN),
        "X-Job-ID": result.job_id,
    }
    if result.ir_source in get_args(IrSource):
        headers["X-Infrared-Source"] = result.ir_source
    if result.alignment is not None:
        headers["X-Alignment"] = result.alignment.line
    if len(result.images) == 1 and not result.values and result.alarm is None:
        ((part, image),) = result.images.items()
        headers["X-Picture"] = part
        answer = Response(image, media_type=result.media_type, headers=headers)
    else:
        headers["Content-Disposition"] = 'attachment; filename="recofuse.zip"'
        answer = Response(await asyncio.to_thread(_zip, result), media_type="application/zip", headers=headers)
    for warning in result.warnings[:MAX_WARNINGS]:
        answer.headers.append("X-Warning", _warning_line(warning))
    return answer


def _warning_line(warning: str) -> str:
    """A warning as a line of a header, cut between characters if it is too long."""
    line = ""
    for char in warning:
        piece = quote(char, safe=_LISTED, errors="replace")
        if len(line) + len(piece) > MAX_WARNING_BYTES:
            return f"{line}..."
        line += piece
    return line


def _zip(result: FusionResult) -> bytes:
    """All pictures, the values, and a description with what an alarm found; stored, as they are compressed already."""
    suffix = "npy" if result.media_type.endswith("npy") else result.media_type.removeprefix("image/")
    description: dict[str, Any] = {
        "model": {"name": result.model_name, "version": result.model_version},
        "width": result.width,
        "height": result.height,
        "media_type": result.media_type,
        "timings_s": dict(result.timings_s),
        "infrared_source": result.ir_source,
        "warnings": result.warnings,
        "files": {part: f"{part}.{suffix}" for part in result.images},
    }
    values_name = f"values.{_SUFFIXES.get(result.values_type, 'bin')}"
    if result.values:
        description["values"] = {"file": values_name, "media_type": result.values_type, "unit": result.values_unit}
    if result.alignment is not None:
        description["alignment"] = result.alignment.model_dump()
    if result.alarm is not None:
        description["alarm"] = result.alarm.model_dump()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for part in Part:
            if part in result.images:
                archive.writestr(f"{part}.{suffix}", result.images[part])
        if result.values:
            archive.writestr(values_name, result.values)
        archive.writestr("result.json", json.dumps(description, indent=2))
    return stream.getvalue()
