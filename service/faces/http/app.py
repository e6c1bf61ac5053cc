"""The HTTP face: FastAPI routes that turn requests into gateway calls. Nothing here blocks the event loop.

Errors: routes neither catch nor map; `_Envelope` and the handlers below turn every failure, also an unknown address,
into an RFC 9457 problem document with the statuses of `service.terms.errors.STATUS`.

Uploads are parsed while they arrive, and counted: a body that is too large is refused at the byte that is too many.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import logging
import re
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import parse_qsl, quote

from fastapi import FastAPI, Header, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access import keys
from service.access.guard import Guard
from service.faces.gateway import FusionRequest, Gateway
from service.faces.http import playground
from service.terms.errors import (
    INTERNAL_MESSAGE,
    STATUS,
    TITLE,
    ErrorCode,
    InternalError,
    InvalidInputError,
    MalformedRequestError,
    MethodNotAllowedError,
    OverloadedError,
    PayloadTooLargeError,
    RouteNotFoundError,
    ServiceError,
    TimedOutError,
    UnsupportedMediaError,
)
from service.terms.jobs import (
    MAX_WARNINGS,
    FusionOptions,
    FusionResult,
    ImageFormat,
    IrSource,
    JobStatus,
    JobView,
    Output,
    Part,
    Priority,
    problems_of,
)
from service.terms.settings import HttpSettings, Settings
from service.watch.logs import accepted_id, request_id, traceparent
from service.watch.metrics import Metrics
from service.watch.tracing import NO_TRACES, Tracer

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

PROBLEM_TYPE = "application/problem+json"
CLIENT_CLOSED = 499  # nobody hears it; it only tells the metrics what became of the request
MAX_OPTION_BYTES = 1024
MAX_DISCARD_BYTES = 16 << 20  # of a refused body
DISCARD_S = 2.0
PIECE_BYTES = 512 * 1024  # of an answer
MAX_WARNING_BYTES = 400  # of a header line, percent-encoded
OPTION_FIELDS = ("output", "format", "steps", "sampler", "seed", "vis_range", "ir_range", "priority", "timeout_ms")
IMAGE_FIELDS = ("vis", "ir")

# What needs no key: pages, probes, and metrics, which a reverse proxy keeps to itself (deploy/nginx).
PUBLIC_PATHS = frozenset({"/", "/docs", "/openapi.json", "/metrics", "/v2"})
PUBLIC_PREFIXES = ("/health/", "/v2/health/", "/playground/")

_SECURE = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY")]
_PAGE_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
_DATA_POLICY = b"default-src 'none'; frame-ancestors 'none'"
_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "PUT", "PATCH", "OPTIONS"})


class Problem(BaseModel):
    """An error, as RFC 9457 has it; `code` is what programs should branch on.

    error: the detail once more, below /v2 only, where the Open Inference Protocol's clients look for it.
    """

    type: str
    title: str
    status: int
    detail: str
    code: ErrorCode
    request_id: str
    error: str = ""


class JobError(BaseModel):
    """Why a job failed."""

    code: ErrorCode
    message: str


class JobDocument(BaseModel):
    """Where a job stands. num_queued: while it waits in the queue, how many jobs of all callers do, it included."""

    id: str
    status: JobStatus
    priority: Priority
    attempts: int
    num_queued: int | None
    created_at: datetime
    deadline_at: datetime | None
    finished_at: datetime | None
    error: JobError | None
    result: str | None


class ModelDocument(BaseModel):
    """A model that is being served, with the options that it takes."""

    name: str
    version: str
    default_steps: int
    default_sampler: str
    devices: list[str]
    num_workers: int


class ModelList(BaseModel):
    """All models that are being served."""

    models: list[ModelDocument]


class Health(BaseModel):
    """A health check's answer."""

    status: Literal["live", "ready", "unavailable"]
    reason: str


_PICTURES: dict[str, Any] = {
    **{image_format.media_type: {"schema": {"type": "string", "format": "binary"}} for image_format in ImageFormat},
    "application/zip": {"schema": {"type": "string", "format": "binary"}},
}

_RANGE = r"^[+-]?\d+(\.\d+)?,[+-]?\d+(\.\d+)?$"
_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["vis", "ir"],
    "additionalProperties": False,
    "properties": {
        "vis": {
            "type": "string",
            "format": "binary",
            "description": "visible image: PNG, JPEG, WebP, AVIF, BMP or TIFF",
        },
        "ir": {
            "type": "string",
            "format": "binary",
            "description": "infrared image, registered to vis; radiometric too",
        },
        "output": {"type": "string", "enum": list(Output), "default": "fused", "description": "all: a zip of three"},
        "format": {"type": "string", "enum": list(ImageFormat), "default": "png"},
        "steps": {"type": "integer", "minimum": 1, "maximum": 1000, "description": "default: the model's own"},
        "sampler": {"type": "string", "enum": ["euler", "posterior", "ode1", "ode2"]},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "default": 0},
        "vis_range": {
            "type": "string",
            "pattern": _RANGE,
            "description": "source values that become black and white, such as 0,4095; default: by the depth",
        },
        "ir_range": {
            "type": "string",
            "pattern": _RANGE,
            "description": "source values that become black and white, such as 7000,9500; default: robust percentiles",
        },
        "priority": {"type": "string", "enum": list(Priority), "default": "normal"},
        "timeout_ms": {"type": "integer", "minimum": 1, "description": "nobody wants the answer after this time"},
    },
}

_QUERY: list[dict[str, Any]] = [
    {
        "name": name,
        "in": "query",
        "description": _FORM["properties"][name].get("description", "as the form field"),
        "schema": _FORM["properties"][name],
    }
    for name in OPTION_FIELDS
]

JobId = Annotated[str, Path(pattern=r"^[0-9a-zA-Z_-]{1,64}$", description="the id from the 202 answer")]


def problems(*codes: ErrorCode) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of these errors; every route may also meet an internal one."""
    by_status: dict[int, list[str]] = {}
    for code in (*codes, ErrorCode.INTERNAL):
        by_status.setdefault(int(STATUS[code][0]), []).append(code)
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": "; ".join(TITLE[ErrorCode(code)] for code in names),
                 "content": {PROBLEM_TYPE: {"schema": schema}}}
        for status, names in by_status.items()
    }  # fmt: skip


_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")  # what a header may carry as it is
_LISTED = _PLAIN.replace(",", "")  # or one of several lines of a header, which whoever reads them may join with commas
_NAME = {"schema": {"type": "string"}, "description": "percent-encoded where it is not printable ASCII"}
_HEADERS = {
    "Server-Timing": {"schema": {"type": "string"}, "description": "decode, queue, batch, model, encode, in ms"},
    "X-Model-Name": _NAME,
    "X-Picture": {"schema": {"type": "string", "enum": list(Part)}, "description": "which picture this is"},
    "X-Model-Version": _NAME,
    "X-Infrared-Source": {
        "schema": {"type": "string", "enum": list(get_args(IrSource))},
        "description": "what was read of ir: the values that a thermal camera's JPEG carries, a false-colour picture "
        "turned back into intensity, or grey values; absent if the worker did not say",
    },
    "X-Warning": {
        "schema": {"type": "array", "items": {"type": "string"}, "maxItems": MAX_WARNINGS},
        "description": "one line for each sentence about what looks wrong with the pair; percent-encoded where it is "
        "not printable ASCII or a comma",
    },
}


def build_app(
    gateway: Gateway,
    settings: Settings,
    metrics: Metrics,
    *,
    guard: Guard | None = None,
    version: str = "0",
    tracer: Tracer = NO_TRACES,
) -> FastAPI:
    """The application. Routes of other faces are added by including their routers. guard: None asks for no keys."""
    app = FastAPI(
        title="recofuse",
        version=version,
        summary="Restores and fuses pairs of infrared and visible images.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(_Head)
    if guard is not None:
        app.add_middleware(_Gate, guard=guard)
    app.add_middleware(_Envelope, metrics=metrics, http=settings.http, tracer=tracer)
    app.state.uploads = _Uploads(settings)
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    _add_fusion(app, gateway, settings)
    _add_jobs(app, gateway)
    _add_operations(app, gateway, metrics)
    app.include_router(playground.build_router())
    _add_problem_schema(app)
    return app


def build_monitor_app(is_warm: Callable[[], bool], metrics: Metrics) -> FastAPI:
    """What a worker process serves on its own port: /health/live, /health/ready, /metrics."""
    app = FastAPI(title="recofuse worker", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Head)
    app.add_middleware(_Envelope, metrics=metrics)
    app.add_exception_handler(HTTPException, _on_http_exception)

    @app.get("/health/live")
    async def live() -> Health:
        return Health(status="live", reason="")

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        if is_warm():
            return JSONResponse({"status": "ready", "reason": "ready"})
        return JSONResponse({"status": "unavailable", "reason": "the model is not warm yet"}, 503)

    @app.get("/metrics")
    async def exposition(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    return app


# routes


def _add_fusion(app: FastAPI, gateway: Gateway, settings: Settings) -> None:
    @app.post(
        "/v1/fuse",
        summary="Fuse one pair",
        response_class=Response,
        responses={
            200: {"description": "the picture, or a zip of all three", "content": _PICTURES, "headers": _HEADERS},
            202: {
                "description": "accepted (Prefer: respond-async); the Location header names the job",
                "model": JobDocument,
                "headers": {"Location": {"schema": {"type": "string"}}},
            },
            **problems(
                ErrorCode.MALFORMED_REQUEST,
                ErrorCode.CONFLICT,
                ErrorCode.CANCELLED,
                ErrorCode.PAYLOAD_TOO_LARGE,
                ErrorCode.UNSUPPORTED_MEDIA,
                ErrorCode.INVALID_INPUT,
                ErrorCode.OVERLOADED,
                ErrorCode.UNAVAILABLE,
                ErrorCode.TIMED_OUT,
            ),
        },
        openapi_extra={
            "parameters": _QUERY,
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}},
        },
    )
    async def fuse(
        request: Request,
        prefer: Annotated[str | None, Header(description="respond-async: answer 202 at once")] = None,
        idempotency_key: Annotated[
            str | None, Header(pattern=r"^[\x21-\x7e]{1,255}$", description="repeats of a request share one job")
        ] = None,
    ) -> Response:
        form = await read_form(request, settings)
        wanted = request_of(form, idempotency_key, traceparent.get())
        if _prefers_async(prefer):
            view = await gateway.submit(wanted)
            headers = {"Location": f"/v1/jobs/{view.id}", "Preference-Applied": "respond-async"}
            return JSONResponse(await _document(gateway, view), 202, headers)
        result = await unless_hung_up(request, gateway.fuse(wanted))
        return Response(status_code=CLIENT_CLOSED) if result is None else await _pictures(result)


def _add_jobs(app: FastAPI, gateway: Gateway) -> None:
    missing = (ErrorCode.JOB_NOT_FOUND, ErrorCode.UNAVAILABLE, ErrorCode.INVALID_INPUT)

    @app.get(
        "/v1/jobs/{job_id}", summary="Where a job stands", response_model=JobDocument, responses=problems(*missing)
    )
    async def job(job_id: JobId) -> Response:
        return JSONResponse(await _document(gateway, await gateway.view(job_id)))

    @app.delete("/v1/jobs/{job_id}", summary="Cancel a job", response_model=JobDocument, responses=problems(*missing))
    async def cancel(job_id: JobId) -> Response:
        return JSONResponse(await _document(gateway, await gateway.cancel(job_id)))

    @app.get(
        "/v1/jobs/{job_id}/result",
        summary="A finished job's pictures",
        response_class=Response,
        responses={
            200: {"description": "the picture, or a zip of all three", "content": _PICTURES, "headers": _HEADERS},
            **problems(
                *missing,
                ErrorCode.NOT_FINISHED,
                ErrorCode.CANCELLED,
                ErrorCode.TIMED_OUT,
                ErrorCode.UNSUPPORTED_MEDIA,
                ErrorCode.PAYLOAD_TOO_LARGE,
            ),
        },
    )
    async def result(job_id: JobId) -> Response:
        return await _pictures(await gateway.result(job_id))


def _add_operations(app: FastAPI, gateway: Gateway, metrics: Metrics) -> None:
    @app.get("/v1/models", summary="What is being served", responses=problems(ErrorCode.UNAVAILABLE))
    async def models() -> ModelList:
        return ModelList(models=[ModelDocument(**asdict(model)) for model in await gateway.models()])

    @app.get("/health/live", summary="Is the process there", responses=problems())
    async def live() -> Health:
        return Health(status="live", reason="")

    @app.get(
        "/health/ready",
        summary="Is new work welcome",
        response_model=Health,
        responses={503: {"model": Health, "description": "draining, or no worker is warm"}, **problems()},
    )
    async def ready() -> Response:
        readiness = await gateway.readiness()
        status: Literal["ready", "unavailable"] = "ready" if readiness.is_ready else "unavailable"
        document = Health(status=status, reason=readiness.reason)
        return JSONResponse(document.model_dump(), 200 if readiness.is_ready else 503)

    @app.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"description": "the exposition", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def exposition(request: Request) -> Response:
        await gateway.observe_queue()
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    page = resources.files("service.faces.http").joinpath("docs.html").read_text(encoding="utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page)


def _add_problem_schema(app: FastAPI) -> None:
    """Routes refer to the problem document by name, so it must be among the schemas."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            for name, schema in schemas["Problem"].pop("$defs", {}).items():
                schemas.setdefault(name, schema)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


# requests


async def read_form(request: Request, settings: Settings) -> dict[str, bytes]:
    """The fields of a multipart body, read within the limits, and the options of the query string.

    Raises UnsupportedMediaError, PayloadTooLargeError, MalformedRequestError, InvalidInputError (unknown, missing or
    repeated fields) and TimedOutError (a body that stops, or comes too slowly).
    """
    body = _Body(request)
    try:
        form = _Form(settings.limits.max_image_bytes, _options_in_query(request))
        # The form does not know the parser that calls it: the two would keep each upload until a collection.
        parser = MultipartParser(_boundary_of(request), form.callbacks())
        await body.pour(functools.partial(_parse, parser), settings)
        return form.close()
    except ServiceError:
        await body.discard_rest()
        raise


async def read_body(request: Request, settings: Settings, options: Collection[str]) -> bytes:
    """A body that is not a form, as it is. Raises like `read_form`.

    options: what the body may ask for. In the query string they would be ignored, so they are refused there; what has
    another name may be meant for a proxy on the way.
    """
    body = _Body(request)
    chunks: list[bytes] = []
    try:
        if misplaced := [name for name, value in request.query_params.items() if value and name in options]:
            told = ", ".join(dict.fromkeys(misplaced))
            raise InvalidInputError(
                f"the query parameter {told} is not read here; it belongs into the body's parameters"
            )
        await body.pour(chunks.append, settings)
    except ServiceError:
        await body.discard_rest()
        raise
    return b"".join(chunks)


def _options_in_query(request: Request) -> dict[str, bytes]:
    """The options in the query string, as form fields; empty ones are left out.

    Raises InvalidInputError (unknown or repeated ones) and PayloadTooLargeError.
    """
    given = parse_qsl(request.scope["query_string"].decode("utf-8", "replace"), keep_blank_values=True)
    if unknown := [repr(name[:40]) for name in dict.fromkeys(name for name, _ in given) if name not in OPTION_FIELDS]:
        accepted = ", ".join(OPTION_FIELDS)
        raise InvalidInputError(f"there is no query parameter {', '.join(unknown[:8])}; accepted are {accepted}")
    values: dict[str, bytes] = {}
    for name, text in given:
        if name in values:
            raise InvalidInputError(f"the query parameter {name} is there more than once")
        values[name] = text.encode()
        if len(values[name]) > MAX_OPTION_BYTES:
            most = MAX_OPTION_BYTES
            raise PayloadTooLargeError(f"the query parameter {name} has more than the accepted {most} bytes")
    return {name: value for name, value in values.items() if value}


class _Uploads:
    """Bytes of bodies that are being received, over all connections: the queue counts them only once it has them."""

    def __init__(self, settings: Settings) -> None:
        self._most = settings.http.max_uploads_bytes
        self._retry_after_s = settings.queue.retry_after_s
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """More has come. Raises OverloadedError if that is too much."""
        if self._num_bytes + num_bytes > self._most:
            raise OverloadedError(
                "too much is being uploaded at once; try again later", retry_after_s=self._retry_after_s
            )
        self._num_bytes += num_bytes

    def remove(self, num_bytes: int) -> None:
        """A body is complete, or was given up."""
        self._num_bytes -= num_bytes


class _Body:
    """A request's body as it arrives."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._is_complete = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """The next pieces, as they come. Raises MalformedRequestError if the client leaves before the end."""
        while not self._is_complete:
            message = await self._request.receive()
            if message["type"] == "http.disconnect":
                self._is_complete = True
                raise MalformedRequestError("the connection was closed before the body's end")
            self._is_complete = not message.get("more_body", False)
            yield message.get("body", b"")

    async def pour(self, write: Callable[[bytes], None], settings: Settings) -> None:
        """Hand the pieces on, within the limits; none is asked for before what the head announces is acceptable.

        Raises UnsupportedMediaError (compressed), PayloadTooLargeError, OverloadedError, TimedOutError,
        MalformedRequestError.
        """
        _require_plain(self._request)
        max_bytes = 2 * settings.limits.max_image_bytes + 64 * 1024
        announced = self._request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > max_bytes:
            raise PayloadTooLargeError(f"the body has {announced} bytes; at most {max_bytes} are accepted")
        uploads: _Uploads = self._request.app.state.uploads
        pause_s, min_rate = settings.http.body_timeout_s, settings.http.min_body_bytes_per_s
        now_s = asyncio.get_running_loop().time
        slowest_s = now_s() + pause_s  # when this much of a body must be there, at the latest
        num_bytes = 0
        try:
            async with asyncio.timeout(pause_s) as patience:
                async for chunk in self.chunks():
                    if num_bytes + len(chunk) > max_bytes:
                        raise PayloadTooLargeError(f"the body has more than {max_bytes} bytes")
                    uploads.add(len(chunk))
                    num_bytes += len(chunk)
                    write(chunk)
                    slowest_s += len(chunk) / min_rate
                    patience.reschedule(min(now_s() + pause_s, slowest_s))
        except TimeoutError as error:
            raise TimedOutError(
                f"the body stopped or came too slowly; accepted are pauses of up to {pause_s:g} s and, after the first "
                f"{pause_s:g} s, at least {min_rate} bytes/s on average"
            ) from error
        finally:
            uploads.remove(num_bytes)

    async def discard_rest(self) -> None:
        """Let a refused client finish a body of bearable size: closing on it would destroy the answer on its way.

        A client that asked before sending (Expect: 100-continue) has nothing on its way yet.
        """
        if "expect" in self._request.headers:
            return
        num_bytes = 0
        with contextlib.suppress(TimeoutError, MalformedRequestError):
            async with asyncio.timeout(DISCARD_S):
                async for chunk in self.chunks():
                    num_bytes += len(chunk)
                    if num_bytes > MAX_DISCARD_BYTES:
                        return


def _require_plain(request: Request) -> None:
    """Raises UnsupportedMediaError for a body that would have to be decompressed."""
    for header in ("content-encoding", "transfer-encoding"):
        codings = {coding.strip().lower() for line in request.headers.getlist(header) for coding in line.split(",")}
        if unknown := sorted(codings - {"", "identity", "chunked"}):
            raise UnsupportedMediaError(
                f"compressed bodies are not accepted ({unknown[0][:40]}): send it uncompressed; images are compressed "
                "already"
            )


def _boundary_of(request: Request) -> bytes:
    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise UnsupportedMediaError("the request body must be multipart/form-data with the files vis and ir")
    boundary = parameters.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise MalformedRequestError("the multipart boundary is missing or longer than 70 characters")
    return boundary


def _parse(parser: MultipartParser, chunk: bytes) -> None:
    """Parse the next piece of the body."""
    try:
        parser.write(chunk)
    except FormParserError as error:
        raise MalformedRequestError("the multipart body cannot be parsed") from error


class _Form:
    """Collects multipart fields and stops at the first that is not wanted or too large.

    query: the options that came outside the form.
    """

    def __init__(self, max_image_bytes: int, query: Mapping[str, bytes]) -> None:
        self._max_image_bytes = max_image_bytes
        self._query = query
        self._fields: dict[str, bytearray] = {}
        self._headers: dict[bytes, bytes] = {}
        self._name = b""
        self._value = b""
        self._field = ""
        self._is_closed = False

    def callbacks(self) -> MultipartCallbacks:
        """What a parser is to call."""
        return {
            "on_part_begin": self._headers.clear,
            "on_header_begin": self._on_header_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }

    def close(self) -> dict[str, bytes]:
        """The complete fields; an option that is empty is none."""
        if not self._is_closed:
            raise MalformedRequestError("the multipart body ends before its closing boundary")
        missing = [name for name in IMAGE_FIELDS if name not in self._fields]
        if missing:
            raise InvalidInputError(f"the field {' and '.join(missing)} is missing; vis and ir are required")
        filled = {name: bytes(value) for name, value in self._fields.items() if value or name in IMAGE_FIELDS}
        return {**self._query, **filled}

    def _on_header_begin(self) -> None:
        self._name = self._value = b""

    def _on_header_field(self, chunk: bytes, start: int, end: int) -> None:
        self._name += chunk[start:end]

    def _on_header_value(self, chunk: bytes, start: int, end: int) -> None:
        self._value += chunk[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value

    def _on_headers_finished(self) -> None:
        _, parameters = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if name not in IMAGE_FIELDS and name not in OPTION_FIELDS:
            accepted = ", ".join((*IMAGE_FIELDS, *OPTION_FIELDS))
            raise InvalidInputError(f"there is no field {name[:40]!r}; accepted are {accepted}")
        if name in self._fields:
            raise InvalidInputError(f"the field {name} is there more than once")
        self._field = name
        self._fields[name] = bytearray()

    def _on_part_data(self, chunk: bytes, start: int, end: int) -> None:
        if start < end and self._field in self._query:
            raise InvalidInputError(f"the field {self._field} is in the query string as well; keep one")
        value = self._fields[self._field]
        limit = self._max_image_bytes if self._field in IMAGE_FIELDS else MAX_OPTION_BYTES
        if len(value) + end - start > limit:
            raise PayloadTooLargeError(f"the field {self._field} has more than the accepted {limit} bytes")
        value += memoryview(chunk)[start:end]

    def _on_end(self) -> None:
        self._is_closed = True


def request_of(form: Mapping[str, bytes], idempotency_key: str | None, parent: str) -> FusionRequest:
    """The request that these form fields describe. parent: its traceparent, or nothing. Raises InvalidInputError."""
    values: dict[str, Any] = {}
    for name, raw in form.items():
        if name in OPTION_FIELDS:
            try:
                values[name] = raw.decode("ascii")
            except UnicodeDecodeError as error:
                raise InvalidInputError(f"the field {name} is not plain text") from error
    for name in ("vis_range", "ir_range"):
        if name in values:
            values[name] = tuple(values[name].split(","))
    priority = values.pop("priority", Priority.NORMAL)
    timeout_ms = values.pop("timeout_ms", None)
    if priority not in list(Priority):
        raise InvalidInputError(f"priority: accepted are {', '.join(Priority)}")
    if timeout_ms is not None and not re.fullmatch(r"[0-9]{1,12}", timeout_ms):
        raise InvalidInputError("timeout_ms: accepted are whole numbers of milliseconds")
    try:
        options = FusionOptions.model_validate(values)
    except ValidationError as error:
        raise InvalidInputError(problems_of(error)) from error
    return FusionRequest(
        vis=form["vis"],
        ir=form["ir"],
        options=options,
        priority=Priority(priority),
        timeout_s=None if timeout_ms is None else int(timeout_ms) / 1000,
        idempotency_key=idempotency_key,
        request_id=request_id.get(),
        traceparent=parent or None,
    )


def _prefers_async(prefer: str | None) -> bool:
    return prefer is not None and any(wish.strip().lower() == "respond-async" for wish in re.split("[,;]", prefer))


async def unless_hung_up(request: Request, work: Awaitable[Answer]) -> Answer | None:
    """The work's result, or None, with the work cancelled, if the client hangs up first."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for unfinished in (task, watcher):
            unfinished.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


# answers


async def _pictures(result: FusionResult) -> Response:
    timing = ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in result.timings_s.items())
    headers = {
        "Server-Timing": timing,
        "X-Model-Name": quote(result.model_name, safe=_PLAIN),
        "X-Model-Version": quote(result.model_version, safe=_PLAIN),
        "X-Job-ID": result.job_id,
    }
    if result.ir_source in get_args(IrSource):
        headers["X-Infrared-Source"] = result.ir_source
    if len(result.images) == 1:
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
    """All pictures and a small description; stored, because they are compressed already."""
    suffix = "npy" if result.media_type.endswith("npy") else result.media_type.removeprefix("image/")
    description = {
        "model": {"name": result.model_name, "version": result.model_version},
        "width": result.width,
        "height": result.height,
        "media_type": result.media_type,
        "timings_s": dict(result.timings_s),
        "infrared_source": result.ir_source,
        "warnings": result.warnings,
        "files": {part: f"{part}.{suffix}" for part in result.images},
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for part in Part:
            if part in result.images:
                archive.writestr(f"{part}.{suffix}", result.images[part])
        archive.writestr("result.json", json.dumps(description, indent=2))
    return stream.getvalue()


async def _document(gateway: Gateway, view: JobView) -> dict[str, Any]:
    def time_of(seconds: float | None) -> datetime | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)

    document = JobDocument(
        id=view.id,
        status=view.status,
        priority=view.priority,
        attempts=view.attempts,
        num_queued=await gateway.num_queued() if view.status is JobStatus.QUEUED else None,
        created_at=datetime.fromtimestamp(view.created_s, UTC),
        deadline_at=time_of(view.deadline_s),
        finished_at=time_of(view.finished_s),
        error=None if view.error_code is None else JobError(code=view.error_code, message=view.error_message),
        result=f"/v1/jobs/{view.id}/result" if view.status is JobStatus.SUCCEEDED else None,
    )
    return document.model_dump(mode="json")


def problem(error: ServiceError, headers: Mapping[str, str] | None = None, *, path: str = "") -> Response:
    """The problem document of an error. path: what was asked for."""
    body = Problem(
        type=f"urn:recofuse:problem:{error.code}",
        title=TITLE[error.code],
        status=int(error.http_status),
        detail=error.message,
        code=error.code,
        request_id=request_id.get(),
        error=error.message if is_inference(path) else "",
    )
    extra = dict(headers or {})
    if error.retry_after_s is not None:
        extra["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if error.code is ErrorCode.PAYLOAD_TOO_LARGE or error.code is ErrorCode.UNSUPPORTED_MEDIA:
        extra["Connection"] = "close"  # the rest of the body will not be read
    document = body.model_dump(mode="json", exclude_defaults=True)
    response = JSONResponse(document, int(error.http_status), extra, media_type=PROBLEM_TYPE)
    if error.code is ErrorCode.UNAUTHENTICATED:
        response.headers["WWW-Authenticate"] = 'Bearer realm="recofuse"'
    response.raw_headers.append((b"x-error-code", error.code.encode()))
    return response


def is_inference(path: str) -> bool:
    """Whether an address belongs to the Open Inference Protocol."""
    return path == "/v2" or path.startswith("/v2/")


async def _on_service_error(request: Request, error: Exception) -> Response:
    told = error if isinstance(error, ServiceError) else InternalError(INTERNAL_MESSAGE)
    return problem(told, path=request.scope["path"])


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown addresses and methods."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers: Mapping[str, str] = getattr(error, "headers", None) or {}
    told: ServiceError = MalformedRequestError("the request cannot be read")
    if status == 404:
        told = RouteNotFoundError("there is nothing at this address; /docs lists what there is")
    elif status == 405:
        told = MethodNotAllowedError(f"{request.method} is not possible at this address")
        allowed = headers.get("Allow", "").split(", ")
        if "GET" in allowed:
            headers = {**headers, "Allow": ", ".join(dict.fromkeys((*allowed, "HEAD")))}
    return problem(told, headers, path=request.scope["path"])


async def _on_validation_error(request: Request, error: Exception) -> Response:
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    lines = (f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in problems)
    return problem(InvalidInputError("; ".join(lines)), path=request.scope["path"])


def _pieces(message: Message) -> Iterator[Message]:
    """A large body in pieces, each handed over when the client has taken those before.

    At once it would be complete for uvicorn, which then waits for the next request, and over TLS hangs up on a client
    that takes longer for its answer than an idle connection is kept.
    """
    body: bytes = message.get("body", b"")
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), PIECE_BYTES):
        end = start + PIECE_BYTES
        yield {**message, "body": body[start:end], "more_body": end < len(body) or message.get("more_body", False)}


class _Envelope:
    """Around every request: its id, metrics and trace, and an answer even if something unforeseen happens."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, http: HttpSettings | None = None, tracer: Tracer = NO_TRACES
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer
        has_tls = http is not None and bool(http.tls_cert)
        self._secure = _SECURE + [(b"strict-transport-security", b"max-age=31536000")] * has_tls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        current = accepted_id(_header(scope, b"x-request-id"))
        token = request_id.set(current)
        try:
            with (
                self._metrics.request("http") as timer,
                self._tracer.request(scope["path"], timer, _header(scope, b"traceparent")),
            ):
                timer.method = scope["method"] if scope["method"] in _METHODS else "other"

                async def send_marked(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        timer.status = str(message["status"])
                        headers = message.setdefault("headers", [])
                        for index, (name, value) in enumerate(headers):
                            if name == b"x-error-code":
                                self._metrics.errors.labels(value.decode()).inc()
                                del headers[index]
                                break
                        headers.append((b"x-request-id", current.encode()))
                        headers += self._secure
                        names = dict(headers)
                        is_page = names.get(b"content-type", b"").startswith(b"text/html")
                        if b"content-security-policy" not in names:
                            headers.append((b"content-security-policy", _PAGE_POLICY if is_page else _DATA_POLICY))
                        if b"cache-control" not in names and not is_page:
                            headers.append((b"cache-control", b"no-store"))
                    for piece in _pieces(message):
                        await send(piece)

                try:
                    await self._app(scope, receive, send_marked)
                except Exception:
                    logger.exception("request failed", extra={"method": scope["method"]})
                    if timer.status != "0":
                        raise  # half an answer is out; only cutting the connection can tell the client
                    failure = InternalError(INTERNAL_MESSAGE)
                    await problem(failure, path=scope["path"])(scope, receive, send_marked)
                finally:
                    timer.route = getattr(scope.get("route"), "path", "unmatched")
        finally:
            request_id.reset(token)


class _Head:
    """Answers HEAD wherever there is GET, with the same status and headers; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, send)
        finally:
            if "route" in asked:
                scope["route"] = asked["route"]  # for the metrics


class _Gate:
    """Asks who makes a request before its body is read; inside `_Envelope`, which counts what is refused here."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        if path not in PUBLIC_PATHS and not path.startswith(PUBLIC_PREFIXES):
            request = Request(scope, receive)
            try:
                await self._admit(request, path)
            except ServiceError as error:
                await _Body(request).discard_rest()
                await problem(error, path=path)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _admit(self, request: Request, path: str) -> None:
        is_post = request.method == "POST"
        # A job's id lets its reader fetch the pictures, so it stays out of the log.
        shown = re.sub(r"^(/v1/jobs/)[^/]+", r"\1{job_id}", path)[:80]
        await self._guard.admit(
            request.headers,
            keys.Scope.READ if request.method in ("GET", "HEAD", "OPTIONS") else keys.Scope.FUSE,
            is_charged=is_post,
            face="http",
            action=f"{request.method} {shown}",
            peer=request.client.host if request.client is not None else "",
        )


def _header(scope: Scope, wanted: bytes) -> str:
    """A header's first value; empty if it is not there. wanted: in lower case."""
    value: bytes = next((value for name, value in scope["headers"] if name == wanted), b"")
    return value.decode("latin-1")
