"""A client of recofuse servers: HTTP or gRPC, blocking or awaiting, with one set of results and errors.

Needs neither torch nor a server's own packages nor a codec; docs/client.md shows every call by example.
"""

import importlib
from typing import TYPE_CHECKING

from recofuse_client.client import AsyncClient, Client
from recofuse_client.errors import (
    AttemptsExhaustedError,
    BadAnswerError,
    CancelledError,
    ConflictError,
    ConnectionFailedError,
    ConnectionLostError,
    InternalError,
    InvalidInputError,
    JobError,
    JobNotFoundError,
    MalformedRequestError,
    MethodNotAllowedError,
    ModelNotFoundError,
    NotFinishedError,
    OutOfMemoryError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitedError,
    RecofuseError,
    RefusedError,
    RequestError,
    RouteNotFoundError,
    TimedOutError,
    TransportError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedMediaError,
)
from recofuse_client.retries import Retry
from recofuse_client.values import (
    Alarm,
    Alignment,
    Frame,
    FrameResult,
    Fusion,
    Health,
    Job,
    JobStatus,
    Model,
    Options,
    Part,
    Picture,
    Region,
    Rig,
    StreamStats,
    Timings,
    Values,
)

if TYPE_CHECKING:
    from recofuse_client.streams.awaiting import AsyncFrameStream
    from recofuse_client.streams.blocking import FrameStream
else:

    def __getattr__(name: str) -> object:
        """The streams' classes, imported when asked for, because they bring gRPC along."""
        homes = {"AsyncFrameStream": "awaiting", "FrameStream": "blocking"}
        if name not in homes:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"recofuse_client.streams.{homes[name]}"), name)


__all__ = [
    "Alarm",
    "Alignment",
    "AsyncClient",
    "AsyncFrameStream",
    "AttemptsExhaustedError",
    "BadAnswerError",
    "CancelledError",
    "Client",
    "ConflictError",
    "ConnectionFailedError",
    "ConnectionLostError",
    "Frame",
    "FrameResult",
    "FrameStream",
    "Fusion",
    "Health",
    "InternalError",
    "InvalidInputError",
    "Job",
    "JobError",
    "JobNotFoundError",
    "JobStatus",
    "MalformedRequestError",
    "MethodNotAllowedError",
    "Model",
    "ModelNotFoundError",
    "NotFinishedError",
    "Options",
    "OutOfMemoryError",
    "OverloadedError",
    "Part",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "Picture",
    "RateLimitedError",
    "RecofuseError",
    "RefusedError",
    "Region",
    "RequestError",
    "Retry",
    "Rig",
    "RouteNotFoundError",
    "StreamStats",
    "TimedOutError",
    "Timings",
    "TransportError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedMediaError",
    "Values",
]
