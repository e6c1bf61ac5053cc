"""Everything that can go wrong for a caller, and the one table of HTTP and gRPC statuses.

    ServiceError
    ├── MalformedRequestError      the request cannot be read: broken multipart, missing boundary
    ├── InvalidInputError          readable, but not acceptable: a wrong option, mismatched images
    ├── UnsupportedMediaError      not one of the accepted kinds of request or image
    ├── PayloadTooLargeError       more bytes, pixels or frames than the limits allow
    ├── UnauthenticatedError       no valid credentials
    ├── PermissionDeniedError      valid credentials that do not reach this far
    ├── RouteNotFoundError         no such address
    ├── MethodNotAllowedError      the address exists, the method does not
    ├── JobNotFoundError           no such job, or its result has been discarded
    ├── ModelNotFoundError         no such model, or not in this version
    ├── NotFinishedError           the job is known but has no result yet
    ├── ConflictError              an idempotency key that was used for another request
    ├── CancelledError             the job was cancelled
    ├── OverloadedError            the queue is full; try again later
    │   └── NoRoomError            it has places, but not the bytes that this job needs; a smaller one may fit
    ├── RateLimitedError           this caller asks too often; try again later
    ├── UnavailableError           draining, not warm, or the queue cannot be reached
    ├── TimedOutError              the deadline passed before there was a result
    ├── OutOfMemoryError           the model does not fit this image even alone
    ├── AttemptsExhaustedError     every worker that took the job was lost
    └── InternalError              anything else; the detail stays in the log

An error crosses the queue as its code and message (`ServiceError.code`, `str(error)`) and is rebuilt by `error_of`.
A message says what was wrong and what is accepted; it never carries image content or a traceback.
"""

from __future__ import annotations

from enum import StrEnum
from http import HTTPStatus
from typing import ClassVar


class ErrorCode(StrEnum):
    """The stable names that clients may branch on (`code` in a problem document)."""

    MALFORMED_REQUEST = "malformed_request"
    INVALID_INPUT = "invalid_input"
    UNSUPPORTED_MEDIA = "unsupported_media"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    ROUTE_NOT_FOUND = "route_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    JOB_NOT_FOUND = "job_not_found"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FINISHED = "not_finished"
    CONFLICT = "conflict"
    CANCELLED = "cancelled"
    OVERLOADED = "overloaded"
    RATE_LIMITED = "rate_limited"
    UNAVAILABLE = "unavailable"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    INTERNAL = "internal"


STATUS: dict[ErrorCode, tuple[HTTPStatus, str]] = {  # HTTP status, gRPC status name
    ErrorCode.MALFORMED_REQUEST: (HTTPStatus.BAD_REQUEST, "INVALID_ARGUMENT"),
    ErrorCode.INVALID_INPUT: (HTTPStatus.UNPROCESSABLE_ENTITY, "INVALID_ARGUMENT"),
    ErrorCode.UNSUPPORTED_MEDIA: (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "INVALID_ARGUMENT"),
    ErrorCode.PAYLOAD_TOO_LARGE: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "INVALID_ARGUMENT"),
    ErrorCode.UNAUTHENTICATED: (HTTPStatus.UNAUTHORIZED, "UNAUTHENTICATED"),
    ErrorCode.PERMISSION_DENIED: (HTTPStatus.FORBIDDEN, "PERMISSION_DENIED"),
    ErrorCode.ROUTE_NOT_FOUND: (HTTPStatus.NOT_FOUND, "UNIMPLEMENTED"),
    ErrorCode.METHOD_NOT_ALLOWED: (HTTPStatus.METHOD_NOT_ALLOWED, "UNIMPLEMENTED"),
    ErrorCode.JOB_NOT_FOUND: (HTTPStatus.NOT_FOUND, "NOT_FOUND"),
    ErrorCode.MODEL_NOT_FOUND: (HTTPStatus.NOT_FOUND, "NOT_FOUND"),
    ErrorCode.NOT_FINISHED: (HTTPStatus.CONFLICT, "FAILED_PRECONDITION"),
    ErrorCode.CONFLICT: (HTTPStatus.CONFLICT, "ALREADY_EXISTS"),
    ErrorCode.CANCELLED: (HTTPStatus.GONE, "CANCELLED"),
    ErrorCode.OVERLOADED: (HTTPStatus.TOO_MANY_REQUESTS, "RESOURCE_EXHAUSTED"),
    ErrorCode.RATE_LIMITED: (HTTPStatus.TOO_MANY_REQUESTS, "RESOURCE_EXHAUSTED"),
    ErrorCode.UNAVAILABLE: (HTTPStatus.SERVICE_UNAVAILABLE, "UNAVAILABLE"),
    ErrorCode.TIMED_OUT: (HTTPStatus.GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED"),
    # Retrying the same image elsewhere may work (a larger device), so these two are not the caller's fault.
    ErrorCode.OUT_OF_MEMORY: (HTTPStatus.SERVICE_UNAVAILABLE, "RESOURCE_EXHAUSTED"),
    ErrorCode.ATTEMPTS_EXHAUSTED: (HTTPStatus.INTERNAL_SERVER_ERROR, "ABORTED"),
    ErrorCode.INTERNAL: (HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL"),
}

TITLE: dict[ErrorCode, str] = {  # the short, constant summary of a problem document
    ErrorCode.MALFORMED_REQUEST: "The request could not be read",
    ErrorCode.INVALID_INPUT: "The input is not acceptable",
    ErrorCode.UNSUPPORTED_MEDIA: "The media type is not supported",
    ErrorCode.PAYLOAD_TOO_LARGE: "The payload exceeds a limit",
    ErrorCode.UNAUTHENTICATED: "Valid credentials are required",
    ErrorCode.PERMISSION_DENIED: "The credentials do not allow this",
    ErrorCode.ROUTE_NOT_FOUND: "There is nothing at this address",
    ErrorCode.METHOD_NOT_ALLOWED: "The address does not support this method",
    ErrorCode.JOB_NOT_FOUND: "The job is not known",
    ErrorCode.MODEL_NOT_FOUND: "The model is not known",
    ErrorCode.NOT_FINISHED: "The job has not finished",
    ErrorCode.CONFLICT: "The request conflicts with an earlier one",
    ErrorCode.CANCELLED: "The job was cancelled",
    ErrorCode.OVERLOADED: "The service is at capacity",
    ErrorCode.RATE_LIMITED: "Too many requests from this caller",
    ErrorCode.UNAVAILABLE: "The service is not available",
    ErrorCode.TIMED_OUT: "The deadline passed",
    ErrorCode.OUT_OF_MEMORY: "The model ran out of memory",
    ErrorCode.ATTEMPTS_EXHAUSTED: "The job could not be completed",
    ErrorCode.INTERNAL: "An internal error occurred",
}

# Failures of ours, not of the request: they are kept as dead letters and worth an operator's look.
FAULTS = frozenset({ErrorCode.OUT_OF_MEMORY, ErrorCode.ATTEMPTS_EXHAUSTED, ErrorCode.INTERNAL})


class ServiceError(Exception):
    """Any failure that a caller may see. retry_after_s: seconds after which trying again makes sense, if it does."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    @property
    def http_status(self) -> HTTPStatus:
        """The HTTP status of the table."""
        return STATUS[self.code][0]

    @property
    def grpc_status(self) -> str:
        """The gRPC status name of the table, such as `INVALID_ARGUMENT`."""
        return STATUS[self.code][1]


class MalformedRequestError(ServiceError):
    """The request cannot be read."""

    code = ErrorCode.MALFORMED_REQUEST


class InvalidInputError(ServiceError):
    """The request can be read, but what it says or shows is not acceptable."""

    code = ErrorCode.INVALID_INPUT


class UnsupportedMediaError(ServiceError):
    """Not one of the accepted kinds of request body or image."""

    code = ErrorCode.UNSUPPORTED_MEDIA


class PayloadTooLargeError(ServiceError):
    """More bytes, pixels or frames than the limits allow."""

    code = ErrorCode.PAYLOAD_TOO_LARGE


class UnauthenticatedError(ServiceError):
    """No valid credentials."""

    code = ErrorCode.UNAUTHENTICATED


class PermissionDeniedError(ServiceError):
    """Valid credentials that do not reach this far."""

    code = ErrorCode.PERMISSION_DENIED


class RouteNotFoundError(ServiceError):
    """No such address."""

    code = ErrorCode.ROUTE_NOT_FOUND


class MethodNotAllowedError(ServiceError):
    """The address exists, the method does not."""

    code = ErrorCode.METHOD_NOT_ALLOWED


class JobNotFoundError(ServiceError):
    """No such job, or it has been discarded."""

    code = ErrorCode.JOB_NOT_FOUND


class ModelNotFoundError(ServiceError):
    """No such model, or not in this version."""

    code = ErrorCode.MODEL_NOT_FOUND


class NotFinishedError(ServiceError):
    """The job is known but has no result yet."""

    code = ErrorCode.NOT_FINISHED


class ConflictError(ServiceError):
    """An idempotency key came back with another request."""

    code = ErrorCode.CONFLICT


class CancelledError(ServiceError):
    """The job was cancelled. Not `asyncio.CancelledError`."""

    code = ErrorCode.CANCELLED


class OverloadedError(ServiceError):
    """The queue is full."""

    code = ErrorCode.OVERLOADED


class NoRoomError(OverloadedError):
    """The queue takes more jobs, but not as many bytes as this one has. For callers it is OverloadedError."""


class RateLimitedError(ServiceError):
    """The caller asks too often."""

    code = ErrorCode.RATE_LIMITED


class UnavailableError(ServiceError):
    """Draining, not warm yet, or the queue cannot be reached."""

    code = ErrorCode.UNAVAILABLE


class TimedOutError(ServiceError):
    """The deadline passed before there was a result."""

    code = ErrorCode.TIMED_OUT


class OutOfMemoryError(ServiceError):
    """The device has too little memory; the worker halves the batch and tries again before reporting this."""

    code = ErrorCode.OUT_OF_MEMORY


class AttemptsExhaustedError(ServiceError):
    """Every worker that took the job was lost."""

    code = ErrorCode.ATTEMPTS_EXHAUSTED


class InternalError(ServiceError):
    """Anything else. The message must be safe to show."""

    code = ErrorCode.INTERNAL


INTERNAL_MESSAGE = "an internal error occurred; the server's log has the details under this request id"

_BY_CODE: dict[ErrorCode, type[ServiceError]] = {kind.code: kind for kind in ServiceError.__subclasses__()}


def error_of(code: ErrorCode, message: str) -> ServiceError:
    """The error that crossed the queue as code and message, as an exception again."""
    return _BY_CODE[code](message)
