"""Everything that can go wrong for a caller of the client, whichever way it talks to the server.

    RecofuseError
    ├── RequestError               as it stands, this request will never succeed
    │   ├── MalformedRequestError, InvalidInputError, UnsupportedMediaError, PayloadTooLargeError
    │   ├── UnauthenticatedError, PermissionDeniedError
    │   └── RouteNotFoundError, MethodNotAllowedError, ModelNotFoundError, ConflictError
    ├── RefusedError               not now: nothing was done, and trying again later makes sense
    │   └── OverloadedError, RateLimitedError, UnavailableError
    ├── JobError                   what became of a job
    │   ├── JobNotFoundError, NotFinishedError, CancelledError, TimedOutError
    │   └── OutOfMemoryError, AttemptsExhaustedError, InternalError
    └── TransportError             there was no answer of recofuse
        ├── ConnectionFailedError  the request never left
        ├── ConnectionLostError    it left, and whether it was carried out is not known
        └── BadAnswerError         something else answers at this address

An error of the server keeps the server's stable name (`code`), its message and the request's id; those of the transport
have names of their own. A deadline that passes here is a TimedOutError, as if the server had noticed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class RecofuseError(Exception):
    """Any failure. request_id: of the answer, if there was one. retry_after_s: the server's advice, in seconds."""

    code: ClassVar[str] = ""

    def __init__(self, message: str, *, request_id: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class RequestError(RecofuseError):
    """As it stands, this request will never succeed."""


class RefusedError(RecofuseError):
    """Not now: nothing was done, and trying again later makes sense."""


class JobError(RecofuseError):
    """What became of a job."""


class TransportError(RecofuseError):
    """There was no answer of recofuse."""


class MalformedRequestError(RequestError):
    """The request cannot be read."""

    code = "malformed_request"


class InvalidInputError(RequestError):
    """The request can be read, but what it says or shows is not acceptable."""

    code = "invalid_input"


class UnsupportedMediaError(RequestError):
    """Not one of the accepted kinds of image."""

    code = "unsupported_media"


class PayloadTooLargeError(RequestError):
    """More bytes, pixels or frames than the server's limits allow."""

    code = "payload_too_large"


class UnauthenticatedError(RequestError):
    """No valid API key."""

    code = "unauthenticated"


class PermissionDeniedError(RequestError):
    """The API key does not reach this far."""

    code = "permission_denied"


class RouteNotFoundError(RequestError):
    """The server does not offer this; it may be older than the client."""

    code = "route_not_found"


class MethodNotAllowedError(RequestError):
    """The server offers this, but not in this way."""

    code = "method_not_allowed"


class ModelNotFoundError(RequestError):
    """No such model; only the server's Open Inference Protocol asks for one by name."""

    code = "model_not_found"


class ConflictError(RequestError):
    """An idempotency key that was used for another request."""

    code = "conflict"


class OverloadedError(RefusedError):
    """The queue is full."""

    code = "overloaded"


class RateLimitedError(RefusedError):
    """The API key asks too often."""

    code = "rate_limited"


class UnavailableError(RefusedError):
    """The server is stopping, not warm yet, or cannot reach its queue."""

    code = "unavailable"


class JobNotFoundError(JobError):
    """No such job, or it has been discarded."""

    code = "job_not_found"


class NotFinishedError(JobError):
    """The job is known but has no result yet."""

    code = "not_finished"


class CancelledError(JobError):
    """The job was cancelled. Not `asyncio.CancelledError`."""

    code = "cancelled"


class TimedOutError(JobError):
    """The deadline passed before there was a result."""

    code = "timed_out"


class OutOfMemoryError(JobError):
    """The model does not fit this image even alone."""

    code = "out_of_memory"


class AttemptsExhaustedError(JobError):
    """Every worker that took the job was lost."""

    code = "attempts_exhausted"


class InternalError(JobError):
    """Anything else; the server's log has the details under the request id."""

    code = "internal"


class ConnectionFailedError(TransportError):
    """No connection: the request never left."""

    code = "connection_failed"


class ConnectionLostError(TransportError):
    """The connection broke after the request had left; whether it was carried out is not known."""

    code = "connection_lost"


class BadAnswerError(TransportError):
    """The answer is not one of recofuse."""

    code = "bad_answer"


def _leaves(kind: type[RecofuseError]) -> Iterator[type[RecofuseError]]:
    for child in kind.__subclasses__():
        yield from _leaves(child)
        if child.code:
            yield child


BY_CODE: dict[str, type[RecofuseError]] = {kind.code: kind for kind in _leaves(RecofuseError)}


def error_of(code: str, message: str, *, request_id: str = "", retry_after_s: float | None = None) -> RecofuseError:
    """The server's error of this code; of a code that a newer server may have, an InternalError that names it."""
    kind = BY_CODE.get(code)
    if kind is None or issubclass(kind, TransportError):
        return InternalError(f"{message} ({code})", request_id=request_id, retry_after_s=retry_after_s)
    return kind(message, request_id=request_id, retry_after_s=retry_after_s)
