"""What a request of tensors comes to: a fusion request for each pair, and tensors again of their results."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from recofuse_rigs.rig import MAX_FILE_BYTES
from service.faces.gateway import FusionRequest
from service.faces.oip.tensors import (
    INPUTS,
    MAX_MESSAGE_CHARS,
    OUTPUTS,
    VALUES,
    InferRequest,
    Parameter,
    Tensor,
    join_elements,
    split_elements,
)
from service.terms.errors import InvalidInputError, PayloadTooLargeError
from service.terms.jobs import (
    FusionOptions,
    FusionResult,
    ImageFormat,
    Output,
    Part,
    PixelFormat,
    Priority,
    RawLayout,
)
from service.terms.records import problems_of
from service.terms.settings import LimitSettings
from service.watch.logs import request_id, traceparent

PRIORITIES = ("normal", "high", "normal", "low")  # by Triton's numbers: 0 is the default, 1 the most urgent


@dataclass(frozen=True, slots=True)
class _Images:
    """One input's images. is_batched: whether the tensor has a dimension for them. layout: None for files."""

    payloads: list[bytes]
    is_batched: bool
    layout: RawLayout | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request comes to. are_files: whether pictures are encoded files rather than pixels.

    are_values_files: likewise of the output VALUES.
    """

    requests: list[FusionRequest]
    outputs: tuple[str, ...]
    is_batched: bool
    are_files: bool
    are_values_files: bool = False


def plan_of(request: InferRequest, limits: LimitSettings) -> Plan:
    """Check a request, and make a fusion request of each pair.

    Files are not looked into, and sizes in pixels are left to the gateway. Raises InvalidInputError, and
    PayloadTooLargeError for too many pairs.
    """
    tensors: dict[str, Tensor] = {}
    for tensor in request.inputs:
        if tensor.name not in INPUTS:
            raise InvalidInputError(f"there is no input {tensor.name[:40]!r}; accepted are {' and '.join(INPUTS)}")
        if tensor.name in tensors:
            raise InvalidInputError(f"the input {tensor.name} is there more than once")
        tensors[tensor.name] = tensor
    if missing := [name for name in INPUTS if name not in tensors]:
        raise InvalidInputError(f"the input {' and '.join(missing)} is missing; vis and ir are required")
    vis, ir = (_images_of(tensors[name], limits) for name in INPUTS)
    if len(vis.payloads) != len(ir.payloads):
        raise InvalidInputError(f"vis holds {len(vis.payloads)} images and ir {len(ir.payloads)}; accepted are pairs")
    outputs = tuple(request.outputs or OUTPUTS)
    if VALUES in request.parameters and VALUES not in outputs:
        outputs += (VALUES,)
    options, priority, timeout_s, are_files = _options_of(request.parameters, outputs)
    rig = _rig_of(request.parameters)
    current, num_pairs = request_id.get(), len(vis.payloads)
    requests = [
        FusionRequest(
            vis=vis_bytes,
            ir=ir_bytes,
            options=options,
            priority=priority,
            timeout_s=timeout_s,
            request_id=current if num_pairs == 1 else f"{current}.{index}",
            traceparent=traceparent.get() or None,
            vis_layout=vis.layout,
            ir_layout=ir.layout,
            rig=rig,
        )
        for index, (vis_bytes, ir_bytes) in enumerate(zip(vis.payloads, ir.payloads, strict=True))
    ]
    are_values_files = are_files or options.values != "npy"
    return Plan(requests, outputs, vis.is_batched or ir.is_batched, are_files, are_values_files)


def _images_of(tensor: Tensor, limits: LimitSettings) -> _Images:
    name, datatype, shape = tensor.name, tensor.datatype, tensor.shape
    if datatype not in INPUTS[name]:
        raise InvalidInputError(f"{name}: datatype {datatype[:16]!r}; accepted are {', '.join(INPUTS[name])}")
    if min(shape, default=1) < 1:
        raise InvalidInputError(f"{name}: the shape {_shown(shape)} is empty; accepted is at least one image")
    if datatype == "BYTES":
        num_images, is_batched = math.prod(shape), bool(shape)
        _check_count(num_images, name, limits)
        return _Images(split_elements(tensor.data, num_images, name), is_batched, None)
    channels = 3 if name == "vis" else 1
    if channels == 1 and len(shape) == 2:
        shape = (*shape, 1)
    is_batched = len(shape) == 4
    if len(shape) not in (3, 4) or shape[-1] != channels:
        raise InvalidInputError(
            f"{name}: the shape {_shown(tensor.shape)}; accepted are [height, width, {channels}] "
            f"and [pairs, height, width, {channels}]"
        )
    num_images = shape[0] if is_batched else 1
    _check_count(num_images, name, limits)
    height, width = shape[-3:-1]
    kinds = {"UINT8": PixelFormat.RGB8 if name == "vis" else PixelFormat.MONO8, "UINT16": PixelFormat.MONO16}
    pixel_format = kinds[datatype]
    stride = width * pixel_format.bytes_per_pixel
    if num_images * height * stride != len(tensor.data):
        raise InvalidInputError(
            f"{name}: {datatype} {_shown(shape)} are {num_images * height * stride} bytes, not {len(tensor.data)}"
        )
    try:
        layout = RawLayout(pixel_format=pixel_format, width=width, height=height, stride=stride)
    except ValidationError as error:
        raise InvalidInputError(f"{name}: {problems_of(error)}") from error
    size = height * stride
    return _Images([bytes(tensor.data[at : at + size]) for at in range(0, len(tensor.data), size)], is_batched, layout)


def _shown(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape[:8]))}{', ...' if len(shape) > 8 else ''}]"


def _check_count(num_images: int, name: str, limits: LimitSettings) -> None:
    if num_images > limits.max_pairs:
        raise PayloadTooLargeError(f"{name}: {num_images} images; accepted are at most {limits.max_pairs} in a request")


def _options_of(
    parameters: Mapping[str, Parameter], outputs: Sequence[str]
) -> tuple[FusionOptions, Priority, float | None, bool]:
    """Options, priority, timeout in seconds, and whether files are wanted. Raises InvalidInputError."""
    plain = ("seed", "steps", "sampler", "exposure", "colour", "alarm", "outline", "metadata", "align")
    values: dict[str, Any] = {name: parameters[name] for name in plain if name in parameters}
    for name in ("vis_range", "ir_range", "colour_range", "degrees"):
        if name in parameters:
            values[name] = tuple(str(parameters[name]).split(","))
    values["format"] = parameters.get("format", ImageFormat.NPY)
    if VALUES in outputs:
        values["values"] = parameters.get(VALUES, "npy")
    pictures = [OUTPUTS[name] for name in outputs if name != VALUES] or [Part.IR]  # of which values are made
    values["output"] = Output(pictures[0].value) if len(pictures) == 1 else Output.ALL
    try:
        options = FusionOptions.model_validate(values)
    except ValidationError as error:
        raise InvalidInputError(problems_of(error)[:MAX_MESSAGE_CHARS]) from error
    priority = parameters.get("priority", 0)
    if isinstance(priority, int) and 0 <= priority < len(PRIORITIES):
        priority = PRIORITIES[priority]
    if priority not in list(Priority):
        raise InvalidInputError(f"priority: accepted are {', '.join(Priority)}, or 1 (high) to {len(PRIORITIES) - 1}")
    timeouts_s = []
    for name, unit_s in (("timeout", 1e-6), ("timeout_ms", 1e-3)):
        value = parameters.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 10**15:
            raise InvalidInputError(f"{name}: accepted are whole numbers above 0; timeout is in µs, timeout_ms in ms")
        timeouts_s.append(value * unit_s)
    return options, Priority(priority), min(timeouts_s, default=None), "format" in parameters


def _rig_of(parameters: Mapping[str, Parameter]) -> str:
    """What `rig` asks for; the gateway judges it, which knows the sizes.

    Raises InvalidInputError for what is no text, and PayloadTooLargeError.
    """
    rig = parameters.get("rig", "")
    if not isinstance(rig, str):
        raise InvalidInputError("rig: accepted are a name, a rig file's content, or nine numbers as text")
    if len(rig) > MAX_FILE_BYTES:
        raise PayloadTooLargeError(f"rig: {len(rig)} characters; accepted are at most {MAX_FILE_BYTES}")
    return rig


# results to tensors


def tensors_of(results: Sequence[FusionResult], plan: Plan) -> tuple[Tensor, ...]:
    """The wanted outputs, each with a dimension for the pairs if an input had one."""
    tensors = []
    for name in plan.outputs:
        is_values = name == VALUES
        contents = [result.values if is_values else result.images[OUTPUTS[name]] for result in results]
        if plan.are_values_files if is_values else plan.are_files:
            shape = (len(contents),) if plan.is_batched else ()
            tensors.append(Tensor(name, "BYTES", shape, join_elements(contents)))
            continue
        arrays = [np.load(io.BytesIO(content), allow_pickle=False) for content in contents]
        height, width = arrays[0].shape[:2]
        channels = 1 if arrays[0].ndim == 2 else 3
        batch = (len(arrays),) if plan.is_batched else ()
        datatype, kind = ("FP32", "<f4") if is_values else ("UINT8", "u1")
        data = b"".join(pixels.astype(kind, copy=False).tobytes() for pixels in arrays)
        tensors.append(Tensor(name, datatype, (*batch, height, width, channels), data))
    return tuple(tensors)


def told_of(results: Sequence[FusionResult]) -> dict[str, str]:
    """What an answer's parameters tell of each pair: how infrared was read and lies, what looks wrong, what is hot."""
    told = {}
    if any(result.ir_source for result in results):
        told["infrared_source"] = ",".join(result.ir_source for result in results)
    lines = [
        f"pair {index}: {warning}" if len(results) > 1 else warning
        for index, result in enumerate(results)
        for warning in result.warnings
    ]
    if lines:
        told["warnings"] = "\n".join(lines)
    if any(result.values_unit is not None for result in results):
        told["values_unit"] = ",".join(result.values_unit or "" for result in results)
    if any(result.alarm is not None for result in results):
        alarms = [None if result.alarm is None else result.alarm.model_dump() for result in results]
        told["alarms"] = json.dumps(alarms)
    if any(result.alignment is not None for result in results):
        alignments = [None if result.alignment is None else result.alignment.model_dump() for result in results]
        told["alignments"] = json.dumps(alignments)
    return told
