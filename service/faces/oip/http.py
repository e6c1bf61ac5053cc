"""The Open Inference Protocol's HTTP routes, below /v2. What they mean stands in `inference.py`.

Errors are the same problem documents as everywhere; `problem` adds the member `error` that this protocol asks for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any, get_args

from fastapi import FastAPI, Header, Path, Request, Response
from fastapi.responses import JSONResponse

from service.faces.gateway import Readiness
from service.faces.http.bodies import read_body
from service.faces.http.forms import OPTION_FIELDS
from service.faces.http.hangup import CLIENT_CLOSED, unless_hung_up
from service.faces.http.problems import problems
from service.faces.oip.bodies import answer_body, split_body
from service.faces.oip.inference import Inference
from service.faces.oip.tensors import INPUTS, OUTPUTS, PARAMETERS, VALUES, InferAnswer, InferRequest
from service.terms.errors import ErrorCode, UnavailableError
from service.terms.jobs import Colour, Exposure
from service.terms.settings import LimitSettings, Settings

HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"
MAX_READ_AT_ONCE = 64 * 1024  # bytes of JSON

_OPTIONS = frozenset((*PARAMETERS, *OPTION_FIELDS))  # what a caller may try to say in the query string

Name = Annotated[str, Path(max_length=128, description="recofuse, or the model's own name", examples=["recofuse"])]
Version = Annotated[str, Path(max_length=128, description="the model's version")]
Length = Annotated[str | None, Header(alias=HEADER_LENGTH, description="bytes of the JSON, if tensors follow it")]

_PARAMETERS: dict[str, Any] = {"type": ["object", "null"], "additionalProperties": True}
_SHAPE: dict[str, Any] = {
    "type": "array",
    "maxItems": 8,
    "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
}
_REQUEST: dict[str, Any] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": ["string", "null"], "maxLength": 256},
        "parameters": {
            "type": ["object", "null"],
            "description": f"{', '.join(PARAMETERS)}; binary_data_output: every output as binary data",
            "properties": {
                "seed": {"type": ["integer", "null"]},
                "steps": {"type": ["integer", "null"]},
                "sampler": {"type": ["string", "null"]},
                "exposure": {"type": ["string", "null"], "enum": [*get_args(Exposure), None]},
                "colour": {"type": ["string", "null"], "enum": [*get_args(Colour), None]},
            },
        },
        "inputs": {
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"type": "string", "enum": list(INPUTS)},
                    "datatype": {"type": "string", "enum": ["UINT8", "UINT16", "BYTES"]},
                    "shape": _SHAPE,
                    "parameters": {**_PARAMETERS, "description": "binary_data_size: bytes of it after the JSON"},
                    "data": {
                        "type": ["array", "null"],
                        "description": "the elements in row-major order; files as base64",
                    },
                },
            },
        },
        "outputs": {
            "type": ["array", "null"],
            "description": "default: all pictures",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "enum": [*OUTPUTS, VALUES]},
                    "parameters": {**_PARAMETERS, "description": "binary_data: as binary data after the JSON"},
                },
            },
        },
    },
}
_ANSWER: dict[str, Any] = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        **{name: {"type": "string"} for name in ("model_name", "model_version", "id")},
        "parameters": {
            "type": "object",
            "properties": {
                "infrared_source": {"type": "string", "description": "of each pair: raw, palette or grey, with commas"},
                "warnings": {"type": "string", "description": "lines about what looks wrong; absent if nothing does"},
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"type": "string", "enum": [*OUTPUTS, VALUES]},
                    "datatype": {"type": "string", "enum": ["UINT8", "FP32", "BYTES"]},
                    "shape": _SHAPE,
                    "parameters": _PARAMETERS,
                    "data": {"type": "array"},
                },
            },
        },
    },
}
_ANY: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {"schema": {"type": "object"}}}}}
_MISSING = problems(ErrorCode.MODEL_NOT_FOUND, ErrorCode.UNAVAILABLE, ErrorCode.INVALID_INPUT)
_INFER_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": f"the outputs; with binary data, {HEADER_LENGTH} tells the bytes of the JSON before it",
        "content": {
            "application/json": {"schema": _ANSWER},
            BINARY: {"schema": {"type": "string", "format": "binary"}},
        },
        "headers": {HEADER_LENGTH: {"schema": {"type": "integer"}}},
    },
    **problems(
        ErrorCode.MALFORMED_REQUEST,
        ErrorCode.MODEL_NOT_FOUND,
        ErrorCode.CANCELLED,
        ErrorCode.PAYLOAD_TOO_LARGE,
        ErrorCode.UNSUPPORTED_MEDIA,
        ErrorCode.INVALID_INPUT,
        ErrorCode.OVERLOADED,
        ErrorCode.UNAVAILABLE,
        ErrorCode.TIMED_OUT,
    ),
}
_INFER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _REQUEST},
            BINARY: {"schema": {"type": "string", "format": "binary", "description": "JSON, then binary data"}},
        },
    }
}


def add_inference(app: FastAPI, inference: Inference, settings: Settings) -> None:
    """Add the protocol's routes to an application."""

    @app.get("/v2", summary="Inference protocol: the server", responses={**_ANY, **problems()})
    async def server() -> JSONResponse:
        return JSONResponse(inference.server_metadata())

    @app.get("/v2/health/live", summary="Inference protocol: whether the process answers", responses=_ANY)
    async def live() -> JSONResponse:
        return JSONResponse({"live": True})

    @app.get(
        "/v2/health/ready",
        summary="Inference protocol: whether new work is welcome",
        responses={**_ANY, **problems(ErrorCode.UNAVAILABLE)},
    )
    async def ready() -> JSONResponse:
        return JSONResponse(_ready(await inference.readiness()))

    @app.get("/v2/models/stats", summary="Inference protocol: statistics", responses={**_ANY, **_MISSING})
    async def statistics() -> JSONResponse:
        return JSONResponse(await inference.model_statistics("", ""))

    async def model_ready(name: str, version: str) -> dict[str, Any]:
        return _ready(await inference.model_readiness(name, version))

    _add_document(app, "", "a model's tensors", inference.model_metadata)
    _add_document(app, "/ready", "whether a model is ready", model_ready)
    _add_document(app, "/config", "a model's configuration", inference.model_config)
    _add_document(app, "/stats", "a model's statistics", inference.model_statistics)
    _add_infer(app, inference, settings)


def _add_document(
    app: FastAPI, suffix: str, what: str, document_of: Callable[[str, str], Awaitable[dict[str, Any]]]
) -> None:
    """A document about a model, at an address without its version and at one with it."""

    async def of_any(model_name: Name) -> JSONResponse:
        return JSONResponse(await document_of(model_name, ""))

    async def of_version(model_name: Name, model_version: Version) -> JSONResponse:
        return JSONResponse(await document_of(model_name, model_version))

    about: dict[str, Any] = {"summary": f"Inference protocol: {what}", "responses": {**_ANY, **_MISSING}}
    app.get(f"/v2/models/{{model_name}}{suffix}", **about)(of_any)
    app.get(f"/v2/models/{{model_name}}/versions/{{model_version}}{suffix}", **about)(of_version)


class _Bodies:
    """Reads and writes bodies: little JSON at once, much of it one body after the other in one thread.

    Numbers in JSON take many times its size as objects. Several threads would multiply that, and would each keep memory
    of their own for it.
    """

    def __init__(self, limits: LimitSettings) -> None:
        self._limits = limits
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference-json")

    async def read(self, body: bytes, header_length: str | None) -> InferRequest:
        """See `split_body`."""
        announced = header_length or ""
        num_json = int(announced) if announced.isdecimal() and len(announced) <= 12 else len(body)
        if num_json <= MAX_READ_AT_ONCE:
            return split_body(body, header_length, self._limits)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, split_body, body, header_length, self._limits)

    async def write(self, answer: InferAnswer, request: InferRequest) -> tuple[bytes, int | None]:
        """See `answer_body`."""
        if all(request.outputs.get(tensor.name, request.is_binary) for tensor in answer.outputs):
            return await asyncio.to_thread(answer_body, answer, request)
        return await asyncio.get_running_loop().run_in_executor(self._thread, answer_body, answer, request)


def _add_infer(app: FastAPI, inference: Inference, settings: Settings) -> None:
    bodies = _Bodies(settings.limits)

    async def infer(request: Request, name: str, version: str, header_length: str | None) -> Response:
        with inference.holding() as holding:
            body = await read_body(request, settings, holding, _OPTIONS)
            wanted = await bodies.read(body, header_length)
            inferring = inference.infer(name, version, wanted, remaining_s=None)
            wanted = replace(wanted, inputs=())  # nothing that the work has no use for is kept while it lasts
            del body
            answer = await unless_hung_up(request, inferring)
        if answer is None:
            return Response(status_code=CLIENT_CLOSED)
        content, num_json = await bodies.write(answer, wanted)
        if num_json is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type=BINARY, headers={HEADER_LENGTH: str(num_json)})

    about: dict[str, Any] = {"response_class": Response, "responses": _INFER_RESPONSES, "openapi_extra": _INFER_BODY}

    @app.post("/v2/models/{model_name}/infer", summary="Inference protocol: fuse pairs", **about)
    async def infer_any(request: Request, model_name: Name, header_length: Length = None) -> Response:
        return await infer(request, model_name, "", header_length)

    @app.post(
        "/v2/models/{model_name}/versions/{model_version}/infer", summary="Inference protocol: fuse pairs", **about
    )
    async def infer_version(
        request: Request, model_name: Name, model_version: Version, header_length: Length = None
    ) -> Response:
        return await infer(request, model_name, model_version, header_length)


def _ready(readiness: Readiness) -> dict[str, Any]:
    if not readiness.is_ready:
        raise UnavailableError(readiness.reason, retry_after_s=1.0)
    return {"ready": True}
