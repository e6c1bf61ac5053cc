"""The Open Inference Protocol v2 (KServe, Triton) apart from HTTP and gRPC: its tensors, documents and statistics.

A request's tensors become fusion requests, one for each pair, and their results become tensors again; `oip_http.py` and
`oip_grpc.py` read and write the messages. docs/oip.md tells users which tensors and parameters there are.

What a newcomer would get wrong: a tensor's shape, sizes and lengths are claims of a stranger. Nothing is sliced or
allocated by them before they have been checked against the bytes that are really there.
"""

from __future__ import annotations

import array
import asyncio
import base64
import binascii
import io
import itertools
import math
import re
import struct
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUseDefault, to_json

from service.access.guard import charge
from service.faces.gateway import FusionRequest, Gateway, Readiness
from service.terms import images
from service.terms.errors import (
    InvalidInputError,
    MalformedRequestError,
    ModelNotFoundError,
    PayloadTooLargeError,
    ServiceError,
    error_of,
)
from service.terms.jobs import (
    FusionOptions,
    FusionResult,
    ImageFormat,
    Output,
    Part,
    PixelFormat,
    Priority,
    RawLayout,
    Stage,
    WorkerInfo,
    problems_of,
)
from service.terms.settings import LimitSettings, Settings
from service.watch.logs import request_id, traceparent

MODEL = "recofuse"  # whichever model is served; its own name is accepted as well
INPUTS: dict[str, tuple[str, ...]] = {"vis": ("UINT8", "BYTES"), "ir": ("UINT8", "UINT16", "BYTES")}  # and datatypes
OUTPUTS: dict[str, Part] = {"fused": Part.FUSED, "vis_restored": Part.VIS, "ir_restored": Part.IR}
PARAMETERS = ("seed", "steps", "sampler", "vis_range", "ir_range", "format", "priority", "timeout", "timeout_ms")
PRIORITIES = ("normal", "high", "normal", "low")  # by Triton's numbers: 0 is the default, 1 the most urgent
EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics")
MAX_MESSAGE_CHARS = 1000
MAX_NAME_CHARS = 64
MAX_ID_CHARS = 256
MAX_DIMENSIONS = 8

_CODES = {"UINT8": "B", "UINT16": "H"}  # of `array`
_HEADER_LENGTH = re.compile(r"[0-9]{1,12}")

Parameter = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Tensor:
    """data: the elements as they lie in binary data: little endian, those of BYTES each after its length (4 bytes)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class InferRequest:
    """outputs: the wanted ones and whether each is wanted as binary data; empty asks for all of them."""

    inputs: tuple[Tensor, ...]
    outputs: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    id: str = ""
    is_binary: bool = True  # what `outputs` does not mention


@dataclass(frozen=True, slots=True)
class InferAnswer:
    """model_name, model_version: of the model that made the first pair's pictures.

    parameters: infrared_source and warnings, as docs/oip.md has them; empty if there is nothing to tell.
    """

    model_name: str
    model_version: str
    id: str
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)


# bytes


def split_body(body: bytes, header_length: str | None, limits: LimitSettings) -> InferRequest:
    """The request in an HTTP body: JSON, and after it the tensors that are sent as binary data.

    header_length: the header Inference-Header-Content-Length; None: all of the body is JSON. Raises
    MalformedRequestError, InvalidInputError and PayloadTooLargeError (the JSON).
    """
    num_json = len(body)
    if header_length is not None:
        if not _HEADER_LENGTH.fullmatch(header_length) or int(header_length) > len(body):
            raise MalformedRequestError(
                f"Inference-Header-Content-Length must be the number of bytes of the JSON, at most {len(body)} here"
            )
        num_json = int(header_length)
    if num_json > limits.max_json_bytes:
        raise PayloadTooLargeError(
            f"the JSON has {num_json} bytes; at most {limits.max_json_bytes} are accepted: send tensors as binary data"
        )
    document = _read_document(body[:num_json])
    rest, at, inputs = memoryview(body)[num_json:], 0, []
    for entry in document.inputs:
        size = entry.parameters.get("binary_data_size")
        refuse_shared_memory(entry.name, entry.parameters)
        if size is None:
            data: bytes | memoryview = _packed(entry)
        else:
            if entry.data is not None:
                raise InvalidInputError(f"{entry.name}: accepted is either data or binary_data_size, not both")
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest) - at:
                raise InvalidInputError(
                    f"{entry.name}: binary_data_size must be the tensor's number of bytes; {len(rest) - at} are there"
                )
            data, at = rest[at : at + size], at + size
        inputs.append(Tensor(entry.name, entry.datatype, tuple(entry.shape), data))
    if at != len(rest):
        raise InvalidInputError(f"{len(rest) - at} bytes after the JSON belong to no tensor")
    parameters = parameters_of(document.parameters)
    is_binary = parameters.pop("binary_data_output", False) is True
    outputs: dict[str, bool] = {}
    for wanted in document.outputs:
        add_output(outputs, wanted.name, wanted.parameters, wanted.parameters.get("binary_data", is_binary) is True)
    return InferRequest(tuple(inputs), outputs, parameters, document.id, is_binary)


def join_body(document: Mapping[str, Any], blobs: Iterable[bytes | memoryview]) -> tuple[bytes, int]:
    """A document and the tensors after it, as `split_body` reads them; also the number of bytes of the JSON."""
    header = to_json(document)
    return b"".join((header, *blobs)), len(header)


def answer_body(answer: InferAnswer, request: InferRequest) -> tuple[bytes, int | None]:
    """An answer as HTTP body; also the number of bytes of its JSON, None if there is nothing else."""
    entries, blobs = [], []
    for tensor in answer.outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if request.outputs.get(tensor.name, request.is_binary):
            entry["parameters"] = {"binary_data_size": len(tensor.data)}
            blobs.append(tensor.data)
        elif tensor.datatype == "BYTES":
            files = split_elements(tensor.data, math.prod(tensor.shape), tensor.name)
            entry["data"] = [base64.b64encode(content).decode() for content in files]
        else:
            entry["data"] = np.frombuffer(tensor.data, np.uint8).tolist()
        entries.append(entry)
    document: dict[str, Any] = {"model_name": answer.model_name, "model_version": answer.model_version}
    if answer.id:
        document["id"] = answer.id
    if answer.parameters:
        document["parameters"] = dict(answer.parameters)
    body, num_json = join_body({**document, "outputs": entries}, blobs)
    return body, num_json if blobs else None


def split_elements(data: bytes | memoryview, count: int, name: str) -> list[bytes]:
    """The elements of a BYTES tensor. Raises InvalidInputError if there are not exactly so many."""
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) < count:
        start = at + 4
        length = struct.unpack_from("<I", data, at)[0] if start <= len(data) else len(data)
        if length > len(data) - start:
            raise InvalidInputError(f"{name}: element {len(elements)} is cut short; each comes after its length")
        at = start + length
        elements.append(bytes(data[start:at]))
    if len(elements) != count or at != len(data):
        raise InvalidInputError(f"{name}: the shape says {count} elements, and the data hold another number of them")
    return elements


def join_elements(elements: Iterable[bytes]) -> bytes:
    """The data of a BYTES tensor; what `split_elements` takes apart."""
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


def join_numbers(values: Sequence[Any], datatype: str, name: str) -> bytes:
    """The data of a tensor of numbers. Raises InvalidInputError for other values and other datatypes."""
    if datatype not in _CODES:
        raise InvalidInputError(f"{name}: datatype {datatype[:16]!r}; accepted are {', '.join(_CODES)} and BYTES")
    try:
        packed = array.array(_CODES[datatype], values)
    except (TypeError, OverflowError, ValueError) as error:
        raise InvalidInputError(f"{name}: the data hold a value that {datatype} cannot") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def parameters_of(given: Mapping[str, Any]) -> dict[str, Parameter]:
    """A request's parameters. Raises InvalidInputError for unknown ones and for values that are no scalars."""
    known = (*PARAMETERS, "binary_data_output")
    for name, value in given.items():
        if name not in known:
            accepted = ", ".join(PARAMETERS)
            raise InvalidInputError(f"there is no parameter {name[:40]!r}; accepted are {accepted}")
        if not isinstance(value, Parameter) or (isinstance(value, float) and not math.isfinite(value)):
            raise InvalidInputError(f"the parameter {name} must be a finite number, a string or a boolean")
    return dict(given)


def add_output(outputs: dict[str, bool], name: str, parameters: Mapping[str, Any], is_binary: bool) -> None:
    """Note a wanted output. Raises InvalidInputError."""
    if name not in OUTPUTS:
        raise InvalidInputError(f"there is no output {name[:40]!r}; accepted are {', '.join(OUTPUTS)}")
    if name in outputs:
        raise InvalidInputError(f"the output {name} is asked for more than once")
    if "classification" in parameters:
        raise InvalidInputError(f"{name}: pictures have no classification")
    refuse_shared_memory(name, parameters)
    outputs[name] = is_binary


def refuse_shared_memory(name: str, parameters: Mapping[str, Any]) -> None:
    """Raises InvalidInputError if a tensor is said to lie in memory of this host."""
    if any(key.startswith("shared_memory") for key in parameters):
        raise InvalidInputError(f"{name}: shared memory is not offered; send and receive tensors in the messages")


def _unless_null(value: object) -> object:
    if value is None:
        raise PydanticUseDefault
    return value


def _without_nulls(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


_Optional = BeforeValidator(_unless_null)  # a member that is null is absent, as many writers of JSON have it
_Parameters = Annotated[dict[str, Any], _Optional, AfterValidator(_without_nulls)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _InputDocument(_Document):
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)]
    datatype: Annotated[str, Field(max_length=16)]
    shape: Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]], Field(max_length=MAX_DIMENSIONS)]
    parameters: _Parameters = {}
    data: list[Any] | None = None


class _OutputDocument(_Document):
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)]
    parameters: _Parameters = {}


class _RequestDocument(_Document):
    id: Annotated[str, _Optional, Field(max_length=MAX_ID_CHARS)] = ""
    parameters: _Parameters = {}
    inputs: Annotated[list[_InputDocument], Field(max_length=8)]
    outputs: Annotated[list[_OutputDocument], _Optional, Field(max_length=8)] = []


def _read_document(text: bytes) -> _RequestDocument:
    try:
        return _RequestDocument.model_validate_json(text)
    except ValidationError as error:
        if any(problem["type"] == "json_invalid" for problem in error.errors(include_input=False)):
            raise MalformedRequestError("the request's JSON cannot be read") from error
        raise InvalidInputError(problems_of(error)[:MAX_MESSAGE_CHARS]) from error


def _packed(entry: _InputDocument) -> bytes:
    """The data of a tensor that is written in JSON, nested or flat. Files, which are not text, come as base64."""
    if entry.data is None:
        raise InvalidInputError(f"{entry.name}: the tensor has neither data nor binary_data_size")
    flat: list[Any] = entry.data
    while flat and isinstance(flat[0], list):
        if not all(isinstance(row, list) for row in flat):
            raise InvalidInputError(f"{entry.name}: the data are nested unevenly")
        flat = list(itertools.chain.from_iterable(flat))
    if entry.datatype != "BYTES":
        return join_numbers(flat, entry.datatype, entry.name)
    if not all(isinstance(element, str) for element in flat):
        raise InvalidInputError(f"{entry.name}: the elements of BYTES are strings, files in base64")
    try:
        return join_elements(base64.b64decode(element, validate=True) for element in flat)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(f"{entry.name}: an element is not base64; send files so, or as binary data") from error


# tensors to requests


@dataclass(frozen=True, slots=True)
class _Images:
    """One input's images. is_batched: whether the tensor has a dimension for them. layout: None for files."""

    payloads: list[bytes]
    is_batched: bool
    layout: RawLayout | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a request comes to. are_files: whether the outputs are encoded files rather than pixels."""

    requests: list[FusionRequest]
    outputs: tuple[str, ...]
    is_batched: bool
    are_files: bool


def plan_of(request: InferRequest, limits: LimitSettings) -> _Plan:
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
    options, priority, timeout_s, are_files = _options_of(request.parameters, outputs)
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
        )
        for index, (vis_bytes, ir_bytes) in enumerate(zip(vis.payloads, ir.payloads, strict=True))
    ]
    return _Plan(requests, outputs, vis.is_batched or ir.is_batched, are_files)


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
    values: dict[str, Any] = {name: parameters[name] for name in ("seed", "steps", "sampler") if name in parameters}
    for name in ("vis_range", "ir_range"):
        if name in parameters:
            values[name] = tuple(str(parameters[name]).split(","))
    values["format"] = parameters.get("format", ImageFormat.NPY)
    values["output"] = Output(OUTPUTS[outputs[0]].value) if len(outputs) == 1 else Output.ALL
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


# results to tensors


def _tensors_of(results: Sequence[FusionResult], plan: _Plan) -> tuple[Tensor, ...]:
    """The wanted outputs, each with a dimension for the pairs if an input had one."""
    tensors = []
    for name in plan.outputs:
        contents = [result.images[OUTPUTS[name]] for result in results]
        if plan.are_files:
            shape = (len(contents),) if plan.is_batched else ()
            tensors.append(Tensor(name, "BYTES", shape, join_elements(contents)))
            continue
        arrays = [np.load(io.BytesIO(content), allow_pickle=False) for content in contents]
        height, width = arrays[0].shape[:2]
        channels = 1 if arrays[0].ndim == 2 else 3
        batch = (len(arrays),) if plan.is_batched else ()
        data = b"".join(pixels.tobytes() for pixels in arrays)
        tensors.append(Tensor(name, "UINT8", (*batch, height, width, channels), data))
    return tuple(tensors)


def _told_of(results: Sequence[FusionResult]) -> dict[str, str]:
    """What was read of each pair's infrared file, and what looks wrong with them, as the answer's parameters."""
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
    return told


# the service


class _Durations:
    """A count, and the sum of nanoseconds."""

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self.ns += round(seconds * 1e9)


class _Statistics:
    """What Triton's statistics extension reports, of this front end's requests by this protocol."""

    STAGES: Mapping[str, tuple[Stage, ...]] = {
        "queue": (Stage.QUEUE, Stage.BATCH),
        "compute_input": (Stage.DECODE,),
        "compute_infer": (Stage.MODEL,),
        "compute_output": (Stage.ENCODE,),
    }

    def __init__(self) -> None:
        self._durations = {name: _Durations() for name in ("success", "fail", *self.STAGES)}
        self._last_s = 0.0
        self._num_pairs = 0
        self._num_passes = 0.0

    def succeeded(self, results: Sequence[FusionResult], seconds: float) -> None:
        """Count an answered request."""
        self._durations["success"].add(seconds)
        self._last_s = time.time()
        for result in results:
            self._num_pairs += 1
            self._num_passes += 1 / max(result.batch_size, 1)
        for name, stages in self.STAGES.items():  # of the slowest pair: they go side by side
            self._durations[name].add(
                max(sum(result.timings_s.get(stage, 0.0) for stage in stages) for result in results)
            )

    def failed(self, seconds: float) -> None:
        """Count a refused one."""
        self._durations["fail"].add(seconds)

    def document(self) -> dict[str, Any]:
        """As the extension has it."""
        durations = {name: {"count": value.count, "ns": value.ns} for name, value in self._durations.items()}
        nothing = {"count": 0, "ns": 0}
        return {
            "last_inference": round(self._last_s * 1000),
            "inference_count": self._num_pairs,
            "execution_count": round(self._num_passes),
            "inference_stats": {**durations, "cache_hit": nothing, "cache_miss": nothing},
        }


class Inference:
    """The protocol's calls, for both faces. Documents are the protocol's JSON, and fit its gRPC messages."""

    def __init__(self, gateway: Gateway, settings: Settings, version: str) -> None:
        self._gateway = gateway
        self._settings = settings
        self._version = version
        self._statistics = _Statistics()

    async def infer(self, name: str, version: str, request: InferRequest, *, remaining_s: float | None) -> InferAnswer:
        """Fuse every pair of a request, side by side. remaining_s: until the call's own deadline, None for none.

        If one pair fails, the others are cancelled and its error is raised. Raises ServiceError.
        """
        started_s = time.monotonic()
        try:
            if name != MODEL or version:
                await self._workers(name, version)
            plan = plan_of(request, self._settings.limits)
            timeout_s = self._gateway.timeout_within(plan.requests[0].timeout_s, remaining_s)
            await asyncio.to_thread(self._check_answer, request, plan)
            for _ in plan.requests[1:]:  # the first was charged when the request came
                await charge()
            results = await self._fuse_all(plan.requests, timeout_s)
        except ServiceError:
            self._statistics.failed(time.monotonic() - started_s)
            raise
        outputs = await asyncio.to_thread(_tensors_of, results, plan)
        self._statistics.succeeded(results, time.monotonic() - started_s)
        return InferAnswer(results[0].model_name, results[0].model_version, request.id, outputs, _told_of(results))

    async def readiness(self) -> Readiness:
        """Whether the server should be sent requests."""
        return await self._gateway.readiness()

    async def model_readiness(self, name: str, version: str) -> Readiness:
        """Whether the model should be sent requests. Raises ModelNotFoundError."""
        await self._workers(name, version)
        return await self._gateway.readiness()

    async def is_model_ready(self, name: str, version: str) -> bool:
        """The same as yes or no; a model that is not there is not ready."""
        try:
            return (await self.model_readiness(name, version)).is_ready
        except ModelNotFoundError:
            return False

    def server_metadata(self) -> dict[str, Any]:
        """Name, version and extensions."""
        return {"name": MODEL, "version": self._version, "extensions": list(EXTENSIONS)}

    async def model_metadata(self, name: str, version: str) -> dict[str, Any]:
        """The model's tensors; -1 stands for any size. Raises ModelNotFoundError."""
        workers = await self._workers(name, version)
        return {
            "name": name,
            "versions": sorted({worker.model_version for worker in workers}),
            "platform": MODEL,
            "inputs": [
                {"name": "vis", "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
                {"name": "ir", "datatype": "UINT8", "shape": [-1, -1, -1, 1]},
            ],
            "outputs": [
                {"name": output, "datatype": "UINT8", "shape": [-1, -1, -1, 1 if part is Part.IR else 3]}
                for output, part in OUTPUTS.items()
            ],
        }

    async def model_config(self, name: str, version: str) -> dict[str, Any]:
        """The model's configuration as Triton describes it. Raises ModelNotFoundError."""
        workers = await self._workers(name, version)
        texts = {f"datatypes_{tensor}": ",".join(datatypes) for tensor, datatypes in INPUTS.items()}
        if workers:
            texts |= {"default_steps": str(workers[0].default_steps), "default_sampler": workers[0].default_sampler}
        return {
            "name": name,
            "platform": MODEL,
            "backend": MODEL,
            "max_batch_size": self._settings.limits.max_pairs,
            "input": [
                {"name": "vis", "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": [-1, -1, 3]},
                {"name": "ir", "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": [-1, -1, 1]},
            ],
            "output": [
                {"name": output, "data_type": "TYPE_UINT8", "dims": [-1, -1, 1 if part is Part.IR else 3]}
                for output, part in OUTPUTS.items()
            ],
            "parameters": {key: {"string_value": text} for key, text in texts.items()},
        }

    async def model_statistics(self, name: str, version: str) -> dict[str, Any]:
        """What this front end has answered by this protocol, under any name. Raises ModelNotFoundError."""
        workers = await self._workers(name or MODEL, version)
        versions = {worker.model_version for worker in workers}
        shown = version or (versions.pop() if len(versions) == 1 else "")
        return {"model_stats": [{"name": name or MODEL, "version": shown, **self._statistics.document()}]}

    async def _workers(self, name: str, version: str) -> list[WorkerInfo]:
        """The workers that serve a model. Raises ModelNotFoundError; `recofuse` is there without any worker."""
        there = await self._gateway.workers()
        named = [worker for worker in there if name in (MODEL, worker.model_name)]
        if not named and name != MODEL:
            names = ", ".join(dict.fromkeys((MODEL, *(worker.model_name for worker in there))))
            raise ModelNotFoundError(f"there is no model {name[:64]!r}; there are {names}")
        found = [worker for worker in named if version in ("", worker.model_version)]
        if version and not found:
            versions = ", ".join(sorted({worker.model_version for worker in named})) or "none"
            raise ModelNotFoundError(f"{name} is not there in version {version[:64]!r}; there is {versions}")
        return found

    def _check_answer(self, request: InferRequest, plan: _Plan) -> None:
        """Whether the pictures will fit one tensor, and JSON where that is asked for; before any work is done."""
        as_json = [name for name in plan.outputs if not request.outputs.get(name, request.is_binary)]
        if plan.are_files or (len(plan.requests) == 1 and not as_json):
            return
        sizes = []
        for index, pair in enumerate(plan.requests):
            try:
                sizes.append(images.size_of(pair.vis, "vis", pair.vis_layout, self._settings.limits))
            except ServiceError as error:
                if len(plan.requests) == 1:
                    raise
                raise _numbered(error, index) from error
        if len(set(sizes)) > 1:
            shown = " and ".join(f"{width}x{height}" for width, height in sorted(set(sizes))[:2])
            raise InvalidInputError(
                f"vis holds images of {shown}, which are no tensor together; send them one by one, or name a format"
            )
        width, height = sizes[0]
        num_values = sum(1 if OUTPUTS[name] is Part.IR else 3 for name in as_json) * width * height * len(sizes)
        if 4 * num_values > self._settings.limits.max_json_bytes:  # three digits and a comma at most
            raise PayloadTooLargeError(
                f"{num_values} values are too many for JSON; ask for binary_data, or for one output, or name a format"
            )

    async def _fuse_all(self, requests: Sequence[FusionRequest], timeout_s: float | None) -> list[FusionResult]:
        tasks = [asyncio.create_task(self._gateway.fuse(_within(request, timeout_s))) for request in requests]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for index, task in enumerate(tasks):
                if len(tasks) > 1 and task.done() and isinstance(error := task.exception(), ServiceError):
                    raise _numbered(error, index) from error
            return [await task for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _within(request: FusionRequest, timeout_s: float | None) -> FusionRequest:
    return replace(request, timeout_s=timeout_s)


def _numbered(error: ServiceError, index: int) -> ServiceError:
    """The error of one pair, told apart from its neighbours'."""
    numbered = error_of(error.code, f"pair {index}: {error.message}")
    numbered.retry_after_s = error.retry_after_s
    return numbered
