"""Errors as problem documents (RFC 9457), with the statuses of `service.terms.errors.STATUS`, and their description.

Routes neither catch nor map: the handlers here turn what they raise into documents, and `envelope` what nobody foresaw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from service.terms.errors import (
    INTERNAL_MESSAGE,
    STATUS,
    TITLE,
    ErrorCode,
    InternalError,
    InvalidInputError,
    MalformedRequestError,
    MethodNotAllowedError,
    RouteNotFoundError,
    ServiceError,
)
from service.watch.logs import request_id

PROBLEM_TYPE = "application/problem+json"


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


async def on_service_error(request: Request, error: Exception) -> Response:
    """What a route raises."""
    told = error if isinstance(error, ServiceError) else InternalError(INTERNAL_MESSAGE)
    return problem(told, path=request.scope["path"])


async def on_http_exception(request: Request, error: Exception) -> Response:
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


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Parameters that are not as a route declares them."""
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    lines = (f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in problems)
    return problem(InvalidInputError("; ".join(lines)), path=request.scope["path"])


# their description


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


def add_problem_schema(app: FastAPI) -> None:
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
