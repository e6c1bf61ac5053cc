"""The HTTP face: FastAPI routes that turn requests into gateway calls. Nothing here blocks the event loop.

Errors: routes neither catch nor map; `envelope` and the handlers in `problems` turn every failure, also an unknown
address, into a problem document.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from importlib import resources
from typing import Annotated, Literal

from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from service.access.guard import Guard
from service.faces.gateway import Gateway
from service.faces.http import playground
from service.faces.http.documents import (
    Health,
    JobDocument,
    ModelDocument,
    ModelList,
    RigDocument,
    RigList,
    document_of,
)
from service.faces.http.envelope import Envelope, Head
from service.faces.http.forms import FORM, QUERY, read_form, request_of
from service.faces.http.gate import Gate
from service.faces.http.hangup import CLIENT_CLOSED, unless_hung_up
from service.faces.http.pictures import HEADERS, PICTURES, answer_of
from service.faces.http.problems import (
    add_problem_schema,
    on_http_exception,
    on_service_error,
    on_validation_error,
    problems,
)
from service.terms.errors import ErrorCode, InvalidInputError, ServiceError
from service.terms.settings import Settings
from service.watch.logs import traceparent
from service.watch.metrics import Metrics
from service.watch.tracing import NO_TRACES, Tracer

IDEMPOTENCY_KEY_PATTERN = r"^[\x21-\x7e]{1,255}$"
# Read by hand, like the form: as parameters of the route they make FastAPI take 1.6 times as long.
HEADERS_TAKEN = [
    {"name": name, "in": "header", "schema": schema, "description": description}
    for name, schema, description in (
        ("prefer", {"type": "string"}, "respond-async: answer 202 at once"),
        (
            "idempotency-key",
            {"type": "string", "pattern": IDEMPOTENCY_KEY_PATTERN},
            "repeats of a request share one job",
        ),
    )
]

JobId = Annotated[str, Path(pattern=r"^[0-9a-zA-Z_-]{1,64}$", description="the id from the 202 answer")]


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
    app.add_middleware(Head)
    if guard is not None:
        app.add_middleware(Gate, guard=guard)
    app.add_middleware(Envelope, metrics=metrics, http=settings.http, tracer=tracer)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    _add_fusion(app, gateway, settings)
    _add_jobs(app, gateway)
    _add_operations(app, gateway, metrics)
    app.include_router(playground.build_router())
    add_problem_schema(app)
    return app


# routes


def _add_fusion(app: FastAPI, gateway: Gateway, settings: Settings) -> None:
    @app.post(
        "/v1/fuse",
        summary="Fuse one pair",
        response_class=Response,
        responses={
            200: {"description": "the picture, or a zip of all three", "content": PICTURES, "headers": HEADERS},
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
            "parameters": [*HEADERS_TAKEN, *QUERY],
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}},
        },
    )
    async def fuse(request: Request) -> Response:
        idempotency_key = _idempotency_key(request)
        with gateway.held.holding() as holding:
            wanted = request_of(await read_form(request, settings, holding), idempotency_key, traceparent.get())
            if _prefers_async(request.headers.get("prefer")):
                view = await gateway.submit(wanted)
                headers = {"Location": f"/v1/jobs/{view.id}", "Preference-Applied": "respond-async"}
                return JSONResponse(await document_of(gateway, view), 202, headers)
            result = await unless_hung_up(request, gateway.fuse(wanted))
        return Response(status_code=CLIENT_CLOSED) if result is None else await answer_of(result)


def _add_jobs(app: FastAPI, gateway: Gateway) -> None:
    missing = (ErrorCode.JOB_NOT_FOUND, ErrorCode.UNAVAILABLE, ErrorCode.INVALID_INPUT)

    @app.get(
        "/v1/jobs/{job_id}", summary="Where a job stands", response_model=JobDocument, responses=problems(*missing)
    )
    async def job(job_id: JobId) -> Response:
        return JSONResponse(await document_of(gateway, await gateway.view(job_id)))

    @app.delete("/v1/jobs/{job_id}", summary="Cancel a job", response_model=JobDocument, responses=problems(*missing))
    async def cancel(job_id: JobId) -> Response:
        return JSONResponse(await document_of(gateway, await gateway.cancel(job_id)))

    @app.get(
        "/v1/jobs/{job_id}/result",
        summary="A finished job's pictures",
        response_class=Response,
        responses={
            200: {"description": "the picture, or a zip of all three", "content": PICTURES, "headers": HEADERS},
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
        return await answer_of(await gateway.result(job_id))


def _add_operations(app: FastAPI, gateway: Gateway, metrics: Metrics) -> None:
    @app.get("/v1/models", summary="What is being served", responses=problems(ErrorCode.UNAVAILABLE))
    async def models() -> ModelList:
        return ModelList(models=[ModelDocument(**asdict(model)) for model in await gateway.models()])

    @app.get("/v1/rigs", summary="The rigs that requests may name", responses=problems())
    async def rigs() -> RigList:
        return RigList(rigs=[RigDocument.of(rig) for rig in await gateway.rigs()])

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
        body, content_type = await metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    page = resources.files("service.faces.http").joinpath("docs.html").read_text(encoding="utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page)


def _idempotency_key(request: Request) -> str | None:
    """Raises InvalidInputError."""
    key = request.headers.get("idempotency-key")
    if key is not None and not re.search(IDEMPOTENCY_KEY_PATTERN, key):
        raise InvalidInputError("the header Idempotency-Key takes 1 to 255 printable ASCII characters and no spaces")
    return key


def _prefers_async(prefer: str | None) -> bool:
    return prefer is not None and any(wish.strip().lower() == "respond-async" for wish in re.split("[,;]", prefer))
